"""The cuDNN kernel: what JAX lowers to it, and a JAX without it; benchmarks/gpu_numerics.py runs it."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from packaging.specifiers import SpecifierSet

from eabf_jax.errors import InputError
from eabf_jax.model import attention
from eabf_jax.model.attention import BACKENDS, with_window

cudnn = BACKENDS["cudnn"]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [256, 201])
def test_cudnn_lowers_to_the_fused_kernel(length: int, packed: bool, window: int | None) -> None:
    attend = cudnn if window is None else with_window(cudnn, window)
    q = jax.ShapeDtypeStruct((2, length, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, length, 2, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, length), jnp.int32) if packed else None
    gradient = jax.grad(lambda q, k, v, s: attend(q, k, v, s).astype(jnp.float32).sum(), (0, 1, 2))
    traced = jax.jit(gradient).trace(q, kv, kv, segments)
    assert [value.shape for value in jax.tree.leaves(traced.out_info)] == [q.shape, kv.shape, kv.shape]
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernel = "fmhaScaleBiasSoftmax" if packed else "fmhaSoftmax"
    assert f"@__cudnn${kernel}(" in text
    assert f"@__cudnn${kernel}Backward(" in text
    assert "exponential" not in text  # no softmax outside the kernel
    # cuDNN counts the query's own key, as JAX's documentation of local_window_size says.
    assert text.count(f"sliding_window_length\\22: {window or 0},") == 2


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 32, 128), (9, 3, 64), (4, 1, 80)])
def test_cudnn_lowers_one_query_to_the_fused_kernel(
    heads: int, kv_heads: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{attention.cudnn._MODULE}.check_cudnn_version", lambda: 91_000)  # no cuDNN here to ask
    q = jax.ShapeDtypeStruct((2, heads, head_dim), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, kv_heads, 1536, head_dim), jnp.bfloat16)
    traced = jax.jit(cudnn.token).trace(q, kv, kv, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert traced.out_info.shape == q.shape
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmax(" in text
    assert "exponential" not in text
    # The cache is not copied.
    assert not [line for line in text.splitlines() if "transpose" in line and "1536" in line]


PRIVATE = "jax._src.cudnn.fused_attention_stablehlo"


@pytest.mark.parametrize(
    "name", ["_dot_product_attention_fwd_p_wrapper", "_dot_product_attention_bwd_p_wrapper", "MaskType", None]
)
def test_a_jax_without_cudnns_private_names_is_one_line_where_cudnn_runs(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name is None:
        monkeypatch.setitem(sys.modules, PRIVATE, None)  # makes the import fail
    else:
        monkeypatch.delattr(f"{PRIVATE}.{name}")
    spec = importlib.util.find_spec("eabf_jax.model.attention.cudnn")
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)  # imports nothing private
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    required = re.search(r"^jax(>=.*)$", Path("requirements.txt").read_text(), re.MULTILINE)
    assert required is not None
    lowest, end = (limit.lstrip("><=") for limit in required[1].split(","))
    with pytest.raises(InputError) as caught:
        jax.eval_shape(jax.grad(lambda q: fresh.BACKEND(q, q, q).astype(jnp.float32).sum()), q)
    message = str(caught.value)
    assert f"JAX {jax.__version__} has no {PRIVATE}.{name or ''}" in message
    # The names are also in older releases than we support.
    named = re.search(r"install jax(>=\S+),<(\S+), or choose", message)
    assert named is not None and lowest in SpecifierSet(named[1]) and named[2] == end
    assert "\n" not in message
