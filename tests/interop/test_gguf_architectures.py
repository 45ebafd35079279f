"""GGUF files of every architecture, compared with transformers and with the names of the gguf package."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_files import Metadata, Tensors, config_of, write
from hf_directories import assert_same_bits, tensors

from eabf_jax.errors import InputError
from eabf_jax.interop.architectures import ARCHITECTURES, OWN_TYPE
from eabf_jax.interop.gguf import from_gguf
from eabf_jax.interop.gguf_architectures import GGUF_ARCHITECTURES
from eabf_jax.interop.gguf_writer import architecture_for, to_gguf
from eabf_jax.model import LlamaConfig
from eabf_jax.rope import scheme

# Without ids of special tokens, which a file without a tokenizer has no place for. The fourth of 5 layers is SmolLM3's
# first without rotation.
SIZES: Mapping[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.5],
    "partial_rotary_factor": 0.5,
}  # fmt: skip
MULTIPLIERS = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 2.5
}  # fmt: skip
SCALED = {"embedding_scale": 3.0, "attention.scale": 0.2, "residual_scale": 0.3, "logit_scale": 2.5}


class Kind(NamedTuple):
    """A model_type: keys of config.json, llama.cpp's architecture, its keys beyond LLaMA's, and rotary factors."""

    keys: dict[str, Any]
    name: str
    values: Metadata
    factors: Mapping[str, np.ndarray] = MappingProxyType({})


# llama.cpp has no windows here, so that those of a model must reach over the whole context.
KINDS: Mapping[str, Kind] = {
    "llama": Kind({"attention_bias": True, "mlp_bias": True, "head_dim": 12}, "llama", {}),
    "mistral": Kind({"sliding_window": 64, "head_dim": 12}, "llama", {}),
    "ministral": Kind(
        {"sliding_window": 64, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2
         + ["sliding_attention"]}, "llama", {},
    ),
    "ministral3": Kind(
        {"head_dim": 12, "rope_parameters": YARN}, "mistral3",
        {"attention.temperature_scale": 0.3, "rope.freq_base": 1000.0, "rope.scaling.type": "yarn",
         "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
         "rope.scaling.yarn_log_multiplier": 1.0},
    ),
    "qwen2": Kind({"tie_word_embeddings": True}, "qwen2", {}),
    "qwen3": Kind({"head_dim": 12}, "qwen3", {}),
    "smollm3": Kind({"head_dim": 12, "rope_theta": 10_000.0}, "smollm3", {}),
    "phi3": Kind(
        {"sliding_window": 64, "rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, "phi3",
        {"attention.sliding_window": 64, "rope.dimension_count": 4, "rope.scaling.original_context_length": 16,
         "rope.scaling.attn_factor": math.sqrt(1.0 + math.log(4.0) / math.log(16.0))},
        {"rope_factors_long.weight": np.float32([2.0, 3.5]), "rope_factors_short.weight": np.float32([1.0, 1.5])},
    ),
    "granite": Kind({**MULTIPLIERS, "mlp_bias": True}, "granite", SCALED),
    "olmo2": Kind({}, "olmo2", {}),
    "seed_oss": Kind({"head_dim": 12, "attention_bias": True, "attention_out_bias": False}, "seed_oss", {}),
    "internlm3": Kind({"head_dim": 12, "attention_bias": True, "mlp_bias": True}, "llama", {}),
    "iquestcoder": Kind({"head_dim": 12, "attention_bias": True}, "llama", {}),
    "cwm": Kind(
        {"head_dim": 12, "sliding_window": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
         "bos_token_id": 1}, "llama", {},
    ),
    # Without layer_types, transformers divides by zero here.
    "exaone4": Kind({"sliding_window": None, "layer_types": ["full_attention"] * 5}, "exaone4", {}),
}  # fmt: skip
# Architectures whose queries and keys llama.cpp's converter permutes.
PERMUTED = ("llama", "mistral3", "granite", "smollm3")
# More than the pretrained window of 16.
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 40, (2, 24)))


class Case(NamedTuple):
    """One model_type: transformers' model, its directory, and llama.cpp's metadata and tensors of it."""

    reference: Any
    directory: Path
    name: str
    values: Metadata
    tensors: Tensors


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, directory = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **{**SIZES, **kind.keys})
    reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    reference.save_pretrained(directory)
    # transformers cannot build CWM without BOS, and does not store that there is no EOS.
    described = json.loads((directory / "config.json").read_text()) | {"bos_token_id": None, "eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(described))
    head_dim = kind.keys.get("head_dim", 8)
    values = {
        "context_length": 64, "embedding_length": 32, "feed_forward_length": 48, "block_count": 5,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": head_dim,
        "attention.value_length": head_dim, "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": head_dim, "rope.freq_base": 10_000.0, "vocab_size": 40, **kind.values,
    }  # fmt: skip
    prefixed = {f"{kind.name}.{key}": value for key, value in values.items()}
    found = as_gguf(tensors(directory), kind.name) | kind.factors
    return Case(reference, directory, kind.name, prefixed, found)


def as_gguf(state: dict[str, torch.Tensor], name: str) -> Tensors:
    """Names and permutes tensors like llama.cpp's converter, with the gguf package's table of names."""
    key = next(arch for arch, own in gguf.MODEL_ARCH_NAMES.items() if own == name)
    names, out = gguf.get_tensor_name_map(key, SIZES["num_hidden_layers"]), {}
    for hf, value in state.items():
        array = value.numpy()
        heads = 4 if "q_proj" in hf else 2 if "k_proj" in hf else None
        if heads and name in PERMUTED:
            pairs = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        out[names.get_name(hf, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(array)
    return out


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


def test_every_architecture_is_tested() -> None:
    assert KINDS.keys() == ARCHITECTURES.keys() - {OWN_TYPE}
    assert {kind.name for kind in KINDS.values()} == GGUF_ARCHITECTURES.keys()


@pytest.mark.shows("GGUF in")
def test_a_file_of_llama_cpps_converter_is_transformers_model(case: Case, tmp_path: Path) -> None:
    from_gguf(write(tmp_path / "m.gguf", case.values, case.tensors, arch=case.name), tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("*.py"))
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    np.testing.assert_allclose(logits_of(found), logits_of(case.reference), atol=1e-5)
    assert_same_bits(tensors(tmp_path / "hf"), tensors(case.directory))


@pytest.mark.shows("GGUF out")
def test_our_file_is_that_of_llama_cpps_converter(case: Case, tmp_path: Path) -> None:
    to_gguf(case.directory, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == case.name
    own = {key: value for key, value in values.items() if key.startswith(f"{case.name}.")}
    # The same scheme in other keys, which the parity program compares: YaRN's factor on cos and sin as a number, its
    # usual ramp, and LongRoPE's type. A window that reaches over the whole context is not written.
    ours = ("scaling.type", "scaling.attn_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow")
    allowed = {f"{case.name}.rope.{key}" for key in ours}
    theirs = {f"{case.name}.{key}" for key in ("attention.sliding_window", "rope.scaling.yarn_log_multiplier")}
    assert case.values.keys() - theirs <= own.keys() <= case.values.keys() | allowed
    for key in own.keys() & case.values.keys():
        expected = case.values[key]
        assert own[key] == (pytest.approx(expected, rel=1e-7) if isinstance(expected, float) else expected), key
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == case.tensors.keys()
    for name, value in case.tensors.items():
        assert np.array_equal(gguf.quants.dequantize(found[name].data, found[name].tensor_type), value), name
    from_gguf(tmp_path / "m.gguf", tmp_path / "back")
    assert_same_bits(tensors(tmp_path / "back"), tensors(case.directory))
    assert config_of(tmp_path / "back") == config_of(case.directory)


def config(kind: str, **fields: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, "head_dim": 8, "model_type": kind, **fields})


BIASED = {"attention_bias": True, "attention_output_bias": False}
OLMO2 = {"post_norm": True, "qk_norm": "full"}
GRANITE = {**MULTIPLIERS, "residual_multiplier": 0.0}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (config("mistral", sliding_window=5), "sliding_window 5 is shorter than the 64 tokens of max_position_embedd"),
        (
            config("ministral", sliding_window=5, full_attention_layers=(0, 2)),
            "llama.cpp has no windows in its architecture 'llama': export the model with convert/to_hf.py, and serve "
            "it with transformers, or set max_position_embeddings to at most 5",
        ),
        (config("phi3", sliding_window=5), "no windows in its architecture 'phi3'"),
        (config("qwen3", qk_norm="head", attention_bias=True), "'qwen3' cannot express attention_output_bias True of"),
        (config("smollm3", unrotated_layers=(1, 3)), r"'smollm3' cannot express unrotated_layers \(1, 3\) of this"),
        (config("smollm3", unrotated_layers=(3,), mlp_bias=True), "'smollm3' cannot express mlp_bias True .*: export"),
        (config("olmo2", **OLMO2, tie_word_embeddings=True), "'olmo2' cannot express tie_word_embeddings True"),
        (config("olmo2", **OLMO2, head_dim=16), "a head_dim other than hidden_size / num_attention_heads, 16, of"),
        (config("granite", **GRANITE), "'granite' cannot express residual_multiplier 0.0 of this model"),
        (
            config("exaone4", post_norm=True, qk_norm="head", num_hidden_layers=64),
            "'exaone4' cannot express 64 layers without windows of 4,096 tokens",
        ),
        (config("phi3", partial_rotary_factor=0.5, qk_norm="head"), "'phi3' cannot express qk_norm 'head'"),
    ],
)
def test_what_llama_cpp_lacks_is_one_line(model: LlamaConfig, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        architecture_for(model)
    assert "\n" not in str(caught.value)


LLAMA3 = scheme("llama3", factor=8.0, pretrained_window=16)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (config("llama", rope=scheme("eabf_stair", pretrained_window=16)), "mistral3"),
        (config("qwen2", **BIASED, rope=scheme("eabf_stair", pretrained_window=16)), "mistral3"),
        (config("qwen2", **BIASED, rope=LLAMA3), "llama"),
        (config("qwen2", **BIASED, head_dim=16), "llama"),
        (config("seed_oss", attention_output_bias=True), "llama"),
        (config("mistral", rope=scheme("abf")), "llama"),
        (config("smollm3"), "llama"),
    ],
)
def test_another_architecture_with_the_features_takes_the_place(model: LlamaConfig, name: str) -> None:
    assert architecture_for(model)[0].name == name


SHORTEST: Metadata = {
    "context_length": 64, "embedding_length": 32, "feed_forward_length": 48, "block_count": 1,
    "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
EMBEDDING = {"token_embd.weight": np.ones((40, 32), np.float32)}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("granite", {"logit_scale": None}, "metadata has no granite.logit_scale; expected a number above 0"),
        ("granite", {"rope.scaling.finetuned": False}, "rope.scaling.finetuned is False, expected true: false turns"),
        ("olmo2", {"attention.sliding_window": 64}, "olmo2.attention.sliding_window is 64, expected 0: frequencies"),
        ("phi3", {"attention.sliding_window": 47}, "phi3.attention.sliding_window is 47, expected 0 or at least 64"),
        ("phi3", {"rope.scaling.factor": 2.0}, "factor is 2.0, but there is rope_factors_long.weight too"),
        ("phi3", {"rope.dimension_count": 8}, "rope_factors_long.weight has shape .2., expected .4."),
        ("qwen2", {"attention.temperature_scale": 0.1}, "key qwen2.attention.temperature_scale .* is not understood"),
        ("qwen2", {"rope.scaling.type": "longrope"}, "type is 'longrope', expected one of none, linear, yarn$"),
        ("mistral3", {"rope.scaling.yarn_log_multiplier": -1.0}, "log_multiplier is -1.0, expected a number, at least"),
    ],
)
def test_bad_files(kind: str, changes: Metadata, message: str, tmp_path: Path) -> None:
    made = KINDS["ministral3" if kind == "mistral3" else kind]
    values = {**SHORTEST, **made.values, **changes}
    found = {**EMBEDDING, **made.factors}
    kept = {f"{kind}.{key}": value for key, value in values.items() if value is not None}
    with pytest.raises(InputError, match=message) as caught:
        from_gguf(write(tmp_path / "m.gguf", kept, found, arch=kind), tmp_path / "hf")
    assert "\n" not in str(caught.value)


def test_a_bias_that_llama_cpp_would_not_load(tmp_path: Path) -> None:
    values = {f"qwen3.{key}": value for key, value in SHORTEST.items()}
    found = {**EMBEDDING, "blk.0.attn_output.bias": np.ones(32, np.float32)}
    path = write(tmp_path / "m.gguf", values, found, arch="qwen3")
    with pytest.raises(InputError, match="'qwen3' cannot express attention_output_bias True of this model"):
        from_gguf(path, tmp_path / "hf")
