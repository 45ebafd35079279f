"""One function that loads a model and its tokenizer from either kind of directory."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import yaml

from eabf_jax.errors import InputError
from eabf_jax.interop import huggingface, native
from eabf_jax.interop.adapter import read_adapter
from eabf_jax.interop.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama
from eabf_jax.model.parameters import nest, parameters
from eabf_jax.rope import Scheme

DTYPES = ("bfloat16", "float16", "float32")


def load(
    directory: Path | str,
    rope: Scheme | Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    base: Path | str | None = None,
) -> tuple[Llama, Tokenizer | None]:
    """Loads a model and its tokenizer.

    Args:
      directory: a Hugging Face directory or a native one (model.json), told apart by content; adapters are merged into
        the model that they belong to.
      rope: rotary scheme to use instead of the stored one, or its mapping such as `{"type": "eabf", …}`.
      dtype: of the parameters and of the computation: bfloat16, float16 or float32.
      base: where the model that adapters belong to is now; None where it was when they were trained.

    Returns:
      The model, and the tokenizer or None where the directory has none.

    Raises:
      InputError: no such directory, files that are missing, damaged or not of the config's shape, or a vocabulary
        larger than the embedding.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    element = jnp.dtype(dtype)
    config, params = load_parameters(directory, dtype=element, base=base)
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    if tokenizer is not None:
        native.check_vocabulary(tokenizer, config, directory)
    if rope is not None:
        config = dataclasses.replace(config, rope=rope if isinstance(rope, Scheme) else Scheme.from_dict(rope))
    return Llama.from_params(config, params, dtype=element, param_dtype=element), tokenizer


def split_scheme(text: str) -> tuple[str, dict[str, Any] | None, int | None]:
    """Reads `DIR[@{…}]`, as models are named on the command line.

    Args:
      text: a directory; after @, in YAML, the rotary scheme to use in place of its own, or `window`, the number of
        tokens to take for its window, or both.

    Returns:
      The directory, the scheme's mapping or None, and the window or None.

    Raises:
      InputError: what follows @ is not a mapping with a type or a window, or the window no positive number.
    """
    directory, at, told = text.partition("@")
    if not at:
        return directory, None, None
    try:
        values = yaml.safe_load(told)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict) or not {"type", "window"} & values.keys():
        raise InputError(
            f"--model: after @ a scheme such as {{type: yarn, factor: 4}}, or {{window: 512}}, is needed, not {told!r}"
        )
    window = None
    if "window" in values and (type(window := values.pop("window")) is not int or window < 1):
        raise InputError(f"--model: window is {window!r} in {told!r}; a positive number of tokens is needed")
    if values and "type" not in values:
        raise InputError(f"--model: a scheme such as {{type: yarn, factor: 4}} has a type; {told!r} has none")
    return directory, values or None, window


class Entry(NamedTuple):
    """A model to be compared with others."""

    label: str
    directory: str
    rope: dict[str, Any] | None = None  # None: the model's own scheme
    window: int | None = None  # tokens to take for its window; None: its own

    @property
    def config(self) -> LlamaConfig:
        """The model's shape, with the window that it is taken for."""
        config = read_config(self.directory)
        return config if self.window is None else dataclasses.replace(config, max_position_embeddings=self.window)


def parse_entry(text: str) -> Entry:
    """Reads `[LABEL=]DIR[@{type: ..., window: ...}]`.

    Args:
      text: from the command line.

    Returns:
      The label (the directory where none is given), the directory, and scheme and window to use in place of its own.
    Raises:
      InputError: what follows @ is not a mapping.
    """
    model, rope, window = split_scheme(text)
    label, equals, directory = model.partition("=")
    return Entry(label if equals else model, directory if equals else model, rope, window)


def read_config(directory: Path | str) -> LlamaConfig:
    """Reads a model's shape and scheme from either kind of directory.

    Args:
      directory: a Hugging Face directory or a native one.

    Returns:
      The config.

    Raises:
      InputError: no such directory, or no valid config in it.
    """
    _check_exists(directory)
    return (native.read_model_json if native.is_native(directory) else huggingface.read_config)(directory)


def load_parameters(
    directory: Path | str, dtype: Any = None, shardings: Any = None, base: Path | str | None = None
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Loads a model's config and parameters from either kind of directory, straight to their devices.

    Args:
      directory: a Hugging Face directory or a native one; adapters are merged into the model that they belong to.
      dtype: what to cast the parameters to, None to keep what is stored.
      shardings: nested dict of shardings in the parameters' structure, or of some of them, which alone are loaded then;
        or one sharding for all; None for the default device.
      base: as for `load`.

    Returns:
      The config, and the nested dict of JAX arrays.

    Raises:
      InputError: as `load`.
    """
    _check_exists(directory)
    if base is not None or (native.is_native(directory) and read_adapter(directory)):
        return _load_merged(directory, dtype, shardings, base)
    read = native.load_native if native.is_native(directory) else huggingface.load_hf
    return read(directory, dtype=dtype, shardings=shardings)


def _load_merged(
    directory: Path | str, dtype: Any, shardings: Any, base: Path | str | None
) -> tuple[LlamaConfig, dict[str, Any]]:
    """The same for a run that holds adapters alone: merged in host memory, one parameter at a time."""
    config, stored, read = huggingface.open_leaves(directory, base=base)
    places = native.sharding_by_path(shardings, config)
    leaves = {
        entry.path: jax.device_put(
            read(entry.path).astype(jnp.dtype(dtype or stored[entry.path]), copy=False), places[entry.path]
        )
        for entry in parameters(config)
        if entry.path in places
    }
    return config, nest(leaves)


def _check_exists(directory: Path | str) -> None:
    if not isinstance(directory, str | os.PathLike):
        raise InputError(f"directory is {directory!r:.80}; the path of a model's directory is needed")
    if not Path(directory).is_dir():
        raise InputError(f"{directory}: no such directory")
