"""Sharding: where parameters lie, equal results on eight devices and on one, and the rows that a process loads."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from eabf_jax.errors import InputError
from eabf_jax.model import Llama, LlamaConfig
from eabf_jax.model.attention import BACKENDS
from eabf_jax.model.llama import product, unconstrained
from eabf_jax.model.lora import Lora
from eabf_jax.parallel import rules
from eabf_jax.parallel.context import undo_zigzag_order, zigzag_order
from eabf_jax.parallel.mesh import AXES, MeshConfig, make_mesh
from eabf_jax.parallel.rules import (
    activation_constraint,
    batch_part,
    batch_sharding,
    batch_ways,
    layer_product,
    parameter_shardings,
    process_batch_shard,
    sharded_attention,
    spec,
)
from eabf_jax.rope import scheme

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=4, head_dim=8, max_position_embeddings=32, attention_bias=True, mlp_bias=True,
    rope=scheme("eabf", pretrained_window=8),
)  # fmt: skip

LENGTH = 32


def named(tree: Any) -> dict[str, Any]:
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_parameters_are_split_as_documented() -> None:
    embed = ("fsdp", "context")
    column, row = P(None, embed, "tensor"), P(None, "tensor", embed)
    expected = {
        "embed_tokens.embedding": P("tensor", embed),
        "layers.input_layernorm.scale": P(None, None),
        "layers.post_attention_layernorm.scale": P(None, None),
        "norm.scale": P(None),
        "lm_head.kernel": P(embed, "tensor"),
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        expected |= {f"layers.{name}.kernel": column, f"layers.{name}.bias": P(None, "tensor")}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        expected |= {f"layers.{name}.kernel": row, f"layers.{name}.bias": P(None, None)}
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shardings = named(parameter_shardings(mesh, Llama.abstract(CONFIG).parameters()))
    assert {name: sharding.spec for name, sharding in shardings.items()} == expected
    assert all(sharding.mesh == mesh for sharding in shardings.values())


def test_adapters_are_split_like_the_kernels_they_stand_beside() -> None:
    """Their rank is not split, because it is too small."""
    mesh, embed = make_mesh(MeshConfig(2, 2, 2)), ("fsdp", "context")
    lora = Lora(targets=("q_proj", "down_proj"))
    shardings = named(parameter_shardings(mesh, Llama.abstract(CONFIG, lora=lora).parameters()))
    assert {name: sharding.spec for name, sharding in shardings.items() if "lora" in name} == {
        "layers.self_attn.q_proj.lora_a": P(None, embed, None),
        "layers.self_attn.q_proj.lora_b": P(None, None, "tensor"),
        "layers.mlp.down_proj.lora_a": P(None, "tensor", None),
        "layers.mlp.down_proj.lora_b": P(None, None, embed),
    }


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("heads", "mlp"), "an array has the logical axes heads and mlp, both split over the mesh axis tensor"),
        (("batch", "length", "embed"), "logical axes batch and embed, both split over the mesh axis fsdp"),
        (("vocab", "vocab"), "logical axes vocab and vocab, both"),
    ],
)
def test_two_axes_of_one_array_on_one_mesh_axis_are_refused(axes: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec(*axes)


def test_a_parameter_whose_axes_collide_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "parameter_axes", lambda path: ("layers", "heads", "mlp"))
    params = Llama.abstract(CONFIG).parameters()["layers"]["mlp"]["up_proj"]
    with pytest.raises(InputError, match=r"parameter layers\.mlp\.up_proj\.bias has the logical axes heads and mlp"):
        parameter_shardings(make_mesh(MeshConfig(2, 2, 2)), {"layers": {"mlp": {"up_proj": params}}})


def test_a_dimension_that_the_mesh_does_not_divide_is_named() -> None:
    params = {"embed_tokens": {"embedding": jax.ShapeDtypeStruct((63, 32), jnp.float32)}}
    with pytest.raises(InputError, match=r"embed_tokens.embedding has a dimension of 63, .* 2 ways \(tensor\)"):
        parameter_shardings(make_mesh(MeshConfig(2, 2, 2)), params)


@pytest.mark.parametrize(("sizes", "ways"), [((1, 8, 1), 8), ((2, 2, 2), 4), ((1, 1, 8), 1)])
def test_the_batch_is_split_over_data_and_fsdp(sizes: tuple[int, int, int], ways: int) -> None:
    mesh = make_mesh(MeshConfig(*sizes))
    assert batch_ways(mesh) == ways
    assert batch_sharding(mesh).shard_shape((16, 5)) == (16 // ways, 5)


def test_a_tensor_axis_that_does_not_divide_the_key_value_heads_is_refused() -> None:
    with pytest.raises(InputError, match="mesh tensor=8 does not divide the model's 4 key-value heads"):
        sharded_attention(make_mesh(MeshConfig(1, 1, 8)), BACKENDS["chunked"], CONFIG.num_key_value_heads)


def test_one_device_needs_no_hooks() -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert sharded_attention(mesh, BACKENDS["chunked"], 3) is BACKENDS["chunked"]
    assert activation_constraint(mesh) is unconstrained
    assert layer_product(mesh) is product


class Batch(NamedTuple):
    """Eight rows, and their arrays as the host prepares them."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    mask: np.ndarray  # targets that count
    segment_ids: np.ndarray | None


