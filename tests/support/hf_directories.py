"""Directories of random LLaMAs as transformers writes them, and checks on them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import eabf_jax
from eabf_jax.errors import InputError
from eabf_jax.interop.huggingface import from_hf

SIZES = {
    "vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def make(directory: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **settings: object) -> Path:
    """Saves a random LLaMA with transformers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **settings})
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Reads every tensor of a directory with the safetensors library."""
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and value.shape == right[name].shape, name
        assert as_bytes(value) == as_bytes(right[name]), name


def as_bytes(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        values = tensors(directory)
        for path in directory.glob("model*"):
            path.unlink()
        change(values)
        save_file(values, directory / "model.safetensors")

    return edit


def shard(directory: Path, number: int = 1) -> Path:
    return sorted(directory.glob("*.safetensors"))[number]


def assert_refused(good: Path, directory: Path, spoil: Callable[[Path], object], message: str) -> None:
    """Asserts that converting a damaged copy writes nothing and gives a one-line error."""
    source = directory / "in" / "hf"
    shutil.copytree(good, source)
    spoil(source)
    (directory / "out").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        from_hf(source, directory / "out" / "native")
    assert "\n" not in str(caught.value)
    assert list((directory / "out").iterdir()) == []
    with pytest.raises(InputError, match=message):
        eabf_jax.load(source)
