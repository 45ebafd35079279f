"""What vLLM reads of the config.json that we export. vLLM itself is not installed and not run.

The source is vLLM 0.33.0 (commit 4ba787ec9, its wheel on PyPI), read in November 2026. Each function below states what
one file of it does with the config, which vLLM loads with transformers' `AutoConfig`:

- `rope`: vllm/model_executor/layers/rotary_embedding/__init__.py and the classes that it calls
- `multiplier`: vllm/model_executor/models/mistral.py, `MistralAttention`
- `windows`: vllm/model_executor/models/{llama,qwen2,exaone4}.py and vllm/engine/arg_utils.py
- `longest`: vllm/config/model.py, `_get_and_verify_max_len`
- `SERVED`: vllm/model_executor/models/registry.py
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from family import FULL, SAME, SIZES
from scheme_cases import LONGROPE

from eabf_jax.interop.architectures import ARCHITECTURES, OWN_TYPE
from eabf_jax.interop.huggingface import as_architecture, config_from_hf, config_to_hf
from eabf_jax.model import LlamaConfig
from eabf_jax.rope import Scheme, scheme

OWN, BACKEND = "vLLM's own model", "transformers' model inside vLLM"
# Classes in vLLM's registry. It also finds the classes of transformers that are not there, as its backend.
SERVED = {
    **{f"{name}ForCausalLM": OWN for name in ("Llama", "Mistral", "Ministral3", "Qwen2", "Qwen3", "Phi3", "Granite")},
    "Exaone4ForCausalLM": OWN,
    **{f"{name}ForCausalLM": BACKEND for name in ("Olmo2", "SeedOss", "SmolLM3", "Cwm", "Ministral")},
}
HEAD, WINDOW = 64, 4096
SCHEMES = {
    "default": scheme("default", base=20_000.0),
    "abf": scheme("abf"),
    "ntk": scheme("ntk", factor=4.0),
    "pi": scheme("pi", factor=4.0),
    "ntk_by_parts": scheme("ntk_by_parts", factor=4.0, pretrained_window=WINDOW),
    "yarn": scheme("yarn", factor=8.0, pretrained_window=WINDOW, beta_fast=24.0, truncate=False),
    "yarn with its own factor": scheme("yarn", factor=8.0, pretrained_window=WINDOW, attention_factor=1.3),
    "llama3": scheme("llama3", base=500_000.0, factor=8.0, pretrained_window=WINDOW),
    "longrope": scheme("longrope", factor=8.0, **LONGROPE),
    "eabf_stair": scheme("eabf_stair", pretrained_window=WINDOW),
}


def model(s: Scheme, **fields: Any) -> LlamaConfig:
    sizes = {**SIZES, "hidden_size": 4 * HEAD, "head_dim": HEAD, "max_position_embeddings": 8 * WINDOW}
    return LlamaConfig(**{**sizes, **fields}, rope=s)


def loaded(directory: Path, values: dict[str, Any]) -> Any:
    """Loads a config.json as vLLM does."""
    (directory / "config.json").write_text(json.dumps(values))
    return transformers.AutoConfig.from_pretrained(directory)


def rope(config: Any, head_dim: int, served_length: int) -> tuple[np.ndarray, float]:
    """Returns the inverse frequencies, and the factor on cos and sin, of a server for texts up to a length."""
    section = config.rope_parameters
    size = int(head_dim * section.get("partial_rotary_factor", 1.0))
    plain = section["rope_theta"] ** (-np.arange(0, size, 2) / size)
    kind = section["rope_type"]
    if kind == "default":
        return plain, 1.0
    if kind == "longrope":
        window, longest = section["original_max_position_embeddings"], config.max_position_embeddings
        factors = section["long_factor" if served_length > window else "short_factor"]
        return plain / np.array(factors), math.sqrt(1 + math.log(longest / window) / math.log(window))
    factor = section["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    window = section["original_max_position_embeddings"]
    if kind == "llama3":
        low, high, turns = section["low_freq_factor"], section["high_freq_factor"], window * plain / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - smooth) * plain / factor + smooth * plain, 1.0
    assert kind == "yarn"
    scale = section.get("attention_factor")
    bounds = [
        size * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(section["rope_theta"]))
        for turns in (section.get("beta_fast", 32), section.get("beta_slow", 1))
    ]
    if section.get("truncate", True):
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    first, last = max(bounds[0], 0), min(bounds[1], size - 1)
    ramp = np.clip((np.arange(size // 2) - first) / max(last - first, 0.001), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), 0.1 * math.log(factor) + 1 if scale is None else scale


def multiplier(config: Any, positions: np.ndarray) -> np.ndarray:
    """Returns the multiplier of the queries; keys of the rotary section do not count."""
    keys = getattr(config, "llama_4_scaling", None)
    if keys is None:
        return np.ones_like(positions)
    return 1 + keys["beta"] * np.log(1 + np.floor(positions / keys["original_max_position_embeddings"]))


def windows(config: Any) -> list[int | None] | None:
    """Returns the window of each layer; None for a model that vLLM refuses because of its windows."""
    types = getattr(config, "layer_types", None)
    if types is None:  # one window for all
        return [getattr(config, "sliding_window", None)] * config.num_hidden_layers
    if config.model_type in ("qwen2", "qwen3") and len(set(types)) > 1:
        assert config.max_window_layers != config.num_hidden_layers  # else it would ignore the windows
        return None
    return [config.sliding_window if kind == "sliding_attention" else None for kind in types]


def longest(config: Any) -> int:
    """Returns the length up to which a server works without `--max-model-len`."""
    section = config.rope_parameters
    if section["rope_type"] == "longrope":
        return config.original_max_position_embeddings
    scaled = section["rope_type"] not in ("llama3", "yarn")
    return int(config.max_position_embeddings * (section.get("factor", 1.0) if scaled else 1.0))


@pytest.mark.parametrize("name", SCHEMES)
def test_vllm_computes_the_same_rotation_and_multiplier(name: str, tmp_path: Path) -> None:
    ours = model(SCHEMES[name])
    ours = as_architecture(ours, "ministral3" if name == "eabf_stair" else "llama")
    config = loaded(tmp_path, config_to_hf(ours))
    assert [*SERVED].count(config.architectures[0]) == 1
    long = 8 * WINDOW
    assert ours.max_position_embeddings == config.max_position_embeddings or name in ("ntk_by_parts", "yarn")
    frequencies, scale = rope(config, HEAD, long)
    np.testing.assert_allclose(frequencies, ours.rope.inverse_frequencies(HEAD, long), rtol=1e-5)
    np.testing.assert_allclose(scale, ours.rope.rotation_scale(long), rtol=1e-6)
    positions = np.arange(long)
    np.testing.assert_allclose(
        multiplier(config, positions), ours.rope.logit_scale(jnp.asarray(positions), 0), rtol=1e-6
    )
    expected = {"longrope": WINDOW, "pi": 4 * long}.get(name, config.max_position_embeddings)
    assert longest(config) == expected


def test_what_vllm_computes_otherwise(tmp_path: Path) -> None:
    """These schemes are exported for transformers, and docs/serving.md says that vLLM does not serve them."""
    factor = scheme("longrope", factor=8.0, attention_factor=1.5, **LONGROPE)
    config = loaded(tmp_path, config_to_hf(model(factor)))
    assert abs(rope(config, HEAD, 8 * WINDOW)[1] - factor.rotation_scale(8 * WINDOW)) > 0.1
    dynamic = loaded(tmp_path, config_to_hf(model(scheme("dynamic_ntk", factor=4.0, pretrained_window=WINDOW))))
    # vLLM has one base for all lengths, and without this key it is the plain one.
    assert dynamic.rope_parameters["rope_type"] == "dynamic" and "max_trained_positions" not in dynamic.rope_parameters
    eabf = config_to_hf(model(scheme("eabf", pretrained_window=WINDOW)))
    assert eabf["architectures"][0] not in SERVED and not hasattr(transformers, eabf["architectures"][0])


@pytest.mark.parametrize("kind", [*FULL, *SAME])
def test_vllm_reads_the_shape_of_every_architecture(kind: str, tmp_path: Path) -> None:
    values = {"model_type": kind, **SIZES, **(FULL | SAME)[kind]}
    ours = config_from_hf(json.loads(json.dumps(values)))
    config = loaded(tmp_path, config_to_hf(ours, "bfloat16"))
    assert config.architectures == [ARCHITECTURES[kind].class_name] and config.architectures[0] in SERVED
    assert SERVED[config.architectures[0]] == OWN or hasattr(transformers, config.architectures[0])
    assert config.hidden_act == "silu" and config.dtype == torch.bfloat16 and getattr(config, "is_causal", True)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
                 "bos_token_id", "pad_token_id"):  # fmt: skip
        value = getattr(config, name)
        assert value == getattr(ours, name) and type(value) is type(getattr(ours, name)), name
    assert (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) == ours.head_dim
    # LLaMA's class has one key for q, k, v and o, and others for InternLM3's names.
    if ARCHITECTURES[kind].class_name == "LlamaForCausalLM":
        assert (config.attention_bias, config.mlp_bias) == (ours.attention_bias, ours.mlp_bias)
        assert getattr(config, "qkv_bias", config.attention_bias) == config.attention_bias
    expected = [ours.window_of(layer) for layer in range(ours.num_hidden_layers)]
    assert windows(config) == (None if kind in ("qwen2", "qwen3") else expected)
    frequencies, _ = rope(config, ours.head_dim, 64)
    np.testing.assert_allclose(frequencies, ours.rope.inverse_frequencies(ours.rotary_dim), rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("window", [None, 7])
def test_vllm_serves_qwen_with_one_window_or_none(kind: str, window: int | None, tmp_path: Path) -> None:
    ours = dataclasses.replace(
        config_from_hf({"model_type": kind, **SIZES, "head_dim": 8}), sliding_window=window, full_attention_layers=()
    )
    assert windows(loaded(tmp_path, config_to_hf(ours))) == [window] * 3


@pytest.mark.document_check
def test_every_architecture_is_judged_and_told() -> None:
    assert {ARCHITECTURES[kind].class_name for kind in ARCHITECTURES.keys() - {OWN_TYPE}} == SERVED.keys()
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if row.startswith(("| `llama`", "| `qwen2`", "| `ministral`, "))]
    told = {kind: OWN in row.replace("its own", "vLLM's own") for row in rows for kind in re.findall(r"`(\w+)`", row)}
    assert told == {kind: SERVED[entry.class_name] == OWN for kind, entry in ARCHITECTURES.items() if kind != OWN_TYPE}
