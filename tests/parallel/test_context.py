"""Rows split over devices: the order of their tokens, and the same attention as on one device for every backend."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import partial_eval as pe

from eabf_jax.errors import InputError
from eabf_jax.model import attention
from eabf_jax.model.attention import BACKENDS
from eabf_jax.parallel.context import undo_zigzag_order, zigzag_order
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.parallel.rules import sharded_attention

HEADS, KV_HEADS = 4, 2
chunked, cudnn, reference, splash = (BACKENDS[name] for name in ("chunked", "cudnn", "reference", "splash"))


def test_each_device_holds_an_early_and_a_late_chunk() -> None:
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag_order(12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert zigzag_order(5, 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ways", [2, 4, 8])
def test_every_device_sees_the_same_number_of_keys(ways: int) -> None:
    shares = zigzag_order(32 * ways, ways).reshape(ways, -1)
    assert len(set((shares + 1).sum(axis=1))) == 1


@pytest.mark.parametrize("ways", [1, 2, 8])
def test_the_order_is_undone(ways: int) -> None:
    row = np.arange(32) ** 2
    np.testing.assert_array_equal(row[zigzag_order(32, ways)][undo_zigzag_order(32, ways)], row)


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match=r"rows of 24 tokens .* mesh context=8: the window has to be a multiple of 16"):
        zigzag_order(24, 8)


def arrays(length: int, head_dim: int, batch: int, dtype: Any = np.float32) -> tuple[list[np.ndarray], np.ndarray]:
    """Draws q, k and v whose logits have a standard deviation of about 2, and a gradient of the output."""
    generator = np.random.default_rng(length)
    q, k, v, d_out = (
        generator.normal(size=(batch, length, heads, head_dim)) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    q *= 2 / math.sqrt(head_dim)
    return [np.asarray(x, dtype) for x in (q, k, v)], np.asarray(d_out, dtype)


def with_gradients(backend: Any, qkv: list[np.ndarray], d_out: np.ndarray) -> list[jax.Array]:
    @jax.jit
    def run(*qkv: jax.Array) -> list[jax.Array]:
        out, pullback = jax.vjp(lambda q, k, v: backend(q, k, v, None), *qkv)
        return [out, *pullback(jnp.asarray(d_out))]

    return run(*qkv)


def assert_attends_as_on_one_device(
    backend: Any, sizes: tuple[int, ...], qkv: list[np.ndarray], d_out: np.ndarray, tolerance: float
) -> None:
    length, ways = d_out.shape[1], sizes[3]
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    order, undo = zigzag_order(length, ways), undo_zigzag_order(length, ways)
    placed = [x[:, order] for x in qkv], d_out[:, order]
    found = with_gradients(sharded_attention(mesh, backend, KV_HEADS), *placed)
    wide = [np.asarray(x, np.float32) for x in qkv], np.asarray(d_out, np.float32)
    for name, value, wanted in zip(("out", "d_q", "d_k", "d_v"), found, with_gradients(reference, *wide), strict=True):
        assert value.dtype == d_out.dtype
        error = np.abs(np.asarray(value, np.float32)[:, undo] - wanted).max() / np.abs(wanted).max()
        assert error < tolerance, f"{name}: {error:.2e}"


# Sizes of data, fsdp, tensor and context: each number of devices per row, and rows or heads split as well.
SIZES = [(1, 1, 1, 2), (2, 1, 1, 4), (1, 1, 2, 4), (1, 1, 1, 8)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_split_rows_attend_as_whole_ones(backend: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.chunked, "_CHUNK", 4)  # several blocks, which do not divide chunks of 6
    # Float32 sums of up to 96 terms in another order: about ten roundings of 6e-8.
    assert_attends_as_on_one_device(BACKENDS[backend], sizes, *arrays(96, 8, batch=2), tolerance=3e-6)


def test_joined_parts_lose_only_roundings_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.chunked, "_CHUNK", 8)
    # As in the GPU's kernel, each part's output and gradients are rounded to 8 bits (2^-9), then their sums once more.
    inputs = arrays(64, 8, batch=1, dtype=jnp.bfloat16)
    assert_attends_as_on_one_device(chunked, (1, 1, 1, 2), *inputs, tolerance=6 * 2**-9)


def test_large_logits_are_joined_without_overflow() -> None:
    (q, k, v), d_out = arrays(32, 8, batch=1)
    # A rounding of 6e-8 in logits of about 600 makes a relative error of 4e-5 in weights and gradients.
    assert_attends_as_on_one_device(chunked, (1, 1, 1, 4), [q * 100, k, v], d_out, tolerance=1e-3)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 2), (1, 1, 2, 2)])
def test_splash_attends_to_split_rows_in_the_interpreter(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.splash, "_BLOCK", 128)  # several blocks per device
    attention.splash._kernel.cache_clear()
    with pltpu.force_tpu_interpret_mode():
        assert_attends_as_on_one_device(splash, sizes, *arrays(512, 64, batch=1), tolerance=1e-5)
    attention.splash._kernel.cache_clear()


def lowered_for_cuda(length: int, sizes: tuple[int, ...]) -> str:
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    attend = sharded_attention(mesh, cudnn, KV_HEADS)
    q, kv = (jax.ShapeDtypeStruct((2, length, heads, 64), jnp.bfloat16) for heads in (HEADS, KV_HEADS))
    gradient = jax.grad(lambda q, k, v: attend(q, k, v, None).astype(jnp.float32).sum(), (0, 1, 2))
    return jax.jit(gradient).trace(q, kv, kv).lower(lowering_platforms=("cuda",)).as_text()


def test_cudnn_runs_two_kernels_a_chunk_and_none_on_keys_to_come() -> None:
    text = lowered_for_cuda(64, (1, 1, 1, 2))
    calls = re.findall(
        r"@__cudnn\$fmhaSoftmax(Backward)?\(.*?(NO_MASK|CAUSAL).*? : \(tensor<(\w+)>, tensor<(\w+)>", text
    )
    # Chunks have 16 tokens. One causal call covers both chunks as separate rows. Then each chunk attends to all whole
    # chunks before it: the first device holds chunks 0 and 3, the second 1 and 2.
    within = ("CAUSAL", "4x16x4x64xbf16", "4x16x2x64xbf16")
    before = [("NO_MASK", "2x16x4x64xbf16", f"2x{keys}x2x64xbf16") for keys in (48, 16, 32)]
    for half in ("", "Backward"):
        assert [call[1:] for call in calls if call[0] == half] == [within, *before]
    assert "stablehlo.case" in text


@pytest.mark.parametrize(
    ("backend", "length", "multiple"), [(chunked, 36, 8), (cudnn, 36, 16), (splash, 768, 512), (reference, 36, 8)]
)
def test_lengths_that_a_backend_cannot_split_are_refused(backend: Any, length: int, multiple: int) -> None:
    attend = sharded_attention(make_mesh(MeshConfig(fsdp=1, context=4), jax.devices()[:4]), backend, KV_HEADS)
    q, kv = (jax.ShapeDtypeStruct((2, length, heads, 64), jnp.bfloat16) for heads in (HEADS, KV_HEADS))
    with pytest.raises(InputError, match=f"rows of {length} tokens .* context=4 .* a multiple of {multiple}"):
        jax.eval_shape(lambda q, k, v: attend(q, k, v, None), q, kv, kv)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ({"forward": None}, "attention backend 'new' cannot return log-sum-exps"),
        ({"backward": None}, "attention backend 'new' cannot compute gradients from log-sum-exps"),
    ],
)
def test_a_backend_without_the_abilities_is_refused_by_name(lacking: dict[str, None], message: str) -> None:
    mesh = make_mesh(MeshConfig(fsdp=1, context=4), jax.devices()[:4])
    new = dataclasses.replace(chunked, name="new", **lacking)
    assert sharded_attention(make_mesh(MeshConfig(fsdp=4), jax.devices()[:4]), new, KV_HEADS)
    with pytest.raises(InputError, match=message):
        sharded_attention(mesh, new, KV_HEADS)
    with pytest.raises(InputError, match="context=4 needs an attention backend by name"):
        sharded_attention(mesh, new.attend, KV_HEADS)


def test_packed_rows_are_refused() -> None:
    attend = sharded_attention(make_mesh(MeshConfig(context=8)), chunked, KV_HEADS)
    (q, k, v), _ = arrays(32, 8, batch=1)
    with pytest.raises(InputError, match=r"context=8 splits rows of one document; packed rows .* need context=1"):
        attend(q, k, v, np.ones((1, 32), np.int32))


def count(jaxpr: Any, names: tuple[str, ...]) -> dict[str, int]:
    """Counts how often a jaxpr and those inside it run each primitive; of branches, the highest count."""
    found = dict.fromkeys(names, 0)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in found:
            found[name] += 1
        leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
        inner = [getattr(x, "jaxpr", x) for x in leaves if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        counts = [count(each, names) for each in inner]
        for kind in names:
            ran = [each[kind] for each in counts]
            found[kind] += max(ran) if name == "cond" else sum(ran)
    return found


def test_remat_spares_the_kernels_and_keeps_no_gathered_keys() -> None:
    mesh = make_mesh(MeshConfig(fsdp=1, context=2), jax.devices()[:2])
    attend = sharded_attention(mesh, cudnn, KV_HEADS)

    def layer(x: jax.Array) -> jax.Array:
        q, k, v = (checkpoint_name(jnp.tanh(x * scale), "qkv") for scale in (1, 2, 3))
        return jnp.sin(attend(q, k, v, None)).astype(jnp.float32).sum()

    policy = jax.checkpoint_policies.save_only_these_names("attention_output", "qkv")
    x = jax.ShapeDtypeStruct((1, 64, 4, 64), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(jax.checkpoint(layer, policy=policy)))(x).jaxpr
    live, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    halves = ("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper")
    # One kernel within the chunks and two on the keys before them, each forward once and backward once.
    assert count(live, (*halves, "all_gather")) == {halves[0]: 3, halves[1]: 3, "all_gather": 8}
