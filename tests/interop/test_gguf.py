"""GGUF files compared with their source model, with transformers, and with llama.cpp's formulas."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
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
from scheme_cases import KNOWN_TO_HF, ONLY_OURS, WITHOUT_A_NAME

from eabf_jax.errors import InputError
from eabf_jax.interop import gguf as ours
from eabf_jax.interop import gguf_tokenizer
from eabf_jax.interop.gguf import config_from_gguf, from_gguf, rotary_keys
from eabf_jax.interop.gguf_file import read_gguf
from eabf_jax.rope import Scheme, scheme
from eabf_jax.rope.logit_scale import none

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


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_factors() -> np.ndarray:
    """Computes what llama.cpp stores for Llama 3.1, each frequency's divisor, from transformers' frequencies."""
    settings = {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=HEAD_DIM, rope_parameters=settings
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "none", "factor": 4.0}, scheme("default", base=10_000.0)),
        ({"type": "linear", "factor": 4.0}, scheme("pi", base=10_000.0, factor=4.0)),
        ({"factor": 2.0, "original_context_length": 2048}, scheme("pi", base=10_000.0, factor=2.0)),
        ({"type": "yarn", "factor": 1.0, "yarn_ext_factor": 0.0}, scheme("default", base=10_000.0)),
    ],
)
def test_rope_scaling(tmp_path: Path, settings: Metadata, expected: object) -> None:
    assert config_of(converted(tmp_path, scaling(settings))).rope == expected


def test_old_name_of_the_factor(tmp_path: Path) -> None:
    values = {"llama.rope.scale_linear": 4.0}
    assert config_of(converted(tmp_path, values)).rope == scheme("pi", base=10_000.0, factor=4.0)


def llama_cpp_yarn(
    factor: float, window: float, fast: float, slow: float, own: float, base: float = 10_000.0
) -> tuple[np.ndarray, float]:
    """Computes ggml's rope_yarn in float64, with the arguments from llama_context: frequencies and magnitude.

    There, freq_scale is 1 / factor and ext_factor is 1. rope_yarn multiplies cos and sin by 1 + 0.1 ln(1 / freq_scale).
    llama_context sets attn_factor so that they are multiplied by this once, or by 1 if the factor is below 1, and by
    the file's attn_factor.
    """
    pair = np.arange(HEAD_DIM // 2)
    extrapolated = base ** (-2.0 * pair / HEAD_DIM)

    def corrected(turns: float) -> float:
        return HEAD_DIM * np.log(window / (turns * 2 * np.pi)) / (2 * np.log(base))

    low = max(0.0, np.floor(corrected(fast)))
    high = min(HEAD_DIM - 1.0, np.ceil(corrected(slow)))
    mix = 1.0 - np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
    return extrapolated / factor * (1.0 - mix) + extrapolated * mix, own * (1.0 + 0.1 * np.log(max(factor, 1.0)))


YARN_WHOLE = float(0.1 * np.log(4.0) + 1.0)


@pytest.mark.parametrize(
    ("settings", "window", "fast", "slow", "own"),
    [
        ({}, 4096, 32.0, 1.0, 1.0),  # llama.cpp's default is the context length
        ({"original_context_length": 2048}, 2048, 32.0, 1.0, 1.0),
        ({"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0, "original_context_length": 1024}, 1024, 8.0, 2.0, 1.0),
        ({"attn_factor": 0.5}, 4096, 32.0, 1.0, 0.5),
        ({"factor": 0.5}, 4096, 32.0, 1.0, 1.0),
        ({"factor": 0.5, "attn_factor": 0.75}, 4096, 32.0, 1.0, 0.75),
        ({"yarn_attn_factor": YARN_WHOLE, "yarn_ext_factor": 1.0}, 4096, 32.0, 1.0, 1.0),
        ({"yarn_log_multiplier": 0.0, "finetuned": True, "yarn_ext_factor": -1.0}, 4096, 32.0, 1.0, 1.0),
    ],
)
def test_yarn_is_that_of_llama_cpp(
    tmp_path: Path, settings: Metadata, window: float, fast: float, slow: float, own: float
) -> None:
    settings = {"type": "yarn", "factor": 4.0, **settings}
    found = config_of(converted(tmp_path, scaling(settings))).rope
    frequencies, magnitude = llama_cpp_yarn(settings["factor"], window, fast, slow, own)
    np.testing.assert_allclose(found.inverse_frequencies(HEAD_DIM), frequencies, rtol=2e-7)  # float32
    assert found.rotation_scale() == pytest.approx(magnitude, rel=1e-12)  # float64


def test_yarn_logits_are_those_of_the_model_before_conversion(tmp_path: Path) -> None:
    settings = {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024,
        "beta_fast": 8.0, "beta_slow": 2.0,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=HEAD_DIM, attention_bias=True,
        max_position_embeddings=4096, rms_norm_eps=1e-5, rope_parameters=settings,
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.load_state_dict(model())
    values = scaling(
        {
            "type": "yarn", "factor": 4.0, "original_context_length": 1024, "yarn_beta_fast": 8.0,
            "yarn_beta_slow": 2.0,
        }
    )  # fmt: skip
    found = transformers.AutoModelForCausalLM.from_pretrained(converted(tmp_path, values))
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        expected = reference(tokens).logits
        assert torch.equal(found.eval()(tokens).logits, expected)
        reference.model.rotary_emb.inv_freq = llama_usual_betas(config)
        assert (reference(tokens).logits - expected).abs().max() > 1.0  # otherwise the betas would not be tested


def llama_usual_betas(config: transformers.LlamaConfig) -> torch.Tensor:
    config.rope_parameters |= {"beta_fast": 32.0, "beta_slow": 1.0}
    return transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[0]


def test_llama3_factors(tmp_path: Path) -> None:
    values, tensors = metadata() | {"llama.rope.freq_base": 500_000.0}, as_gguf(model())
    tensors["rope_freqs.weight"] = llama3_factors()
    from_gguf(write(tmp_path / "m.gguf", values, tensors), tmp_path / "hf")
    assert config_of(tmp_path / "hf").rope == scheme("llama3", base=500_000.0, factor=8.0, pretrained_window=8192)
    with pytest.raises(InputError, match=r"factor is 2.0, but there is rope_freqs.weight too; expected only one"):
        from_gguf(write(tmp_path / "s.gguf", values | scaling({"factor": 2.0}), tensors), tmp_path / "other")
    tensors["rope_freqs.weight"] = llama3_factors() + np.arange(HEAD_DIM // 2, dtype=np.float32)
    with pytest.raises(InputError, match="holds factors that are not Llama 3's"):
        from_gguf(write(tmp_path / "n.gguf", values, tensors), tmp_path / "other")


STATIC = [
    *(s for s in (*KNOWN_TO_HF, *ONLY_OURS) if not s.depends_on_length and s.logit_multiplier.function is none),
    scheme("llama3", base=500_000.0, factor=8.0, pretrained_window=512, high_freq_factor=8.0),
    scheme("yarn", factor=4.0, pretrained_window=1024, beta_fast=8.0, beta_slow=2.0, attention_factor=1.2),
    scheme("ntk_by_parts", base=123_456.789, factor=3.0, pretrained_window=4096),
]


def llama_cpp_rotation(values: Metadata, factors: np.ndarray | None) -> tuple[np.ndarray, float]:
    """Computes what llama.cpp makes of the keys below `llama.rope.`: frequencies and magnitude, in float64."""
    own, factor = values.get("scaling.attn_factor", 1.0), values.get("scaling.factor", 1.0)
    if values.get("scaling.type") == "yarn":
        window = values["scaling.original_context_length"]
        return llama_cpp_yarn(factor, window, 32.0, 1.0, own, values["freq_base"])
    plain = values["freq_base"] ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return plain / factor / (1.0 if factors is None else factors), own


@pytest.mark.parametrize("s", STATIC, ids=str)
def test_schemes_are_written_as_llama_cpp_computes_them(tmp_path: Path, s: Scheme) -> None:
    keys, factors = rotary_keys(s, HEAD_DIM)
    frequencies, magnitude = llama_cpp_rotation(keys, factors)
    # GGUF's numbers are float32.
    np.testing.assert_allclose(frequencies, s.inverse_frequencies(HEAD_DIM), rtol=1e-6)
    assert magnitude == pytest.approx(s.rotation_scale(), rel=1e-6)
    values = metadata() | {f"llama.rope.{key}": value for key, value in keys.items()}
    tensors = as_gguf(model()) | ({} if factors is None else {"rope_freqs.weight": factors})
    noted = values | {"eabf_jax.rope": json.dumps(s.to_dict())}
    assert config_from_gguf(read_gguf(write(tmp_path / "m.gguf", noted, tensors)), None).rope == s
    if factors is None:  # without our note, the keys mean the same scheme
        found = config_from_gguf(read_gguf(write(tmp_path / "n.gguf", values, tensors)), None).rope
        np.testing.assert_allclose(found.inverse_frequencies(HEAD_DIM), frequencies, rtol=1e-6)
        assert found.rotation_scale() == pytest.approx(magnitude, rel=1e-6)


@pytest.mark.parametrize(
    ("s", "message"),
    [
        (scheme("eabf", pretrained_window=4096), "'eabf' multiplies the attention logits, which llama.cpp cannot do"),
        (WITHOUT_A_NAME, "'compose' multiplies the attention logits, .* export the model with convert/to_hf.py"),
        (scheme("dynamic_ntk", factor=2.0, pretrained_window=512), "'dynamic_ntk' follows the length of the text"),
        (
            scheme("dynamic_yarn", pretrained_window=4096),
            "'dynamic_yarn' follows the length of the text, .* serve it",
        ),
    ],
)
def test_schemes_that_llama_cpp_lacks_are_refused(s: Scheme, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rotary_keys(s, HEAD_DIM)


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
        changed(llama__rope__scaling__type="longrope"),
        "rope scaling type is 'longrope', expected one of none, linear, yarn",
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
    "a note that is no JSON": (noted("yarn"), "eabf_jax.rope is 'yarn', expected a rotary scheme: Expecting value"),
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
    expected = {f"llama.{key}": "read" for key in ours.KEYS}
    expected |= {f"llama.{key}": "harmless" for key in ours.HARMLESS}
    expected |= {f"llama.{key}": "one value" for key in ours.FIXED} | dict.fromkeys(ours.GENERAL, "one value")
    expected |= dict.fromkeys(gguf_tokenizer.READ, "read") | dict.fromkeys(gguf_tokenizer.HARMLESS, "harmless")
    expected |= dict.fromkeys(gguf_tokenizer.FIXED, "one value")
    extra = {"general.architecture", "split.no", "split.count", "split.tensors.count", "tokenizer.chat_template.NAME"}
    assert found == expected | dict.fromkeys(extra, "read")