def batch(packed: bool) -> Batch:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, CONFIG.vocab_size, (8, LENGTH)).astype(np.int32)
    segments = np.sort(generator.integers(1, 4, (8, LENGTH)), axis=1).astype(np.int32) if packed else None
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (8, 1))
    return Batch(tokens, np.roll(tokens, -1, axis=1), positions, positions < LENGTH - 1, segments)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    generator = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return generator.normal(scale=0.3, size=leaf.shape).astype(np.float32)

    return jax.tree.map(draw, Llama.abstract(CONFIG).parameters())


def loss_and_gradient(model: Llama, params: Any, rows: Batch) -> Any:
    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = model.with_parameters(params)(rows.tokens, rows.positions, rows.segment_ids)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.targets[..., None], axis=-1)[..., 0]
        return -(chosen * rows.mask).sum() / rows.mask.sum(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture(scope="module")
def single_device(params: dict[str, Any]) -> dict[bool, Any]:
    model = Llama.abstract(CONFIG, attention="reference")
    run = jax.jit(functools.partial(loss_and_gradient, model))
    return {packed: jax.device_get(run(params, batch(packed))) for packed in (False, True)}


# Sizes of data, fsdp, tensor and context, and whether rows are packed, which a context axis excludes.
MESHES = [
    ((8, 1, 1, 1), False),
    ((1, 8, 1, 1), False),
    ((2, 2, 2, 1), True),
    ((1, 2, 4, 1), True),
    ((1, 1, 1, 8), False),
    ((1, 1, 2, 4), False),
    ((1, 2, 1, 4), False),
    ((2, 2, 1, 2), False),
    ((2, 1, 2, 2), False),
    ((1, 2, 2, 2), False),
]


@pytest.mark.parametrize(("sizes", "packed"), MESHES)
def test_eight_devices_compute_what_one_does(
    sizes: tuple[int, int, int, int], packed: bool, params: dict[str, Any], single_device: dict[bool, Any]
) -> None:
    mesh, ways = make_mesh(MeshConfig(*sizes)), sizes[3]
    model = Llama.abstract(
        CONFIG, attention=sharded_attention(mesh, BACKENDS["chunked"], CONFIG.num_key_value_heads),
        constrain=activation_constraint(mesh),
        product=layer_product(mesh) if ways > 1 else product,  # the compiler's own collectives give the same result
    )  # fmt: skip
    shardings = parameter_shardings(mesh, params)
    order = zigzag_order(LENGTH, ways)
    rows = jax.tree.map(lambda x: jax.device_put(x[:, order], batch_sharding(mesh)), batch(packed))
    run = jax.jit(functools.partial(loss_and_gradient, model), out_shardings=(None, shardings))
    (loss, logits), gradient = run(jax.device_put(params, shardings), rows)
    (expected_loss, expected_logits), expected_gradient = single_device[packed]
    # Sums in another order differ by float32 rounding (6e-8) through three layers.
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)
    found = np.asarray(logits)[:, undo_zigzag_order(LENGTH, ways)]
    np.testing.assert_allclose(found, expected_logits, atol=2e-5 * np.abs(expected_logits).max(), rtol=0)
    for name, expected in named(expected_gradient).items():
        largest = np.abs(expected).max()
        assert largest > 0
        np.testing.assert_allclose(named(gradient)[name], expected, atol=2e-5 * largest, rtol=0, err_msg=name)
    kernel = gradient["layers"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 32 // (sizes[1] * ways), 48 // sizes[2])


def test_activations_are_laid_out_by_their_logical_axes() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    constrain = activation_constraint(mesh)
    laid_out = jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))(jnp.ones((8, 3, 6)))
    assert laid_out.sharding.shard_shape(laid_out.shape) == (2, 3, 3)
    constrain = activation_constraint(make_mesh(MeshConfig(2, 1, 2, 2)))
    laid_out = jax.jit(lambda x: constrain(x, "batch", "length", "heads", None))(jnp.ones((8, 4, 6, 5)))
    assert laid_out.sharding.shard_shape(laid_out.shape) == (4, 2, 3, 5)


