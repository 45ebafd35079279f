"""The backends against attention in float64 NumPy, values and gradients; which backend is chosen where."""

import functools
import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import partial_eval as pe

from eabf_jax.errors import InputError
from eabf_jax.model import attention
from eabf_jax.model.attention import BACKENDS, select

chunked, cudnn, reference, splash = (BACKENDS[name] for name in ("chunked", "cudnn", "reference", "splash"))

QKV = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_qkv(length: int, heads: int, kv_heads: int, head_dim: int, batch: int = 2) -> QKV:
    """Queries, keys and values whose logits have a standard deviation of about 2."""
    generator = np.random.default_rng(length)
    q, k, v = (
        generator.normal(size=(batch, length, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    return q * np.float32(2 / math.sqrt(head_dim)), k, v


def random_segments(length: int, batch: int = 2) -> np.ndarray:
    """A different packing in each row, padding (segment 0) at the end of the first."""
    generator = np.random.default_rng(length)
    rows = []
    for _ in range(batch):
        borders = np.sort(generator.choice(np.arange(1, length), 3, replace=False))
        rows.append(np.searchsorted(borders, np.arange(length), side="right") + 1)
    rows[0][rows[0] == 4] = 0
    return np.stack(rows).astype(np.int32)


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray | None, d_out: np.ndarray) -> list[Any]:
    """Output and gradients of sum(out * d_out), float64, one head of one row at a time."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    out, d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        seen = np.tri(q.shape[1], dtype=bool)
        if segments is not None:
            seen &= segments[b][:, None] == segments[b][None, :]
        for n in range(q.shape[2]):
            m = n // group
            logits = np.where(seen, q[b, :, n] @ k[b, :, m].T, -np.inf)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[b, :, n] = weights @ v[b, :, m]
            d_weights = d_out[b, :, n] @ v[b, :, m].T
            d_logits = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
            d_q[b, :, n] = d_logits @ k[b, :, m]
            d_k[b, :, m] += d_logits.T @ q[b, :, n]
            d_v[b, :, m] += weights.T @ d_out[b, :, n]
    return [out, d_q, d_k, d_v]


def with_gradients(backend: Any, qkv: Any, segments: np.ndarray | None, d_out: np.ndarray) -> list[jax.Array]:
    # Compiling is nearly all the time this takes; the compiler need not try hard.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        out, back = jax.vjp(lambda q, k, v: backend(q, k, v, segments), q, k, v)
        return out, back(jnp.asarray(d_out, out.dtype))

    out, gradients = run(*qkv)
    return [out, *gradients]


def assert_near(values: list[Any], expected: list[Any], tolerance: float) -> None:
    for name, value, wanted in zip(("out", "d_q", "d_k", "d_v"), values, expected, strict=True):
        value = np.asarray(value, np.float64)
        assert value.shape == wanted.shape
        error = np.abs(value - wanted).max() / np.abs(wanted).max()
        assert error < tolerance, f"{name}: {error:.2e}"


# length, query heads, key-value heads, head_dim: chunk multiples and not, below a chunk, MHA, GQA, MQA
SHAPES = [(64, 4, 4, 8), (50, 4, 2, 8), (97, 6, 2, 16), (13, 4, 1, 8)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_exact_to_float32(
    shape: tuple[int, int, int, int], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.chunked, "_CHUNK", 16)  # several blocks, without long rows
    qkv = random_qkv(*shape)
    segments = random_segments(shape[0]) if packed else None
    d_out = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    expected = exact(*qkv, segments, d_out)
    for backend in (reference, chunked):
        # sums of up to 97 x 3 products in float32: some ten roundings of 6e-8
        assert_near(with_gradients(backend, qkv, segments, d_out), expected, 3e-6)


def test_chunked_with_its_own_chunk_size() -> None:
    qkv = random_qkv(1100, 2, 1, 8, batch=1)
    d_out = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    assert_near(with_gradients(chunked, qkv, None, d_out), exact(*qkv, None, d_out), 1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_bfloat16_loses_only_the_roundings_of_its_inputs_and_outputs(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.chunked, "_CHUNK", 16)
    qkv = [jnp.asarray(x, jnp.bfloat16) for x in random_qkv(50, 4, 2, 8)]
    segments = random_segments(50)
    d_out = np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=qkv[0].shape), jnp.bfloat16), np.float32)
    values = with_gradients(BACKENDS[backend], qkv, segments, d_out)
    assert all(value.dtype == jnp.bfloat16 for value in values)
    # The inputs are the same rounded ones on both sides. Weights, their gradients and the result are each rounded to 8
    # bits (relative 2^-9): a few such roundings on the largest values.
    assert_near(values, exact(*qkv, segments, d_out), 4 * 2**-8)


def test_large_logits_neither_overflow_nor_lose_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.chunked, "_CHUNK", 16)
    q, k, v = random_qkv(40, 2, 2, 8)
    qkv = (q * 100, k, v)  # logits of some 600: exp() of them is infinite in float32
    out = exact(*qkv, None, np.ones_like(q))[0]
    for backend in (reference, chunked):
        # Relative rounding 6e-8 of a logit of 600 is a relative error of 4e-5 in its weight.
        np.testing.assert_allclose(jax.jit(backend)(*qkv, None), out, atol=5e-4)


def test_chunked_never_builds_the_whole_matrix() -> None:
    length = 4096
    q = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    text = str(jax.make_jaxpr(jax.grad(lambda q, k, v: chunked(q, k, v, None).sum(), (0, 1, 2)))(q, q, q))
    assert f"{length},{length}" not in text
    assert f"{length},{length}" in str(jax.make_jaxpr(reference)(q, q, q, None))


@pytest.mark.parametrize("packed", [False, True])
def test_splash_is_exact_in_the_interpreter(packed: bool) -> None:
    """The TPU kernel run by Pallas' interpreter: GQA, a head and a length that are padded to 128."""
    qkv = random_qkv(150, 4, 2, 64, batch=1)
    segments = random_segments(150, batch=1) if packed else None
    d_out = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    with pltpu.force_tpu_interpret_mode():
        values = with_gradients(splash, qkv, segments, d_out)
    assert_near(values, exact(*qkv, segments, d_out), 1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [256, 201])
def test_cudnn_lowers_to_the_fused_kernel(length: int, packed: bool) -> None:
    q = jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, length, 2, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, length), jnp.int32) if packed else None
    gradient = jax.grad(lambda q, k, v, s: cudnn(q, k, v, s).astype(jnp.float32).sum(), (0, 1, 2))
    traced = jax.jit(gradient).trace(q, kv, kv, segments)
    assert [value.shape for value in jax.tree.leaves(traced.out_info)] == [q.shape, kv.shape, kv.shape]
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernel = "fmhaScaleBiasSoftmax" if packed else "fmhaSoftmax"
    assert f"@__cudnn${kernel}(" in text
    assert f"@__cudnn${kernel}Backward(" in text
    assert "exponential" not in text  # no softmax beside the kernel


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 128), (9, 3, 64), (4, 1, 80)])
def test_cudnn_lowers_one_query_to_the_fused_kernel(
    heads: int, kv_heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{attention.cudnn._MODULE}.check_cudnn_version", lambda: 91_000)  # there is none to ask here
    q = jax.ShapeDtypeStruct((2, heads, head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, kv_heads, 1536, head_dim), jnp.bfloat16)
    traced = jax.jit(cudnn.token).trace(q, kv, kv, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert traced.out_info.shape == q.shape
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax(" in text
    assert "exponential" not in text
    # The cache is read where it lies.
    assert not [line for line in text.splitlines() if "transpose" in line and "1536" in line]


PRIVATE = "jax._src.cudnn.fused_attention_stablehlo"


@pytest.mark.parametrize(
    "name", ["_dot_product_attention_fwd_p_wrapper", "_dot_product_attention_bwd_p_wrapper", "MaskType", None]
)
def test_a_jax_without_cudnns_private_names_is_one_line_where_cudnn_runs(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name is None:
        monkeypatch.setitem(sys.modules, PRIVATE, None)  # as if there were no such module
    else:
        monkeypatch.delattr(f"{PRIVATE}.{name}")
    spec = importlib.util.find_spec("eabf_jax.model.attention.cudnn")
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)  # imports nothing private
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    versions = re.search(r"^jax(>=.*)$", Path("requirements.txt").read_text(), re.MULTILINE)
    assert versions is not None
    with pytest.raises(InputError) as caught:
        jax.eval_shape(jax.grad(lambda q: fresh.BACKEND(q, q, q).astype(jnp.float32).sum()), q)
    message = str(caught.value)
    assert f"JAX {jax.__version__} has no {PRIVATE}.{name or ''}" in message and f"jax{versions[1]}," in message
    assert "\n" not in message


def equations(jaxpr: Any) -> Iterator[Any]:
    """A jaxpr's equations and those of all jaxprs inside, but for the bodies of Pallas kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name == "pallas_call":
            continue
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# How the halves of each kernel are known in a jaxpr; the chunked one's by what only they compute.
FORWARD = ("reduce_max", "dot_product_attention_fwd_wrapper", "splash_mha_fwd_residuals")
BACKWARD = ("dynamic_update_slice", "dot_product_attention_bwd_wrapper", "splash_mha_dkv_no_residuals")


def count_kernels(function: Any, *arguments: Any) -> tuple[int, int]:
    """How often a function runs a forward and a backward kernel; what nobody reads is not run."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    live, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    counts = dict.fromkeys((*FORWARD, *BACKWARD), 0)
    for equation in equations(live):
        name = equation.primitive.name
        name = str(equation.params["name"]) if name == "pallas_call" else name
        if name in counts:
            counts[name] += 1
    return sum(counts[name] for name in FORWARD), sum(counts[name] for name in BACKWARD)


@pytest.mark.parametrize(("backend", "dtype"), [("chunked", "float32"), ("cudnn", "bfloat16"), ("splash", "float32")])
def test_what_remat_keeps_spares_the_forward_kernel_and_is_kept_once(backend: str, dtype: str) -> None:
    def layer(x: jax.Array) -> jax.Array:
        q, k, v = (checkpoint_name(jnp.tanh(x * scale), "qkv") for scale in (1, 2, 3))
        return jnp.sin(BACKENDS[backend](q, k, v, None)).sum()

    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.dtype(dtype))
    policy = jax.checkpoint_policies.save_only_these_names("attention_output", "qkv")
    kept = jax.checkpoint(layer, policy=policy)
    recomputed = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
    assert count_kernels(jax.value_and_grad(kept), x) == (1, 1)
    assert count_kernels(jax.value_and_grad(recomputed), x) == (2, 1)
    # q, k, v and the output, beside the input; the log-sum-exp
    sizes = [aval.size for aval, _ in saved_residuals(kept, x) if aval.dtype.kind != "i"]
    assert sorted(sizes) == [256 * 2] + [256 * 2 * 128] * 5


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "expected"),
    [
        ("cpu", jnp.bfloat16, 64, "chunked"),
        ("tpu", jnp.bfloat16, 64, "splash"),
        ("gpu", jnp.bfloat16, 128, "cudnn"),
        ("cuda", jnp.float16, 64, "cudnn"),
        ("gpu", jnp.float32, 128, "chunked"),
        ("gpu", jnp.bfloat16, 256, "chunked"),
        ("gpu", jnp.bfloat16, 36, "chunked"),
        (None, jnp.float32, 64, "chunked"),  # these tests run on CPU
    ],
)
def test_auto_takes_the_best_that_platform_and_shape_allow(
    platform: str | None, dtype: Any, head_dim: int, expected: str
) -> None:
    assert select("auto", dtype, head_dim, platform) is BACKENDS[expected]


