"""Loads a model and its tokenizer from a Hugging Face or a native directory."""

import dataclasses
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eabf_jax.errors import InputError
from eabf_jax.interop import huggingface, native
from eabf_jax.interop.adapter import Leaves
from eabf_jax.interop.peft import is_peft
from eabf_jax.interop.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.decoder import WeightSource
from eabf_jax.model.llama import Llama
from eabf_jax.model.parameters import flatten, nest, parameters
from eabf_jax.parallel.rules import llama_on, parameter_shardings
from eabf_jax.reading import parse_yaml
from eabf_jax.rope import Scheme

DTYPES = ("bfloat16", "float16", "float32")


def load(
    directory: Path | str,
    rope: Scheme | Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    base: Path | str | None = None,
) -> tuple[Llama, Tokenizer | None]:
    """Loads a model and its tokenizer, each parameter from disk straight to its devices.

    Args:
      directory: a Hugging Face directory, or a native one (with model.json); adapters are merged into their base.
      rope: rotary scheme to use instead of the stored one, or its mapping, such as `{"type": "eabf", …}`.
      dtype: of the parameters and of the computation: bfloat16, float16 or float32.
      mesh: devices to run on: `fsdp` and `tensor` split the model, `data` and `fsdp` split rows; None for the default
        device.
      base: current directory of the adapters' base model; None if it has not moved since training.

    Returns:
      The model and its tokenizer; None if the directory has no tokenizer.

    Raises:
      InputError: there is no such directory; files are missing, damaged or do not fit the config; the vocabulary is
        larger than the embedding; or the mesh does not divide the model.
    """
    leaves, tokenizer, element = _open(directory, rope, dtype, base)
    if mesh is None:
        model = Llama.abstract(leaves.config, dtype=element, param_dtype=element)
        return model.with_parameters(_placed(leaves, element, None)), tokenizer
    if mesh.shape["context"] > 1:
        raise InputError(f"mesh context={mesh.shape['context']}: only training splits rows; use data, fsdp and tensor")
    model = llama_on(mesh, leaves.config, dtype=element, param_dtype=element)
    shardings = parameter_shardings(mesh, model.parameters())
    return model.with_parameters(_placed(leaves, element, shardings)), tokenizer


def open_weights(
    directory: Path | str,
    rope: Scheme | Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    base: Path | str | None = None,
) -> tuple[WeightSource, Tokenizer | None]:
    """Opens a model, to read its weights one layer of one parameter at a time.

    Args:
      directory, rope, dtype, base: as for `load`.

    Returns:
      A source of the weights, which holds one layer in host memory at a time, and the tokenizer or None.

    Raises:
      InputError: as for `load`.
    """
    leaves, tokenizer, element = _open(directory, rope, dtype, base)

    def read(path: tuple[str, ...]) -> Any:
        return (leaves.by_layer if path[0] == "layers" else leaves.read)(path, element)

    return WeightSource(leaves.config, element, read), tokenizer


def _open(
    directory: Path | str, rope: Scheme | Mapping[str, Any] | None, dtype: str, base: Path | str | None
) -> tuple[Leaves, Tokenizer | None, jnp.dtype]:
    """Opens a model with the requested scheme; returns it with its tokenizer and the dtype."""
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    _check_exists(directory)
    leaves = huggingface.open_leaves(directory, base=base)
    tokens_from = huggingface.tokenizer_directory(directory, base)
    tokenizer = load_tokenizer(tokens_from) if has_tokenizer(tokens_from) else None
    if tokenizer is not None:
        native.check_vocabulary(tokenizer, leaves.config, tokens_from)
    if rope is not None:
        scheme = rope if isinstance(rope, Scheme) else Scheme.from_dict(rope)
        leaves = leaves._replace(config=dataclasses.replace(leaves.config, rope=scheme))
    return leaves, tokenizer, jnp.dtype(dtype)


def split_scheme(text: str) -> tuple[str, dict[str, Any] | None, int | None]:
    """Parses `DIR[@{…}]`, the command line's name for a model.

    Args:
      text: a directory, optionally followed by @ and a YAML mapping: the rotary scheme to use instead of the stored
        one, and `window`, the context window to assume, in tokens.

    Returns:
      The directory, the scheme's mapping or None, and the window or None.

    Raises:
      InputError: the text after @ is not a mapping with a type or a window, or the window is not a positive integer.
    """
    directory, at, told = text.partition("@")
    if not at:
        return directory, None, None
    values = None
    with suppress(InputError):
        values = parse_yaml(told, "--model")
    if not isinstance(values, dict) or not {"type", "window"} & values.keys():
        raise InputError(
            f"--model: expected a scheme such as {{type: yarn, factor: 4}}, or {{window: 512}}, after @, not {told!r}"
        )
    window = None
    if "window" in values and (type(window := values.pop("window")) is not int or window < 1):
        raise InputError(f"--model: window is {window!r} in {told!r}; a positive number of tokens is needed")
    if values and "type" not in values:
        raise InputError(f"--model: {told!r} has no type; a scheme needs one, as in {{type: yarn, factor: 4}}")
    return directory, values or None, window


class Entry(NamedTuple):
    """A model to compare with others."""

    label: str
    directory: str
    rope: dict[str, Any] | None = None  # None for the stored scheme
    window: int | None = None  # the context window to assume, in tokens; None for the stored one

    @property
    def config(self) -> LlamaConfig:
        """The model's config, with the assumed window."""
        config = read_config(self.directory)
        return config if self.window is None else dataclasses.replace(config, max_position_embeddings=self.window)


def parse_entry(text: str) -> Entry:
    """Parses `[LABEL=]DIR[@{type: ..., window: ...}]`; without a label, the directory is the label.

    Raises:
      InputError: as for `split_scheme`.
    """
    model, rope, window = split_scheme(text)
    label, equals, directory = model.partition("=")
    return Entry(label if equals else model, directory if equals else model, rope, window)


def read_config(directory: Path | str) -> LlamaConfig:
    """Reads a model's shape and scheme from a Hugging Face or a native directory.

    Raises:
      InputError: there is no such directory, or it has no valid config.
    """
    _check_exists(directory)
    if is_peft(directory):
        return huggingface.open_leaves(directory).config
    return (native.read_model_json if native.is_native(directory) else huggingface.read_config)(directory)


def load_parameters(
    directory: Path | str, dtype: Any = None, shardings: Any = None, base: Path | str | None = None
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Loads a model's config and its parameters (nested JAX arrays), each from disk straight to its devices.

    Args:
      directory, base: as for `load`.
      dtype: the dtype to cast to; None keeps the stored ones.
      shardings: one sharding for all parameters, or a nested dict of them (only the parameters in it are loaded); None
        for the default device.

    Raises:
      InputError: as for `load`.
    """
    _check_exists(directory)
    leaves = huggingface.open_leaves(directory, base=base)
    return leaves.config, _placed(leaves, dtype, shardings)


def _placed(leaves: Leaves, dtype: Any, shardings: Any) -> dict[str, Any]:
    """Places parameters on their devices, one at a time; see `load_parameters`."""
    if isinstance(shardings, Mapping):
        places = dict(flatten(shardings))
    else:
        one = shardings or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = {entry.path: one for entry in parameters(leaves.config)}
    return nest({path: leaves.place(path, dtype, places[path]) for path in places})


def _check_exists(directory: Path | str) -> None:
    if not isinstance(directory, str | os.PathLike):
        raise InputError(f"directory is {directory!r:.80}; the path of a model's directory is needed")
    if not Path(directory).is_dir():
        raise InputError(f"{directory}: no such directory{huggingface.other_format(Path(directory))}")