@dataclasses.dataclass(frozen=True)
class StandInDevice:
    """A device of a process, of which only the place in the mesh matters."""

    id: int
    process_index: int
    platform: str = "cpu"
    client: None = None


def mesh_of_processes(sizes: tuple[int, int, int, int], devices_each: int) -> Mesh:
    """Builds a mesh over many processes from stand-ins for devices."""
    devices = [StandInDevice(index, index // devices_each) for index in range(math.prod(sizes))]
    return Mesh(np.array(devices, dtype=object).reshape(sizes), AXES)


@pytest.mark.parametrize(
    ("sizes", "devices_each", "expected"),
    [
        ((1, 8, 1, 1), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),  # every process has its own rows
        ((2, 2, 1, 2), 4, [(0, 2), (1, 2)]),
        ((1, 2, 1, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes share a tensor axis
        ((1, 2, 4, 1), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes share a context axis
        ((1, 1, 1, 8), 4, [(0, 1), (0, 1)]),  # tensor parallelism only: every process loads all rows
        ((2, 4, 1, 1), 8, [(0, 1)]),
    ],
)
def test_processes_that_hold_the_same_rows_load_the_same_part(
    sizes: tuple[int, int, int, int],
    devices_each: int,
    expected: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mesh = mesh_of_processes(sizes, devices_each)
    for process, part in enumerate(expected):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert process_batch_shard(mesh) == part


def test_this_process_alone_loads_the_whole_batch() -> None:
    assert process_batch_shard(make_mesh(MeshConfig(2, 2, 2))) == (0, 1)


def test_parts_are_numbered_by_their_rows_not_by_process() -> None:
    rows = {0: {2, 3}, 1: {0, 1}, 2: {2, 3}, 3: {0, 1}}
    assert [batch_part(rows, process) for process in rows] == [(1, 2), (0, 2), (1, 2), (0, 2)]


def test_parts_that_overlap_or_differ_are_refused() -> None:
    # With three devices per process and two on the tensor axis, the second process holds half of two rows.
    with pytest.raises(InputError, match="overlap or differ in number"):
        process_batch_shard(mesh_of_processes((1, 3, 1, 2), 3))
    with pytest.raises(InputError, match="overlap or differ in number"):
        batch_part({0: {0, 1}, 1: {2}}, 0)
