"""All backends against attention in float64 NumPy, what remat keeps, and the choice of a backend."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import assert_near, exact, random_qkv, random_segments, with_gradients
from jax._src.ad_checkpoint import saved_residuals
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import partial_eval as pe

from eabf_jax.errors import InputError
from eabf_jax.model import attention
from eabf_jax.model.attention import BACKENDS, select

chunked, cudnn, reference = (BACKENDS[name] for name in ("chunked", "cudnn", "reference"))


# length, query heads, key-value heads, head_dim: lengths above, below and at multiples of a chunk; MHA, GQA, MQA
SHAPES = [(64, 4, 4, 8), (50, 4, 2, 8), (97, 6, 2, 16), (13, 4, 1, 8)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_exact_to_float32(
    shape: tuple[int, int, int, int], packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.chunked, "_CHUNK", 16)  # several blocks in short rows
    qkv = random_qkv(*shape)
    segments = random_segments(shape[0]) if packed else None
    d_out = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    expected = exact(*qkv, segments, d_out)
    for backend in (reference, chunked):
        # sums of up to 97 x 3 products in float32: about ten roundings of 6e-8
        assert_near(with_gradients(backend, qkv, segments, d_out), expected, 3e-6)


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
    # Both sides read the same rounded inputs. Weights, their gradients and the result are each rounded to 8
    # bits (relative 2^-9): a few such roundings on the largest values.
    assert_near(values, exact(*qkv, segments, d_out), 4 * 2**-8)


def test_large_logits_neither_overflow_nor_lose_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.chunked, "_CHUNK", 16)
    q, k, v = random_qkv(40, 2, 2, 8)
    qkv = (q * 100, k, v)  # logits of about 600, whose exp() is infinite in float32
    out = exact(*qkv, None, np.ones_like(q))[0]
    for backend in (reference, chunked):
        # A relative rounding of 6e-8 in a logit of 600 makes a relative error of 4e-5 in its weight.
        np.testing.assert_allclose(jax.jit(backend)(*qkv, None), out, atol=5e-4)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr and of all jaxprs inside it, except the bodies of Pallas kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name == "pallas_call":
            continue
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# The primitives that identify the halves of each kernel in a jaxpr; for the chunked kernel, ones that only it uses.
FORWARD = ("reduce_max", "dot_product_attention_fwd_wrapper", "splash_mha_fwd_residuals")
BACKWARD = ("dynamic_update_slice", "dot_product_attention_bwd_wrapper", "splash_mha_dkv_no_residuals")


def count_kernels(function: Any, *arguments: Any) -> tuple[int, int]:
    """Counts the forward and backward kernels that a function runs, without dead code."""
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
    # the log-sum-exp; the input, q, k, v and the output
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
        (None, jnp.float32, 64, "chunked"),  # the tests run on CPU
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
