"""Sharded parameters: the collectives that the TPU compiler emits, and correct products and lookups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from eabf_jax.parallel.collectives import collective_bytes
from eabf_jax.parallel.fsdp import _in_two_steps, lookup, lookup_backward, sharded_product
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.parallel.rules import spec
from eabf_jax.parallel.topology import compile_only_devices, tpu_slice

TOKENS, COLUMN, ROW, TABLE = spec("batch", "length"), spec("embed", "mlp"), spec("mlp", "embed"), spec("vocab", "embed")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v4-16", {"fsdp": 1, "context": 8}),  # a slice of 2 x 2 x 2 as one axis
        ("v4-128", {"fsdp": 2, "context": 32}),  # an axis over half a torus
    ],
)
def test_the_tpu_compiler_gathers_weights_and_scatters_gradients(name: str, sizes: dict[str, int]) -> None:
    mesh = make_mesh(
        MeshConfig(fsdp=sizes.get("fsdp", 1), context=sizes["context"]), compile_only_devices(tpu_slice(name))
    )
    multiply = sharded_product(mesh, TOKENS, whole=False)
    rows, times, width = mesh.shape["fsdp"], 3, 4096

    def step(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(lambda x, kernel: multiply(x, kernel, ROW), x, kernel)
        return pullback(y)

    x, kernels = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*at)))
        for shape, at in (
            ((rows, mesh.shape["context"] * 128, width), (*TOKENS, None)),
            ((times, width, width), (None, *ROW)),
        )
    )
    compiled = jax.jit(lambda x, kernels: jax.lax.scan(step, x, kernels)).lower(x, kernels).compile()
    # In both operations, each of n devices sends its part to n - 1 others; the compiler pads what it scatters. The
    # gradient reuses the weights that the product has gathered.
    part = times * width * width * 2 * (1 - 1 / mesh.size)
    sent = collective_bytes(compiled.as_text() or "")
    assert sent["all-gather"] == pytest.approx(part, rel=0.01)
    assert sent["reduce-scatter"] == pytest.approx(part, rel=0.1)
    assert set(sent) <= {"all-gather", "reduce-scatter", "collective-permute"} and sum(sent.values()) < 2.2 * part


def test_two_steps_scatter_as_one_does() -> None:
    mesh = make_mesh(MeshConfig(fsdp=1, context=8))
    x = np.random.default_rng(0).integers(0, 100, (8, 16, 3)).astype(np.int32)

    def local(x: jax.Array) -> jax.Array:
        x = x[0]
        for groups in _in_two_steps(8):
            x = jax.lax.psum_scatter(x, "context", scatter_dimension=0, axis_index_groups=groups, tiled=True)
        return x

    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("context"), out_specs=P("context"), check_vma=False))(x)
    np.testing.assert_array_equal(found, x.sum(axis=0))


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 2, 2, 2)])
def test_parts_are_the_whole(sizes: tuple[int, int, int, int]) -> None:
    """Float32 adds these integers without rounding in any order, so results equal NumPy bit for bit."""
    mesh, rng = make_mesh(MeshConfig(*sizes)), np.random.default_rng(0)
    x, d_y, d_rows = (rng.integers(-9, 9, (4, 6, size)).astype(np.float32) for size in (16, 8, 16))
    tokens = rng.integers(0, 10, (4, 6)).astype(np.int32)
    table = rng.integers(-9, 9, (10, 16)).astype(np.float32)
    up, down = (rng.integers(-9, 9, shape).astype(np.float32) for shape in ((16, 8), (8, 16)))

    def put(array: np.ndarray, at: P) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, at))

    rows = P(*TOKENS, None)
    multiply = sharded_product(mesh, TOKENS, whole=False)

    @jax.jit
    def run(x, d_y, up, down, table, tokens, d_rows):
        y, pullback = jax.vjp(lambda x, kernel: multiply(x, kernel, COLUMN), x, up)
        z, pullback_down = jax.vjp(lambda y, kernel: multiply(y, kernel, ROW), d_y, down)
        read = lookup(mesh, TOKENS, TABLE)(table, tokens)
        return y, pullback(d_y), z, pullback_down(x), read, lookup_backward(mesh, TOKENS, TABLE)(table, tokens, d_rows)

    y, (d_x, d_up), z, (d_mid, d_down), read, total = run(
        put(x, rows), put(d_y, rows), put(up, COLUMN), put(down, ROW), put(table, TABLE), put(tokens, TOKENS),
        put(d_rows, rows),
    )  # fmt: skip
    for found, expected in (
        (y, x @ up), (d_x, d_y @ up.T), (d_up, np.einsum("bti,bto->io", x, d_y)),
        (z, d_y @ down), (d_mid, x @ down.T), (d_down, np.einsum("bti,bto->io", d_y, x)),
        (read, table[tokens]),
    ):  # fmt: skip
        np.testing.assert_array_equal(found, expected)
    np.add.at(table, tokens, d_rows)
    np.testing.assert_array_equal(total, table)


def test_a_frozen_parameter_has_no_gradient_to_scatter() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, context=2))
    multiply = sharded_product(mesh, TOKENS, whole=False)

    def gradient_by_x(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.grad(lambda x: (multiply(x, jax.lax.stop_gradient(kernel), COLUMN) ** 2).sum())(x)

    text = jax.jit(gradient_by_x).lower(jnp.ones((4, 4, 16)), jnp.ones((16, 8))).compile().as_text()
    assert "reduce-scatter" not in collective_bytes(text or "")
