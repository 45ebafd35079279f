"""Rotary schemes in GGUF files, compared with llama.cpp's formulas and with transformers."""

import json
from pathlib import Path

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
    as_gguf,
    config_of,
    converted,
    metadata,
    model,
    scaling,
    write,
)
from scheme_cases import KNOWN_TO_HF, ONLY_OURS, WITHOUT_A_NAME

from eabf_jax.errors import InputError
from eabf_jax.interop.gguf import config_from_gguf, from_gguf
from eabf_jax.interop.gguf_architectures import GGUF_ARCHITECTURES
from eabf_jax.interop.gguf_file import read_gguf
from eabf_jax.interop.gguf_rope import rotary_keys
from eabf_jax.rope import Scheme, compose, scheme
from eabf_jax.rope.logit_scale import none

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


LISTS = {"short_factor": [1.0 + 0.1 * j for j in range(8)], "long_factor": [1.0 + 0.5 * j for j in range(8)]}
LONGROPE = scheme("longrope", factor=4.0, pretrained_window=1024, **LISTS)
SCALED = scheme("longrope", factor=4.0, pretrained_window=1024, attention_factor=1.5, **LISTS)
STAIR = {"type": "llama4_temperature", "pretrained_window": 1024, "beta": 0.1}
RAMP = scheme("yarn", factor=4.0, pretrained_window=1024, beta_fast=8.0, beta_slow=2.0)
CASES: list[tuple[str, Scheme]] = [
    *(
        ("llama", s)
        for s in (
            *STATIC,
            LONGROPE,
            scheme("longrope", factor=4.0, pretrained_window=1024, attention_factor=1.5, **LISTS),
        )
    ),
    *(("phi3", s) for s in (*STATIC[:6], LONGROPE)),
    ("granite", LONGROPE),
    *(("qwen3", s) for s in STATIC if s.name in ("default", "abf", "pi")),
    ("qwen3", scheme("yarn", factor=8, pretrained_window=4096, attention_factor=0.875)),
    # Beyond the frequencies, a multiplier, whose window is also that of YaRN and LongRoPE.
    *(("mistral3", compose(s, STAIR)) for s in (scheme("abf"), RAMP, LONGROPE)),
    ("mistral3", compose(scheme("yarn", factor=4.0, pretrained_window=2048), STAIR)),
    ("mistral3", scheme("eabf_stair", pretrained_window=1024)),
    ("mistral3", RAMP),
]


def llama_cpp_rotation(
    values: Metadata, tensors: dict[str, np.ndarray], context: int, architecture: str
) -> tuple[np.ndarray, float]:
    """Computes what llama.cpp makes of the keys of a scheme: frequencies and magnitude, in float64."""
    own, factor = values.get("rope.scaling.attn_factor", 1.0), values.get("rope.scaling.factor", 1.0)
    window = values.get("rope.scaling.original_context_length", 4096)
    base = values["rope.freq_base"]
    if values.get("rope.scaling.type") == "yarn":
        betas = [values.get(f"rope.scaling.yarn_beta_{name}") for name in ("fast", "slow")]
        fast, slow = betas if architecture == "mistral3" else (32.0, 1.0)
        assert architecture == "mistral3" or betas == [None, None]
        return llama_cpp_yarn(factor, window, fast, slow, own, base)
    listed = tensors.get("rope_factors_long.weight" if context > window else "rope_factors_short.weight")
    divisors = tensors.get("rope_freqs.weight", 1.0 if listed is None else listed)
    return base ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM) / factor / divisors, own


@pytest.mark.parametrize(("name", "s"), CASES, ids=str)
def test_schemes_are_written_as_llama_cpp_computes_them(tmp_path: Path, name: str, s: Scheme) -> None:
    architecture = GGUF_ARCHITECTURES[name]
    keys, factors = rotary_keys(s, HEAD_DIM, architecture)
    assert factors.keys() <= set(architecture.factors)
    for context in (512, 4096):
        frequencies, magnitude = llama_cpp_rotation(keys, factors, context, name)
        # GGUF's numbers are float32.
        np.testing.assert_allclose(frequencies, s.inverse_frequencies(HEAD_DIM, context), rtol=1e-6)
        assert magnitude == pytest.approx(s.rotation_scale(), rel=1e-6)
    positions = np.arange(4096)
    beta = keys.get("attention.temperature_scale", 0.0)
    expected = 1.0 + beta * np.log(np.floor(positions / keys.get("rope.scaling.original_context_length", 1)) + 1.0)
    np.testing.assert_allclose(s.logit_scale(positions, 0), expected, rtol=1e-6)


