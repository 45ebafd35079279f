"""Merges the LoRA adapters of a PEFT directory (adapter_config.json, adapter_model.safetensors) into their base model.

The tensors of a module are `base_model.model.MODULE.lora_A.weight` [rank, in] and `….lora_B.weight` [out, rank], for an
embedding `….lora_embedding_A` and `….lora_embedding_B`. Any other tensor replaces a weight of the base model.
Source: PEFT 0.21, `LoraModel` and `check_target_module_exists`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eabf_jax.errors import InputError
from eabf_jax.fields import typed
from eabf_jax.interop.adapter import Leaves, merged, stack
from eabf_jax.interop.directory import read_json_object, refuse_pointer
from eabf_jax.interop.safetensors_stream import StoredTensor, read_header
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import Parameter, TreePath, parameters

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING, OUTPUT = "model.embed_tokens", "lm_head"

# Supported values of options that change what is merged; any other option is supported only if it is off.
SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # the others change the base model too
}
READ: Mapping[str, Any] = {
    "base_model_name_or_path": str | None,
    "r": int,
    "lora_alpha": float,
    "use_rslora": bool,
    "rank_pattern": dict | None,
    "alpha_pattern": dict | None,
    "target_modules": str | tuple[str, ...] | None,
    "exclude_modules": str | tuple[str, ...] | None,
    "modules_to_save": tuple[str, ...] | None,
    "layers_to_transform": int | tuple[int, ...] | None,
}
HARMLESS = (
    *("task_type", "revision", "inference_mode", "peft_version", "auto_mapping", "lora_dropout", "runtime_config"),
    *("layers_pattern", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # details of `init_lora_weights`
)


class _Pair(NamedTuple):
    """The adapters of one module: A [rank, in], B [out, rank], and the factor on their product."""

    first: StoredTensor
    second: StoredTensor
    scale: float

    @property
    def rank(self) -> int:
        return self.first.shape[0]


def is_peft(directory: Path | str) -> bool:
    """Returns whether a directory holds PEFT adapters."""
    return (Path(directory) / CONFIG_FILE).is_file()


def base_of(directory: Path | str) -> str:
    """Returns the base model that a PEFT directory names: a directory or a name on the Hub, empty if there is none."""
    return str(read_json_object(Path(directory) / CONFIG_FILE).get("base_model_name_or_path") or "")


def merged_peft(directory: Path | str, base: Leaves) -> Leaves:
    """Merges the LoRA adapters of a PEFT directory into their base model.

    Returns:
      The model; parameters that the adapters change are float32.

    Raises:
      InputError: an option is not supported; or the weights are missing, damaged, or do not fit the options and base.
    """
    path = Path(directory) / CONFIG_FILE
    options = _options(path)
    stored = _stored(Path(directory), base.config)
    config = _resized(base.config, stored, path)
    entries = {entry.path: entry for entry in parameters(config)}
    adapted: dict[TreePath, list[_Pair | None]] = {}
    replaced: dict[str, StoredTensor] = {}
    changed: set[TreePath] = set()
    for name, entry in entries.items():
        pairs = [_pair(hf_name.removesuffix(".weight"), entry, options, stored, path) for hf_name in entry.hf_names()]
        if any(pairs):
            adapted[name[:-1]] = pairs
            changed |= {(*name[:-1], "lora_a"), (*name[:-1], "lora_b")}
        if not stored.keys().isdisjoint(entry.hf_names()):
            replaced |= {hf_name: _take(stored, hf_name, entry.hf_shape, path) for hf_name in entry.hf_names()}
            changed.add(name)
    if stored:
        raise InputError(
            f"{path.parent}: tensor {next(iter(stored))} fits no weight of the base model ({len(stored)} such)"
        )

    def read(name: TreePath, dtype: Any, layers: slice) -> np.ndarray:
        if name in entries:
            return stack(entries[name], replaced, dtype or np.float32, layers)
        pairs = adapted[name[:-1]]
        # Layers without adapters or of a lower rank are filled with zeros, which add nothing.
        rank = max(pair.rank for pair in pairs if pair)
        entry = next(entry for path, entry in entries.items() if path[:-1] == name[:-1] and path[-1] != "bias")
        wide_in, wide_out = entry.unstacked
        first = name[-1] == "lora_a"
        leaf = np.zeros((len(pairs[layers]), *((wide_in, rank) if first else (rank, wide_out))), np.float32)
        for target, pair in zip(leaf, pairs[layers], strict=True):
            if pair and first:
                target[:, : pair.rank] = pair.first.read().T.astype(np.float32) * np.float32(pair.scale)
            elif pair:
                target[: pair.rank] = pair.second.read().T
        return leaf[0] if entry.layers is None else leaf

    return merged(config, base, changed, read)


def _options(path: Path) -> dict[str, Any]:
    """Reads adapter_config.json, and refuses options that would change the merged weights."""
    options = {"peft_type": None, **read_json_object(path)}
    for key, value in options.items():
        if not (value in SUPPORTED[key] if key in SUPPORTED else key in (*READ, *HARMLESS) or not value):
            expected = repr(SUPPORTED[key][0]) if key in SUPPORTED else "it off"
            raise InputError(
                f"{path}: {key} is {value!r:.60}, expected {expected}; merge it with PEFT's merge_and_unload() instead"
            )
    return {key: typed(READ[key], value, f"{path}: key", key) for key, value in options.items() if key in READ}


def _stored(directory: Path, config: LlamaConfig) -> dict[str, StoredTensor]:
    """Reads the header of the weights; returns tensors by name in the base model."""
    path = directory / WEIGHTS_FILE
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise InputError(
            f"{directory}: pickled weights (adapter_model.bin) are not read, because loading them can run code; if you "
            f"trust them, load them with PEFT and save them again as {WEIGHTS_FILE}"
        )
    refuse_pointer(path)
    stored = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in read_header(path).items()
    }
    ends = {name for name in stored if name.startswith((EMBEDDING, OUTPUT))}
    if config.tie_word_embeddings and ends:
        first, second = (stored.get(f"{module}.weight") for module in (EMBEDDING, OUTPUT))
        if len(ends) != 2 or first is None or second is None or first.read().tobytes() != second.read().tobytes():
            raise InputError(
                f"{path}: tensor {min(ends)} changes the embedding or the output layer, which are one weight in the "
                "base model; expected both or neither, and equal: merge it with PEFT's merge_and_unload() instead"
            )
        del stored[f"{OUTPUT}.weight"]
    return stored


def _resized(config: LlamaConfig, stored: Mapping[str, StoredTensor], path: Path) -> LlamaConfig:
    """Returns the config with the rows of a stored embedding, which may have been resized for new tokens."""
    embedding = stored.get(f"{EMBEDDING}.weight")
    rows = config.vocab_size if embedding is None else embedding.shape[0]
    if rows != config.vocab_size and not config.tie_word_embeddings and f"{OUTPUT}.weight" not in stored:
        raise InputError(
            f"{path.with_name(WEIGHTS_FILE)}: the embedding has {rows} rows, but the output layer is the base model's, "
            f"which has {config.vocab_size}; expected tensor {OUTPUT}.weight there too"
        )
    return dataclasses.replace(config, vocab_size=rows)


def _pair(
    module: str, entry: Parameter, options: Mapping[str, Any], stored: dict[str, StoredTensor], path: Path
) -> _Pair | None:
    """Takes the adapters of a module from `stored`, and checks that the options name it."""
    if len(entry.unstacked) != 2:
        return None
    names = [f"{module}.lora_{part}.weight" for part in "AB"]
    if entry.entry.leaf == "embedding":
        names = [f"{module}.lora_embedding_{part}" for part in "AB"]
    targeted = _targeted(module, options, path)
    if not targeted and stored.keys().isdisjoint(names):
        return None
    if not targeted:
        raise InputError(f"{path}: target_modules does not name {module}, but {WEIGHTS_FILE} has adapters for it")
    rank = _value("r", "rank_pattern", int, 8, module, options, path)
    alpha = _value("lora_alpha", "alpha_pattern", float, 8, module, options, path)
    if rank < 1:
        raise InputError(f"{path}: the rank of {module} is {rank}; expected a positive number")
    wide_in, wide_out = entry.unstacked
    first = _take(stored, names[0], (rank, wide_in), path)
    second = _take(stored, names[1], (wide_out, rank), path)
    return _Pair(first, second, alpha / (math.sqrt(rank) if options.get("use_rslora") else rank))


def _take(stored: dict[str, StoredTensor], name: str, shape: tuple[int, ...], path: Path) -> StoredTensor:
    """Removes and returns a tensor; refuses one that is missing or of another shape."""
    if name not in stored:
        raise InputError(f"{path.with_name(WEIGHTS_FILE)}: tensor {name} is missing; expected shape {list(shape)}")
    tensor = stored.pop(name)
    if tensor.shape != shape:
        raise InputError(f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


def _targeted(module: str, options: Mapping[str, Any], path: Path) -> bool:
    """Returns whether the options name a module as one to adapt."""

    def among(key: str) -> bool:
        names = options.get(key) or ()
        if isinstance(names, str):
            return _matches(names, module, key, path)
        return any(module == name or module.endswith(f".{name}") for name in names)

    if options.get("target_modules") == "all-linear":
        return module not in (EMBEDDING, OUTPUT)
    if among("exclude_modules") or among("modules_to_save") or not among("target_modules"):
        return False
    layers, targets = options.get("layers_to_transform"), options["target_modules"]
    if layers in (None, ()) or isinstance(targets, str) or module in targets:
        return True
    found = re.search(r"\.(\d+)\.", module)
    return found is not None and int(found[1]) in (layers if isinstance(layers, tuple) else (layers,))


def _value(
    key: str, patterns: str, kind: type, default: Any, module: str, options: Mapping[str, Any], path: Path
) -> Any:
    """Returns an option's value for a module: that of the first pattern that its name ends with, or the general one."""
    for pattern, value in (options.get(patterns) or {}).items():
        if _matches(rf"(.*\.)?({pattern})", module, patterns, path):
            return typed(kind, value, f"{path}: key", f"{patterns}.{pattern}")
    return typed(kind, options.get(key, default), f"{path}: key", key)


def _matches(pattern: str, module: str, key: str, path: Path) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as error:
        raise InputError(f"{path}: {key} has {pattern!r}, which is no regular expression: {error}") from error
