"""GGUF files compared with their source model, with transformers, and with llama.cpp's formulas."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KEY_HEADS,
    LAYERS,
    VOCABULARY,
    WIDE,
    Metadata,
    Tensors,
    as_gguf,
    assert_refused,
    changed,
    config_of,
    converted,
    merged,
    metadata,
    model,
    scaling,
    write,
)
from safetensors.torch import load_file

from eabf_jax.interop import gguf as ours
from eabf_jax.interop import gguf_tokenizer
from eabf_jax.interop.gguf import from_gguf
from eabf_jax.interop.gguf_architectures import GGUF_ARCHITECTURES
from eabf_jax.rope import scheme

PAGE = Path(__file__).parents[2] / "docs" / "gguf.md"


def test_float_file_is_the_model_again(tmp_path: Path) -> None:
    state = model()
    path = write(tmp_path / "m.gguf", metadata(), as_gguf(state))
    done = from_gguf(path, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == state.keys() and done.tensors == len(state)
    for name, value in state.items():
        assert torch.equal(found[name], value), name
    config = config_of(tmp_path / "hf")
    assert config.attention_bias and not config.tie_word_embeddings and config.rms_norm_eps == 1e-5
    assert config.rope == scheme("default", base=10_000.0) and config.max_position_embeddings == 4096
    assert not (tmp_path / "hf" / "tokenizer_config.json").exists()
    from_gguf(path, tmp_path / "hf", dtype="bfloat16", overwrite=True)
    half = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in state.items())


def test_a_bias_of_q_k_and_v_alone_is_qwen2s(tmp_path: Path) -> None:
    """As in a Qwen that was converted as a LLaMA."""
    tensors = {name: value for name, value in as_gguf(model()).items() if "attn_output.bias" not in name}
    found = config_of(converted(tmp_path, {}, tensors))
    assert (found.model_type, found.attention_bias, found.attention_output_bias) == ("qwen2", True, False)


def noted(told: str, **settings: Any) -> Callable[[Metadata, Tensors], object]:
    return lambda values, tensors: values.update({"eabf_jax.rope": told, **scaling(settings)})


def yarn_changed(**changes: Any) -> Callable[[Metadata, Tensors], object]:
    return lambda values, tensors: values.update(scaling({"type": "yarn", "factor": 4.0, **changes}))


BAD: dict[str, tuple[Callable[[Metadata, Tensors], object], str]] = {
    "missing key": (changed(llama__block_count=None), "metadata has no llama.block_count; expected a whole number"),
    "key of another type": (
        changed(llama__context_length="4096"), "llama.context_length is '4096', expected a whole number above 0"
    ),
    "no heads": (changed(llama__attention__head_count=0), "head_count is 0, expected a whole number above 0"),
    "heads that do not share": (
        changed(llama__attention__head_count_kv=3),
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    "no epsilon": (
        changed(llama__attention__layer_norm_rms_epsilon=0.0),
        "layer_norm_rms_epsilon is 0.0, expected a number above 0",
    ),
    "more layers than tensors": (changed(llama__block_count=10**9), "expected at most 29, the number of tensors"),
    "head counts that differ": (
        changed(llama__attention__head_count=[4, 2]),
        r"head_count is \[4, 2\], expected one whole number above 0, the same for all 2 layers",
    ),
    "key head counts that differ": (
        changed(llama__attention__head_count_kv=[2, 4]), r"head_count_kv is \[2, 4\], expected one"
    ),
    "widths that differ": (
        changed(llama__feed_forward_length=[96, 64]), r"feed_forward_length is \[96, 64\], expected one"
    ),
    "too many widths": (changed(llama__feed_forward_length=[96] * 3), r"is \[96, 96, 96\], expected one .* 2 layers"),
    "experts": (changed(llama__expert_count=8), "llama.expert_count is 8, expected 0: a dense model"),
    "partial rotation": (
        changed(llama__rope__dimension_count=8), "dimension_count is 8, expected 16: the whole head is rotated"
    ),
    "rope kind": (
        changed(llama__rope__scaling__type="dynamic"),
        "rope scaling type is 'dynamic', expected one of none, linear, yarn, longrope",
    ),
    "LongRoPE without its lists": (
        changed(llama__rope__scaling__type="longrope"), "tensor rope_factors_long.weight is missing; LongRoPE needs it"
    ),
    "unknown rope key": (
        changed(llama__rope__scaling__low_freq_factor=1.0),
        r"key llama.rope.scaling.low_freq_factor \(value 1.0\) is not understood; .* docs/gguf.md",
    ),
    "unknown attention key": (changed(llama__attention__temperature_scale=0.1), "temperature_scale .* not understood"),
    "unknown key of the model": (changed(llama__ssm__state_size=4), "llama.ssm.state_size .* not understood"),
    "negative factor": (changed(llama__rope__scaling__factor=-2.0), "factor is -2.0, expected a number above 0"),
    "magnitude without YaRN": (
        changed(llama__rope__scaling__attn_factor=0.5), "attn_factor is 0.5, expected 1.0: only YaRN"
    ),
    "YaRN's magnitude of unclear meaning": (
        yarn_changed(yarn_attn_factor=1.0), r"yarn_attn_factor is 1.0, expected none or 1.138629,"
    ),
    "half a ramp": (yarn_changed(yarn_ext_factor=0.5), "yarn_ext_factor is 0.5, expected 1.0 with YaRN and 0.0"),
    "ramp without YaRN": (changed(llama__rope__scaling__yarn_ext_factor=1.0), "yarn_ext_factor is 1.0, expected 1.0 w"),
    "a note that is no scheme": (noted("[1]"), r"eabf_jax.rope is '\[1\]', expected a rotary scheme: .* an object"),
    "a note that is no JSON": (noted("yarn"), "eabf_jax.rope is 'yarn', expected a rotary scheme: .*Expecting value"),
    "a note of another scheme": (
        noted('{"type": "pi", "factor": 4.0}', factor=2.0),
        "but the keys under llama.rope. or rope_freqs.weight are of another scheme; .* remove eabf_jax.rope to read",
    ),
    "a note without its factors": (
        noted('{"type": "llama3", "factor": 8.0, "pretrained_window": 8192}'), "are of another scheme; expected"
    ),
    "betas in the wrong order": (
        yarn_changed(yarn_beta_fast=1.0, yarn_beta_slow=2.0), "beta_fast must be more than beta_slow"
    ),
    "adapter": (changed(general__type="adapter"), "general.type is 'adapter', expected 'model'"),
    "old blocks": (changed(general__quantization_version=1), "general.quantization_version is 1, expected 2"),
    "more tokens than rows": (
        lambda values, tensors: (
            values.update(merged("smollm", adds_bos=False)),
            tensors.update({"token_embd.weight": np.ones((16, HIDDEN), np.float32)}),
        ),
        "the tokenizer has 17 tokens, expected at most 16",
    ),
    "another vocabulary": (changed(llama__vocab_size=99), "vocab_size is 99, expected 1500, the rows of token_embd"),
    "missing tensor": (
        lambda values, tensors: tensors.pop("blk.1.ffn_up.weight"),
        r"tensor blk.1.ffn_up.weight is missing; expected shape \[96, 64\]",
    ),
    "no embedding": (lambda values, tensors: tensors.pop("token_embd.weight"), "token_embd.weight is missing"),
    "a note of other features": (
        changed(eabf_jax__features='{"qk_norm": "head"}'),
        "eabf_jax.features has qk_norm 'head', but the keys and tensors None; expected the same: remove eabf_jax.featu",
    ),
    "a note of unknown features": (
        changed(eabf_jax__features='{"warp": 1}'), "eabf_jax.features is '{\"warp\": 1}', expected features: unknown"
    ),
    "a note that is a list": (changed(eabf_jax__features="[1]"), r"features is '\[1\]', expected features: "),
    "a note of a short window": (
        changed(eabf_jax__features='{"family": "mistral", "sliding_window": 8}'),
        "sliding_window 8 is shorter than the 4096 tokens of max_position_embeddings, and llama.cpp has no windows",
    ),
    "a short window": (
        changed(llama__attention__sliding_window=8), "sliding_window is 8, expected 0 or at least 4096: llama.cpp lets"
    ),
    "no tensors": (lambda values, tensors: tensors.clear(), r"token_embd.weight is missing, .* \(0 tensors\)"),
    "flat embedding": (
        lambda values, tensors: tensors.update({"token_embd.weight": np.ones(32, np.float32)}),
        r"token_embd.weight has shape \[32\], expected \[tokens, 64\]",
    ),
    "mis-shaped tensor": (
        lambda values, tensors: tensors.update({"output_norm.weight": np.ones(32, np.float32)}),
        r"tensor output_norm.weight has shape \[32\], expected \[64\]",
    ),
    "extra tensor": (
        lambda values, tensors: tensors.update({"blk.0.more": np.ones(32, np.float32)}),
        r"tensor blk.0.more is not part of this model \(1 such\)",
    ),
    "tensor of experts": (
        lambda values, tensors: tensors.update({"blk.0.ffn_gate_exps.weight": np.ones((2, 96, 64), np.float32)}),
        "tensor blk.0.ffn_gate_exps.weight is not part of this model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    assert_refused(tmp_path, *BAD[case])


def asks_for_nothing() -> Metadata:
    """Returns every harmless key, and every key with one supported value, with that value."""
    zero = ("expert_count", "expert_used_count", "attention.sliding_window")
    off = ("attention.clamp_kqv", "attention.max_alibi_bias", "attn_logit_softcapping", "final_logit_softcapping")
    one = ("logit_scale", "residual_scale", "embedding_scale")
    scaled = ("alpha", "yarn_log_multiplier", "yarn_ext_factor")
    return {
        **{f"llama.{key}": 0 for key in zero},
        **{f"llama.{key}": 0.0 for key in off},
        **{f"llama.{key}": 1.0 for key in one},
        **scaling(dict.fromkeys(scaled, 0.0) | {"finetuned": True}),
        "llama.vocab_size": VOCABULARY, "llama.attention.value_length": HEAD_DIM, "llama.attention.causal": True,
        "llama.attention.scale": HEAD_DIM**-0.5, "llama.tensor_data_layout": "Meta AI original pth",
        "llama.use_parallel_residual": False, "llama.attention.key_length": HEAD_DIM,
        "general.type": "model", "general.quantization_version": 2, "general.name": "anything",
        "tokenizer.ggml.fim_pre_token_id": 1, "tokenizer.ggml.mask_token_id": 1, "tokenizer.huggingface.json": "{}",
        "tokenizer.ggml.add_sep_token": False, "other.rope.key": 3,
    }  # fmt: skip


def test_keys_that_ask_for_nothing(tmp_path: Path) -> None:
    values = asks_for_nothing()
    fixed = {f"llama.{key}" for key in (*ours.FIXED, *ours.HARMLESS)}
    assert fixed - {"llama.rope.dimension_count"} <= values.keys()
    plain = config_of(converted(tmp_path / "plain", merged("smollm", adds_bos=False)))
    assert config_of(converted(tmp_path / "more", merged("smollm", adds_bos=False) | values)) == plain


def test_sizes_once_a_layer(tmp_path: Path) -> None:
    values = {
        "llama.attention.head_count": [HEADS] * LAYERS, "llama.attention.head_count_kv": [KEY_HEADS] * LAYERS,
        "llama.feed_forward_length": [WIDE] * LAYERS,
    }  # fmt: skip
    found = config_of(converted(tmp_path, values))
    assert (found.num_attention_heads, found.num_key_value_heads) == (HEADS, KEY_HEADS)
    assert found.intermediate_size == WIDE


@pytest.mark.document_check
def test_the_page_names_every_key() -> None:
    """Compares the status of each key in docs/gguf.md with the tables in the code."""
    rows = re.findall(r"^\| (`.*`) \| (read|harmless|one value) ", PAGE.read_text(), re.MULTILINE)
    found = {key: status for keys, status in rows for key in re.findall(r"`([^`]+)`", keys)}
    expected = {f"ARCH.{key}": "read" for key in ours.KEYS}
    expected |= {f"ARCH.{key}": "harmless" for key in ours.HARMLESS}
    expected |= {f"ARCH.{key}": "one value" for key in ours.FIXED} | dict.fromkeys(ours.GENERAL, "one value")
    expected |= dict.fromkeys(gguf_tokenizer.READ, "read") | dict.fromkeys(gguf_tokenizer.HARMLESS, "harmless")
    expected |= dict.fromkeys(gguf_tokenizer.FIXED, "one value")
    extra = {"general.architecture", "split.no", "split.count", "split.tensors.count", "tokenizer.chat_template.NAME"}
    assert found == expected | dict.fromkeys(extra, "read")


@pytest.mark.document_check
def test_the_page_has_each_architecture() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    found = {name: (kinds, keys, biases) for name, kinds, keys, biases in rows if name in GGUF_ARCHITECTURES}
    assert found.keys() == GGUF_ARCHITECTURES.keys()
    for name, (kinds, keys, biases) in found.items():
        entry = GGUF_ARCHITECTURES[name]
        assert tuple(re.findall(r"`([^`]+)`", kinds)) == entry.model_types
        assert tuple(re.findall(r"`([^`]+)`", keys)) == entry.reads
        assert biases == {0: "none", 1: "q, k, v", 3: "all"}[len(entry.biases)]