@pytest.mark.parametrize(("name", "s"), [case for case in CASES if case[0] in ("llama", "mistral3")], ids=str)
def test_schemes_return(tmp_path: Path, name: str, s: Scheme) -> None:
    keys, factors = rotary_keys(s, HEAD_DIM, GGUF_ARCHITECTURES[name])
    sizes = {key.removeprefix("llama."): value for key, value in metadata().items()}
    values = {f"{name}.{key}": value for key, value in (sizes | keys).items()}
    tensors = as_gguf(model()) | factors
    noted = values | {"eabf_jax.rope": json.dumps(s.to_dict())}
    config = config_from_gguf(read_gguf(write(tmp_path / "m.gguf", noted, tensors, arch=name)), None)
    assert config.rope == s
    if "rope_freqs.weight" in factors:
        return
    # Without our note, the keys mean the same scheme.
    found = config_from_gguf(read_gguf(write(tmp_path / "n.gguf", values, tensors, arch=name)), None).rope
    for context in (512, 4096):
        expected = s.inverse_frequencies(HEAD_DIM, context)
        np.testing.assert_allclose(found.inverse_frequencies(HEAD_DIM, context), expected, rtol=1e-6)
    assert found.rotation_scale() == pytest.approx(s.rotation_scale(), rel=1e-6)
    np.testing.assert_allclose(found.logit_scale(np.arange(9999), 0), s.logit_scale(np.arange(9999), 0), rtol=1e-6)


@pytest.mark.parametrize("growth", [0.0, 1.0, 0.5])
def test_yarn_of_ministral3_is_transformers(tmp_path: Path, growth: float) -> None:
    """llama.cpp's converter writes `mscale_all_dim` as the log multiplier, and `mscale` is 1."""
    settings = {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 1024,
        "beta_fast": 16.0, "beta_slow": 2.0, "llama_4_scaling_beta": 0.1,
        **({"mscale": 1.0, "mscale_all_dim": growth} if growth else {}),
    }  # fmt: skip
    config = transformers.Ministral3Config(
        hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=HEAD_DIM, rope_parameters=settings
    )
    expected, scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    values = {f"mistral3.{key.removeprefix('llama.')}": value for key, value in metadata().items()}
    values |= {
        "mistral3.rope.freq_base": 1e6, "mistral3.rope.scaling.type": "yarn", "mistral3.rope.scaling.factor": 16.0,
        "mistral3.rope.scaling.original_context_length": 1024, "mistral3.rope.scaling.yarn_beta_fast": 16.0,
        "mistral3.rope.scaling.yarn_beta_slow": 2.0, "mistral3.rope.scaling.yarn_log_multiplier": growth,
        "mistral3.attention.temperature_scale": 0.1,
    }  # fmt: skip
    tensors = {key: value for key, value in as_gguf(model()).items() if not key.endswith("bias")}
    from_gguf(write(tmp_path / "m.gguf", values, tensors, arch="mistral3"), tmp_path / "hf")
    found = config_of(tmp_path / "hf")
    np.testing.assert_allclose(found.rope.inverse_frequencies(HEAD_DIM), expected, rtol=1e-6)
    assert found.rope.rotation_scale() == pytest.approx(scale, rel=1e-6)
    assert found.model_type == "ministral3" and dict(found.rope.logit_multiplier.parameters)["beta"] == 0.1
    del values["mistral3.attention.temperature_scale"]
    from_gguf(write(tmp_path / "n.gguf", values, tensors, arch="mistral3"), tmp_path / "plain")
    assert config_of(tmp_path / "plain").model_type == "mistral"


EABF = scheme("eabf", pretrained_window=4096)


@pytest.mark.parametrize(
    ("name", "s", "message"),
    [
        (
            "llama",
            EABF,
            r"'eabf' multiplies the attention logits, which llama.cpp cannot do for the architecture 'llama' \(it "
            r"computes eabf_stair, for models with LLaMA's features\): export the model with convert/to_hf.py, and",
        ),
        ("mistral3", EABF, "'eabf' multiplies the attention logits, which llama.cpp cannot do .* 'mistral3'"),
        ("mistral3", compose({"type": "abf"}, {**STAIR, "one_based": True}), "multiplies the attention logits"),
        ("mistral3", compose({**LONGROPE.to_dict(), "pretrained_window": 2048}, STAIR), "two lists of factors, and an"),
        ("llama", WITHOUT_A_NAME, "'compose' multiplies the attention logits, .* export the model with convert/to_hf"),
        ("llama", scheme("eabf_stair", pretrained_window=64), "'eabf_stair' multiplies the .* 'llama': export"),
        ("llama", scheme("dynamic_ntk", factor=2.0, pretrained_window=512), "'dynamic_ntk' follows the length of the"),
        ("llama", scheme("dynamic_yarn", pretrained_window=4096), "'dynamic_yarn' follows the length .* serve it"),
        ("qwen3", LONGROPE, "'longrope' has two lists of factors, which llama.cpp cannot do for the .* 'qwen3': ex"),
        ("qwen3", scheme("llama3", factor=8.0, pretrained_window=64), "'llama3' has frequencies of its own, .*qwen3"),
        ("qwen3", RAMP, "'yarn' has frequencies of its own"),
    ],
)  # fmt: skip
def test_schemes_that_llama_cpp_lacks_are_refused(name: str, s: Scheme, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rotary_keys(s, HEAD_DIM, GGUF_ARCHITECTURES[name])