def test_auto_takes_the_best_that_has_what_is_needed() -> None:
    assert select("auto", jnp.bfloat16, 64, "tpu", needs=("forward",)) is chunked
    assert select("auto", jnp.bfloat16, 64, "gpu", needs=("forward", "backward")) is cudnn
    with pytest.raises(InputError, match="attention backend 'splash' cannot return log-sum-exps"):
        select("splash", jnp.bfloat16, 64, "tpu", needs=("forward",))


def test_a_new_kernel_is_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    new = attention.Backend("new", lambda q, k, v, segment_ids: v, platforms=("npu",))
    monkeypatch.setattr(attention, "BACKENDS", {"new": new, **BACKENDS})
    assert select("new", jnp.float32, 64) is select("auto", jnp.float32, 64, "npu") is new
    assert select("auto", jnp.float32, 64, "cpu") is chunked


def test_a_named_backend_is_taken_or_refused() -> None:
    for name in BACKENDS:
        assert select(name, jnp.bfloat16, 64, "cpu") is BACKENDS[name]
    with pytest.raises(InputError, match="unknown attention backend 'chunk': did you mean 'chunked'"):
        select("chunk", jnp.bfloat16, 64)
    with pytest.raises(InputError, match="not float32 and 64; 'auto' chooses one that does"):
        select("cudnn", jnp.float32, 64)
    with pytest.raises(InputError, match="not bfloat16 and 256"):
        select("cudnn", jnp.bfloat16, 256)
