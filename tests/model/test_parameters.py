"""The table of parameters, against transformers' modules and the gguf package's names."""

import dataclasses
from typing import Any

import gguf
import pytest
import torch
import transformers

from eabf_jax.fields import types_of
from eabf_jax.model import Llama, LlamaConfig
from eabf_jax.model.lora import Lora, adapters
from eabf_jax.model.parameters import (
    TABLE,
    flatten,
    nest,
    optional_fields,
    parameter_axes,
    parameter_count,
    parameters,
)

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 32,
}  # fmt: skip
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"num_key_value_heads": 4},
    {"head_dim": 4},
)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_names_shapes_and_count_are_transformers(change: dict[str, Any]) -> None:
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{"tie_word_embeddings": False, **SIZES, **change})
        )
    config = LlamaConfig(**{**SIZES, **change})
    # A tied output kernel is the embedding; transformers counts it once too.
    expected = {name: tuple(array.shape) for name, array in reference.named_parameters()}
    assert {name: entry.hf_shape for entry in parameters(config) for name in entry.hf_names()} == expected
    assert parameter_count(config) == reference.num_parameters()


@pytest.mark.parametrize("change", CHANGES[:4], ids=str)
@pytest.mark.parametrize("lora", [None, Lora(rank=3, targets=("k_proj", "down_proj"))], ids=["whole", "adapters"])
def test_the_model_has_the_parameters_of_the_table(change: dict[str, Any], lora: Lora | None) -> None:
    config = LlamaConfig(**{**SIZES, **change})
    found = {path: leaf.shape for path, leaf in flatten(Llama.abstract(config, lora=lora).parameters())}
    assert found == {entry.path: entry.shape for entry in (*parameters(config), *adapters(config, lora))}


def test_names_are_ggufs() -> None:
    config = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for entry in parameters(config):
        expected = [names.get_name(name, (".weight", ".bias")) for name in entry.hf_names()]
        assert entry.gguf_names() == expected


@pytest.mark.parametrize("change", CHANGES[:4], ids=str)
def test_fields_of_the_config_are_read_off_the_tensors(change: dict[str, Any]) -> None:
    config = LlamaConfig(**{**SIZES, **change})
    found = optional_fields([name for entry in parameters(config) for name in entry.gguf_names()])
    assert dataclasses.replace(LlamaConfig(**SIZES), **found) == config


def test_every_condition_is_a_field_of_the_config() -> None:
    conditions = {entry.only_if[0] for entry in TABLE if entry.only_if is not None}
    assert conditions <= types_of(LlamaConfig).keys()
    assert conditions >= {name for name, kind in types_of(LlamaConfig).items() if kind is bool}


def test_lines_of_the_same_parameter_have_the_same_axes_and_other_conditions() -> None:
    by_path: dict[Any, list[Any]] = {}
    for entry in TABLE:
        by_path.setdefault(entry.path, []).append(entry)
    for entries in by_path.values():
        assert len({entry.axes for entry in entries}) == 1
        assert len({entry.only_if for entry in entries}) == len(entries)


def test_axes_include_that_of_stacked_layers() -> None:
    assert parameter_axes(("lm_head", "kernel")) == ("embed", "vocab")
    assert parameter_axes(("layers", "mlp", "down_proj", "bias")) == ("layers", None)
    assert parameter_axes(("layers", "mlp", "down_proj", "lora_a")) == ("layers", "mlp", None)


def test_a_tree_is_its_paths_and_leaves() -> None:
    leaves = {("a", "b", "c"): 1, ("a", "d"): 2, ("e",): 3}
    assert nest(leaves) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert dict(flatten(nest(leaves))) == leaves
