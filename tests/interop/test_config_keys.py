"""Every key of config.json that transformers reads, for every architecture, with values that change what it computes.

A file is read right if transformers computes the same from the file that we write for what we read: bit for bit, with
equal weights. Otherwise it must be refused.
"""

import copy
import dataclasses
import functools
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family import FULL, LAYER_TYPES, SAME, SIZES, TOKENS, logits_of

from eabf_jax.errors import InputError
from eabf_jax.interop.architectures import ARCHITECTURES
from eabf_jax.interop.huggingface import FIXED, config_from_hf, config_to_hf

ABSENT = "absent"
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 16}
# Values to try for each key that some architecture reads; several keys may share a line.
_VALUES: Mapping[str, list[Any]] = {
    "attention_bias mlp_bias attention_out_bias qkv_bias bias": [True, False, ABSENT],
    "use_sliding_window tie_word_embeddings": [True, False, ABSENT, None],
    "head_dim num_key_value_heads": [4, None, ABSENT],
    "embedding_multiplier attention_multiplier residual_multiplier logits_scaling": [2, ABSENT, None],
    "sliding_window": [3, 0, None, ABSENT],
    "max_window_layers": [0, 1, 3, None, ABSENT],
    "layer_types": [
        None, ["full_attention"] * 3, ["sliding_attention"] * 3, LAYER_TYPES[1:] + LAYER_TYPES[1:2],
        ["chunked_attention"] * 3, [],
    ],
    "sliding_window_pattern": [0, 1, 3, "LG", None, ABSENT],
    "no_rope_layers": [None, [], [1, 1, 1], [0, 1, 0], [1, 0], [True, False, True]],
    "no_rope_layer_interval": [0, 1, 2, 3, ABSENT],
    "rms_norm_eps": [0.1, ABSENT],
    "hidden_act": ["gelu", "swish", ABSENT],
    "rope_theta": [50, 2e6],
    "partial_rotary_factor": [0.5, 1.0, ABSENT],
    "original_max_position_embeddings": [8, ABSENT],
    "max_position_embeddings": [16],
    "rope_parameters": [
        {}, None, {"rope_theta": 50.0}, {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
        {"rope_type": "proportional", "rope_theta": 50.0}, {"rope_type": "axial", "rope_theta": 50.0},
        {name: {"rope_type": "default", "rope_theta": 9.0} for name in LAYER_TYPES},
        {"type": "yarn", "rope_theta": 50.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5,
         "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.2},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16, "rope_theta": 50.0},
    ],
    "rope_scaling": [
        {}, {"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}, {"type": "mrope", "factor": 2.0},
        {"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0, "beta_fast": 8, "beta_slow": 2},
        {"type": "longrope", "factor": 4.0, **LONGROPE}, {"type": "su", **LONGROPE}, {"type": "yarn", **LONGROPE},
    ],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    "decoder generator text_config": [{"hidden_size": 8}],
    "is_causal": [False, True],
    "attention_chunk_size": [4],
    "kv_sharing_modes": [["full_attention"] * 3],
    "per_layer_config": [{"1": {"sliding_window": 3}}],
    "pad_token_id bos_token_id": [5, None, ABSENT],
    "eos_token_id": [5, [2, 5], None, ABSENT],
    # Without effect in inference.
    "attention_dropout resid_pdrop embd_pdrop residual_dropout": [0.5],
    "is_encoder_decoder output_hidden_states output_attentions gradient_checkpointing": [True],
    "use_cache return_dict": [False],
    "pretraining_tp chunk_size_feed_forward num_labels vision_feature_layer": [2],
    "initializer_range": [0.5],
    "id2label": [{"0": "a"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression"],
    "dtype torch_dtype": ["bfloat16"],
    "name_or_path transformers_version vision_aspect_ratio vision_feature_select_strategy": ["4.30.0"],
    "architectures": [["X"]],
    "mtp_layer_types": [LAYER_TYPES],
}  # fmt: skip
VALUES = {key: values for keys, values in _VALUES.items() for key in keys.split()}
# Why a file may be refused that transformers reads, besides `FIXED`.
REFUSED = re.compile(r"partial_rotary_factor must be 1|rope type 'proportional'|one rotary scheme for all layers")
# Keys of released models, as their files of transformers 4 have them, with small numbers.
RELEASED: Mapping[str, dict[str, Any]] = {
    "Mistral 7B 0.1": {"model_type": "mistral", "sliding_window": 5, "rope_theta": 10000.0, "rms_norm_eps": 1e-5},
    "Mistral 7B 0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "Mistral-Nemo": {"model_type": "mistral", "sliding_window": None, "head_dim": 12, "rope_theta": 1e6},
    "Ministral 3": {"model_type": "ministral3", "sliding_window": None, "head_dim": 12, "rope_parameters": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 4.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 8, "rope_theta": 1e6, "rope_type": "yarn",
        "type": "yarn"}},
    "Qwen2.5": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 2,
                "rope_theta": 1e6, "bos_token_id": 3},
    "Qwen2.5 with its card's YaRN": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 5,
        "max_window_layers": 2, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 8, "type": "yarn"}},
    "Qwen3": {"model_type": "qwen3", "attention_bias": False, "head_dim": 12, "max_window_layers": 3,
              "rope_scaling": None, "rope_theta": 1e6, "sliding_window": None, "use_sliding_window": False},
    "Llama 3.1": {"model_type": "llama", "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                         "original_max_position_embeddings": 16}},
    "Vicuna 16k": {"model_type": "llama", "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "Llama 2 without groups": {"model_type": "llama", "num_key_value_heads": None, "head_dim": None},
    "Phi-3-mini": {"model_type": "phi3", "sliding_window": 5, "original_max_position_embeddings": 8,
                   "rope_scaling": None, "rope_theta": 10000.0, "attention_bias": False, "resid_pdrop": 0.0},
    **{f"Phi-3-mini-128k, {name}": {"model_type": "phi3", "sliding_window": 40, "original_max_position_embeddings": 8,
       "rope_scaling": {"type": name, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}}
       for name in ("longrope", "yarn")},
    "Phi-4-mini": {"model_type": "phi3", "partial_rotary_factor": 0.75, "original_max_position_embeddings": 8,
        "tie_word_embeddings": True, "sliding_window": 40,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0, 2.0, 3.0]}},
    "Phi-3 without its window": {"model_type": "phi3", "max_position_embeddings": 8192,
        "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 4, "long_factor": [2.0] * 4}},
    "Granite 3": {"model_type": "granite", "attention_bias": False, "attention_multiplier": 0.015625,
                  "embedding_multiplier": 12.0, "logits_scaling": 16.0, "residual_multiplier": 0.22,
                  "rope_scaling": None, "rope_theta": 1e7, "tie_word_embeddings": True},
    "OLMo 2": {"model_type": "olmo2", "attention_bias": False, "rope_scaling": None, "rope_theta": 500000},
    "SmolLM3": {"model_type": "smollm3", "layer_types": ["full_attention"] * 3, "no_rope_layer_interval": 4,
                "no_rope_layers": [1, 0, 1], "max_window_layers": 28, "rope_scaling": None, "rope_theta": 5e6,
                "sliding_window": None, "use_sliding_window": False},
    "Seed-OSS": {"model_type": "seed_oss", "attention_bias": True, "attention_out_bias": False, "head_dim": 12,
                 "residual_dropout": 0.1, "rope_scaling": {"rope_type": "default"}, "rope_theta": 1e7},
    "Seed-OSS, null": {"model_type": "seed_oss", "head_dim": None, "num_key_value_heads": None},
}  # fmt: skip
NEEDED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
# Not keys of a file: attributes of the class, and computed ones.
COMPUTED = {"is_heterogeneous", "sub_configs", "sub_configs_defaults", "default_rope_type", "default_theta"}
PAGE = (Path(__file__).parents[2] / "docs" / "config_json.md").read_text(encoding="utf-8")


def classes(kind: str) -> tuple[Any, Any]:
    """Returns transformers' classes of an architecture: the config's and the model's."""
    return transformers.CONFIG_MAPPING[kind], getattr(transformers, ARCHITECTURES[kind].class_name)


def logits(values: Mapping[str, Any]) -> np.ndarray | None:
    """Computes transformers' logits for a config.json, with weights that follow from their names; None if refused."""
    return logits_of_text(json.dumps(values))


@functools.cache
def logits_of_text(text: str) -> np.ndarray | None:
    values = json.loads(text)
    config_class, model_class = classes(values["model_type"])
    try:
        model = model_class(config_class.from_dict(values, attn_implementation="eager")).float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                source = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source) + (parameter.ndim == 1))
        return logits_of(model.eval(), TOKENS[:1])
    except Exception:  # of any kind: the file is not valid
        return None


def base_file(kind: str) -> dict[str, Any]:
    """Returns a config.json with every feature of an architecture."""
    return {"model_type": kind, **SIZES, "rope_theta": 500.0, **copy.deepcopy((FULL | SAME)[kind])}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of such small products wait for each other longer than they compute, if the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[*FULL, *SAME])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.document_check
def test_every_key_that_transformers_reads_is_tried_and_told(kind: str) -> None:
    """Checks the keys of the config's class, and every attribute read while the model is built and run."""
    looked_at: set[str] = set()
    config_class, model_class = classes(kind)

    class Watched(config_class):
        def __getattribute__(self, name: str) -> object:
            looked_at.add(name)
            return super().__getattribute__(name)

    values = {key: value for key, value in base_file(kind).items() if key != "model_type"}
    model = model_class(Watched(**values)).eval()
    model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.tensor([[0, 1, 1, 1]]))
    fields = {field.name for field in dataclasses.fields(config_class)}
    keys = {
        name
        for name in (looked_at | fields) - COMPUTED
        if not name.startswith(("_", "base_model_")) and not callable(getattr(config_class, name, None))
    }
    assert keys - VALUES.keys() - NEEDED == set()
    told = set(re.findall(r"`(\w+)`", PAGE))
    assert keys - told == set()
    assert {*FIXED} <= told
    rows = [
        row.split(" | ") for row in PAGE.partition("## Some architectures")[2].splitlines() if row.startswith("| `")
    ]
    own = {
        key for keys, kinds in rows if f"`{kind}`" in kinds.partition(":")[0] for key in re.findall(r"`(\w+)`", keys)
    }
    assert own - {"llama_4_scaling_beta"} == ARCHITECTURES[kind].keys


def judge(values: Mapping[str, Any], may_refuse: bool = False) -> str | None:
    """Returns what is wrong with how a file is read; None if nothing is."""
    theirs = logits(values)
    try:
        written = config_to_hf(config_from_hf(values))
    except InputError as error:
        right = theirs is None or may_refuse or REFUSED.search(str(error))
        return None if right and "\n" not in str(error) else f"refused: {error}"
    if theirs is None:  # what transformers refuses may be read
        return None
    ours = logits(written) if written["model_type"] == values["model_type"] else None
    return None if ours is not None and np.array_equal(theirs, ours) else f"read as {written}"


def test_a_key_is_followed_or_refused_or_harmless(kind: str) -> None:
    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    wrong = {}
    for key in VALUES.keys() - (set() if kind == "llama" else common):
        for value in VALUES[key]:
            values = {**base_file(kind), key: copy.deepcopy(value)}
            if value == ABSENT:
                del values[key]
            if found := judge(values, may_refuse=key in FIXED and key not in ARCHITECTURES[kind].keys):
                wrong[f"{key} {value}"] = found
    assert wrong == {}


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_are_read(name: str) -> None:
    values = {**SIZES, **RELEASED[name]}
    assert logits(values) is not None
    assert judge(values) is None
