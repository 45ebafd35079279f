"""Opens models, and converts Hugging Face directories to native ones and back, bit for bit."""

import dataclasses
import functools
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eabf_jax import rope
from eabf_jax.errors import InputError
from eabf_jax.fields import check, types_of
from eabf_jax.interop import native
from eabf_jax.interop.adapter import Leaves, check_shape, merged_run, read_adapter, stack
from eabf_jax.interop.architectures import (
    ARCHITECTURES,
    FEATURES,
    OWN_TYPE,
    PARTIAL,
    architecture_of,
    rotary_keys,
    without_partial,
)
from eabf_jax.interop.directory import EXPORT, is_inside, new_directory, read_json_object, refuse_pointer, write_json
from eabf_jax.interop.model_card import model_card, write_origin
from eabf_jax.interop.peft import base_of, is_peft, merged_peft
from eabf_jax.interop.safetensors_stream import (
    INDEX_FILE,
    NAMES,
    SINGLE_FILE,
    PlannedTensor,
    StoredTensor,
    read_header,
    write_sharded,
)
from eabf_jax.interop.tokenizer import copy_tokenizer_files, export_tokenizer, has_tokenizer, load_tokenizer
from eabf_jax.model.config import LlamaConfig, check_layers
from eabf_jax.model.parameters import TABLE, Parameter, nest, parameter_axes, parameters, shapes
from eabf_jax.reading import reading
from eabf_jax.rope.exported import DATA_KEY, check_exported, exported_data

MODELING_FILE = "modeling_eabf_llama.py"
MODELING_SOURCE = Path(__file__).parent / "export" / MODELING_FILE

# Hugging Face's own default; small enough for every file system.
MAX_SHARD_BYTES = 5 * 10**9

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
EMBEDDING_NAME, TIED_NAME = "model.embed_tokens.weight", "lm_head.weight"

# Rotary tables and causal masks, which old releases stored beside the weights and which are computed here.
BUFFER = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(self_)?attn\.(masked_)?bias|position_ids)$")

# Keys that may change the logits or weights of transformers' models: a test of the supported values, and their name in
# messages. An architecture may have its own reading of a key. docs/config_json.md lists every key.
_NULL: tuple[Callable[[Any], bool], str] = (lambda value: value is None, "null")
FIXED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (lambda value: value in ("silu", "swish"), "'silu'"),
    # `quantization` is MLX's.
    **dict.fromkeys(
        ("quantization_config", "quantization"),
        (
            lambda value: value is None,
            "null: quantised weights are not read; use the model that was quantised, or `dequantize()` of transformers",
        ),
    ),
    "transformers_weights": (lambda value: value in (None, SINGLE_FILE, INDEX_FILE), f"{SINGLE_FILE!r}"),
    "is_causal": (lambda value: value is True, "true"),
    "is_encoder_decoder": (lambda value: value in (None, False), "false"),
    # transformers attends to the whole text without a cache, but only to its last tokens with one.
    "sliding_window": _NULL,
    "attention_chunk_size": _NULL,
    "layer_types": (
        lambda value: value is None or (isinstance(value, list) and set(map(str, value)) <= {"full_attention"}),
        "'full_attention' in every layer",
    ),
    "kv_sharing_modes": _NULL,
    "per_layer_config": _NULL,
    # Configs of inner models.
    **dict.fromkeys(("text_config", "decoder", "generator"), _NULL),
}

_FIELDS = {name: kind for name, kind in types_of(LlamaConfig).items() if name != "rope"}
_SHARED = [name for name in _FIELDS if name not in (*FEATURES, "model_type")]
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ROTARY = ("rope_theta", "original_max_position_embeddings", "rope_parameters")
_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}  # the other defaults are those of `LlamaConfig`
# Null means what follows from the other sizes, even if the architecture has a default for the absent key.
_COMPUTED = ("num_key_value_heads", "head_dim")
_NULL_IS_DEFAULT = (*_COMPUTED, "tie_word_embeddings", *FEATURES)


class Joined(NamedTuple):
    """A tensor of each layer: its names in the order of layers, and the parameters that it joins, one after another."""

    names: list[str]
    parts: list[Parameter]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one tensor."""
        first, *rest = self.parts[0].hf_shape
        return first + sum(part.hf_shape[0] for part in self.parts[1:]), *rest


class Summary(NamedTuple):
    """The number of tensors that a conversion wrote, and their size in bytes."""

    tensors: int
    nbytes: int


def config_from_hf(values: Mapping[str, Any]) -> LlamaConfig:
    """Converts the content of a config.json.

    Returns:
      The config, with Hugging Face's defaults for missing keys.

    Raises:
      InputError: the architecture is another one, a key is missing or of the wrong type, or a value is not supported
        (`FIXED`).
    Source: transformers, the config classes of `ARCHITECTURES`.
    """
    architecture = architecture_of(values)
    for name, (accepts, expected) in FIXED.items():
        if name in values and name not in architecture.keys and not accepts(values[name]):
            raise InputError(f"config.json: {name} is {values[name]!r:.80}, expected {expected}")
    given = {
        name: values[name]
        for name in _SHARED
        if name in values and not (values[name] is None and name in _NULL_IS_DEFAULT)
    }
    defaults = {
        name: value
        for name, value in architecture.defaults.items()
        if name in _SHARED and not (name in _COMPUTED and name in values)
    }
    fields = check(_DEFAULTS | defaults | given, _FIELDS, "config.json: key", required=_SIZES)
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("head_dim", fields["hidden_size"] // max(fields["num_attention_heads"], 1))
    check_layers(fields["num_hidden_layers"])  # before the loops over them
    features = architecture.read(values, fields["num_hidden_layers"])
    fields |= check({k: v for k, v in features.items() if v is not None}, _FIELDS, "config.json: key")
    rotary = without_partial(values) if PARTIAL in architecture.keys else values
    default = {name: value for name, value in architecture.defaults.items() if name in _ROTARY}
    rotary = default | {name: value for name, value in rotary.items() if value is not None or name not in default}
    config = LlamaConfig(**{"model_type": values["model_type"], **fields}, rope=rope.from_hf(rotary))
    if DATA_KEY in values:
        check_exported(values[DATA_KEY], config.rope, *_extent(config))
    return config


def _extent(config: LlamaConfig) -> tuple[int, int, int]:
    return config.rotary_dim, config.num_hidden_layers, config.max_position_embeddings


def config_to_hf(config: LlamaConfig, dtype: str = "float32") -> dict[str, Any]:
    """Returns the content of a config.json for transformers.

    For a scheme that transformers cannot express, `auto_map` names our model code.

    Args:
      dtype: of the stored tensors.
    """
    rotary = rotary_keys(config)
    end = config.eos_token_id
    architecture = ARCHITECTURES[config.model_type]
    identity: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": config.model_type}
    if rope.needs_remote_code(rotary):
        architecture = ARCHITECTURES[OWN_TYPE]
        rotary |= {DATA_KEY: exported_data(config.rope, *_extent(config))}
        module = Path(MODELING_FILE).stem
        identity = {
            "architectures": [architecture.class_name],
            "model_type": OWN_TYPE,
            "auto_map": {
                "AutoConfig": f"{module}.EabfLlamaConfig",
                "AutoModel": f"{module}.EabfLlamaModel",
                "AutoModelForCausalLM": f"{module}.EabfLlamaForCausalLM",
            },
        }
    if "rope_parameters" in architecture.defaults and rotary.get("rope_scaling") is None:
        rotary |= {"rope_scaling": {"rope_type": "default"}}  # null would mean the architecture's own scheme
    return {
        **identity,
        **{name: getattr(config, name) for name in _SHARED},
        **architecture.write(config),
        "hidden_act": "silu",
        "eos_token_id": list(end) if isinstance(end, tuple) else end,
        "torch_dtype": dtype,  # read by every release; `dtype` from 4.56 on
        **rotary,
    }


def as_architecture(config: LlamaConfig, model_type: str) -> LlamaConfig:
    """Returns a model as one of another architecture that computes the same without our code.

    Raises:
      InputError: an unknown architecture, or one that lacks a feature or the rotary scheme of the model.
    """
    architecture = architecture_of({"model_type": model_type})
    other = dataclasses.replace(config, model_type=model_type)
    if model_type == OWN_TYPE or rope.needs_remote_code(rotary_keys(other)):
        raise InputError(
            f"model_type {model_type!r} of transformers does not compute the rotary scheme {config.rope.name!r}; train "
            "with one that it computes (ministral3 computes eabf_stair), or export without another type"
        )
    architecture.write(other)
    return other


def write_config(directory: Path, config: LlamaConfig, dtype: str) -> None:
    """Writes config.json, and our model code if the rotary scheme needs it."""
    values = config_to_hf(config, dtype)
    write_json(directory / "config.json", values)
    if rope.needs_remote_code(values):
        shutil.copyfile(MODELING_SOURCE, directory / MODELING_FILE)


def read_config(directory: Path | str) -> LlamaConfig:
    """Reads the config.json of a directory; raises InputError as `config_from_hf` does, or if there is none."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise InputError(
            f"{directory}: neither a Hugging Face directory (config.json) nor a native one ({native.MODEL_FILE})"
            f"{other_format(Path(directory))}"
        )
    try:
        with reading(path, "not the config.json of a model that can be read"):
            return config_from_hf(read_json_object(path))
    except InputError as error:
        message = str(error)
        if str(path) in message:
            raise
        # Directories of GGUF files often have a config.json with little more than model_type.
        other = other_format(path.parent) if any(path.parent.glob("*.gguf")) else ""
        raise InputError(f"{path}: {message.removeprefix('config.json: ')}{other}") from error


def base_directory(directory: Path | str, base: Path | str | None = None) -> Path | None:
    """Finds the directory of the base model of a run's or PEFT's adapters; None for a whole model.

    Args:
      base: current directory of the base model; None for the one that the adapters name.

    Raises:
      InputError: there is no such directory, or `base` is given for a model without adapters.
    """
    run = read_adapter(directory) if native.is_native(directory) else None
    if run is None and not is_peft(directory):
        if base is not None:
            raise InputError(f"{directory} is a whole model and takes no base; leave {base} out")
        return None
    named = base or (base_of(directory) if run is None else run.base) or "a directory that they name"
    if not Path(named).is_dir() or Path(named).resolve() == Path(directory).resolve():
        script = "from_hf" if run is None else "to_hf"
        raise InputError(
            f"{directory} holds only adapters, and their base model is not in {named}: name its directory with "
            f"convert/{script}.py --base DIR or load(…, base=DIR)"
        )
    return Path(named)


def tokenizer_directory(directory: Path | str, base: Path | str | None = None) -> Path:
    """Returns the directory whose tokenizer a model has: its own, or that of its base for adapters without one."""
    return (base_directory(directory, base) if not has_tokenizer(directory) else None) or Path(directory)


def open_leaves(directory: Path | str, step: int | None = None, base: Path | str | None = None) -> Leaves:
    """Opens a model of any kind, to read its parameters one at a time.

    Args:
      directory: a Hugging Face directory, a native one, a run that holds only adapters, or PEFT's LoRA adapters.
      step: the checkpoint of a native directory or run; None for the latest.
      base: current directory of the adapters' base model; None if it has not moved since training.

    Returns:
      The model; adapters are merged into their base.

    Raises:
      InputError: files are missing, damaged or do not fit the config, or `base` is given for a model without adapters.
    """
    at = base_directory(directory, base)
    if at is not None:
        adapter = read_adapter(directory) if native.is_native(directory) else None
        below = open_leaves(at)
        return merged_peft(directory, below) if adapter is None else merged_run(directory, adapter, below, step)
    if native.is_native(directory):
        config, path = native.read_model_json(directory), native.checkpoint_path(directory, step)
        stored = native.stored_arrays(path, shapes(config))
        dtypes = {name: np.dtype(leaf.dtype) for name, leaf in stored.items()}
        return Leaves(
            config, dtypes, functools.partial(native.read_leaf, path), functools.partial(native.place_leaf, path)
        )
    return _open_hf(Path(directory))


def _open_hf(directory: Path) -> Leaves:
    config = read_config(directory)
    found = find_tensors(directory, config)
    entries = {entry.path: entry for entry in parameters(config)}
    dtypes = {name: _common([found[key] for key in entry.hf_names()]) for name, entry in entries.items()}
    return Leaves(config, dtypes, lambda name, dtype, own: stack(entries[name], found, dtype or dtypes[name], own))


def from_hf(
    src: Path | str,
    dst: Path | str,
    overwrite: bool = False,
    base: Path | str | None = None,
    pad_embeddings: bool = False,
) -> Summary:
    """Converts a Hugging Face directory to a native one, bit for bit.

    Args:
      src: directory with config.json, safetensors files and usually a tokenizer; or one with PEFT's LoRA adapters,
        which are merged into their base.
      dst: the native model directory to make; on an error, nothing is written.
      base: as for `open_leaves`.
      pad_embeddings: whether tokens without rows in the embedding and the output layer get the mean of the others;
        without it, they are refused.

    Raises:
      InputError: files are missing, damaged or do not fit the config; or `dst` is in use.
    """
    source = Path(src)
    if native.is_native(source):
        raise InputError(f"{source}: a native model directory; expected a Hugging Face one (config.json)")
    model, tokens_from = open_leaves(source, base=base), tokenizer_directory(source, base)
    if has_tokenizer(tokens_from):
        tokenizer = load_tokenizer(tokens_from)
        if pad_embeddings:
            model = _padded(model, tokenizer.vocab_size)
        native.check_vocabulary(tokenizer, model.config, tokens_from)
    with new_directory(dst, native.NATIVE, overwrite=overwrite, sources=[source, tokens_from]) as partial:
        leaves = {path: model.read(path) for path in model.dtypes}
        native.save_params(partial, nest(leaves))
        copy_tokenizer_files(tokens_from, partial)
        write_origin(source, partial)
        widest = max(model.dtypes.values(), key=lambda dtype: dtype.itemsize)
        native.write_model_json(partial, model.config, dtype=widest.name)
    count = sum(entry.layers or 1 for entry in parameters(model.config))
    return Summary(count, sum(leaf.nbytes for leaf in leaves.values()))


def _padded(model: Leaves, rows: int) -> Leaves:
    """Appends rows to the embedding and the output layer, each the mean of the stored ones, up to a number of rows."""
    before = model.config.vocab_size
    if rows <= before:
        return model

    def read(path: tuple[str, ...], dtype: Any, layers: slice) -> np.ndarray:
        leaf, axes = model.read(path, dtype, layers), parameter_axes(path)
        if "vocab" not in axes:
            return leaf
        axis = axes.index("vocab")
        shape = [rows if name == "vocab" else size for name, size in zip(axes, leaf.shape, strict=True)]
        wide = np.moveaxis(native.empty_leaf(tuple(shape), leaf.dtype), axis, 0)
        wide[:before], wide[before:] = np.moveaxis(leaf, axis, 0), leaf.mean(axis, dtype=np.float64)
        return np.moveaxis(wide, 0, axis)

    return model._replace(config=dataclasses.replace(model.config, vocab_size=rows), reader=read, restore=None)


def to_hf(
    src: Path | str,
    dst: Path | str,
    overwrite: bool = False,
    step: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: str | None = None,
    base: Path | str | None = None,
    model_type: str | None = None,
) -> Summary:
    """Exports a native directory or a run to a Hugging Face directory; holds one layer's tensor in memory at a time.

    The model card describes the scheme, the training and the evaluation, as far as the source's files do. Adapters are
    merged into their base.

    Args:
      dst: the Hugging Face directory to make.
      step, base: as for `open_leaves`.
      max_shard_bytes: largest size of a shard's data, unless a single tensor is larger.
      dtype: the dtype to cast to; None keeps the stored ones (float32 for weights that adapters change).
      model_type: another architecture that computes the same, so that transformers needs none of our code.

    Raises:
      InputError: the checkpoint is missing, damaged or does not fit the config; the other architecture does not
        compute the same; or `dst` is in use.
    """
    source = Path(src)
    if not native.is_native(source):
        raise InputError(f"{source}: no {native.MODEL_FILE} there; expected a native model directory or a run's")
    leaves = open_leaves(source, step, base)
    config = leaves.config if model_type is None else as_architecture(leaves.config, model_type)
    dtypes = {name: np.dtype(dtype or own) for name, own in leaves.dtypes.items()}
    if has_tokenizer(source):
        native.check_vocabulary(load_tokenizer(source), config, source)
    files = files_of(config)
    planned = [
        PlannedTensor(name, np.result_type(*(dtypes[entry.path] for entry in tensor.parts)), tensor.shape)
        for tensor in files
        for name in tensor.names
    ]

    def tensors() -> Iterator[np.ndarray]:
        for _, parts in files:
            for own in zip(*map(leaves.tensors, parts), strict=True):
                found = [x.astype(dtypes[entry.path], copy=False) for x, entry in zip(own, parts, strict=True)]
                yield found[0] if len(found) == 1 else np.concatenate(found)

    card = model_card(source, Path(dst).absolute().name, config, int(native.checkpoint_path(source, step).parent.name))
    with new_directory(dst, EXPORT, overwrite=overwrite, sources=[source]) as partial:
        write_sharded(partial, planned, tensors(), max_shard_bytes)
        widest = max(dtypes.values(), key=lambda dtype: dtype.itemsize)
        write_config(partial, config, widest.name)
        export_tokenizer(source, partial, config.max_position_embeddings)
        (partial / native.CARD_FILE).write_text(card, encoding="utf-8")
    return Summary(len(planned), sum(tensor.nbytes for tensor in planned))


def files_of(config: LlamaConfig) -> list[Joined]:
    """Lists the tensors of an export."""
    fused = {} if rope.needs_remote_code(rotary_keys(config)) else ARCHITECTURES[config.model_type].fused
    whole = {part: name for name, parts in fused.items() for part in parts}
    return joined(((entry, entry.path[-2], entry.hf_names()) for entry in parameters(config)), whole)


def joined(named: Iterable[tuple[Parameter, str, list[str]]], other: Mapping[str, str]) -> list[Joined]:
    """Groups the parameters that files hold as one tensor.

    Args:
      named: each parameter, its module in the names of its tensors, and these names in the order of layers.
      other: by module, the one that is named instead; parameters under one name are joined.
    """
    found: dict[str, Joined] = {}
    for entry, module, own in named:
        names = [name.replace(module, other.get(module, module)) for name in own]
        found.setdefault(names[0], Joined(names, [])).parts.append(entry)
    return [*found.values()]


def _unfused(found: Mapping[str, StoredTensor], config: LlamaConfig) -> dict[str, StoredTensor]:
    """Cuts projections that the files hold as one tensor into those of the model."""
    fused, apart = ARCHITECTURES[config.model_type].fused, {}
    shapes = {name: entry.hf_shape for entry in parameters(config) for name in entry.hf_names()}
    for name, tensor in found.items():
        module = f".{name}".split(".")[-2]
        full = f"model.{name.removeprefix('model.')}"
        parts = [full.replace(module, part) for part in fused.get(module, ())]
        if not parts or not all(part in shapes for part in parts):
            apart[name] = tensor
            continue
        check_shape(tensor, (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:]))
        offset = tensor.offset
        for part in parts:
            apart[part] = StoredTensor(part, tensor.dtype, shapes[part], tensor.path, offset)
            offset += apart[part].nbytes
    return apart


def find_tensors(directory: Path, config: LlamaConfig) -> dict[str, StoredTensor]:
    """Finds every tensor of a Hugging Face directory, and checks them against the config without reading them.

    Returns:
      Stored tensor by Hugging Face name.

    Raises:
      InputError: a shard or tensor is missing, truncated, extra or of another shape; or all weights are pickled.
    """
    expected = {name: entry for entry in parameters(config) for name in entry.hf_names()}
    found: dict[str, StoredTensor] = {}
    for stored, tensor in _unfused(_headers(directory), config).items():
        # A bare LlamaModel stores its names without the prefix; transformers adds or removes it too.
        spellings = (stored, f"model.{stored}", stored.removeprefix("model."))
        name = next((name for name in spellings if name in expected or name == TIED_NAME), stored)
        if name in found:
            raise InputError(f"{tensor.path}: tensor {name} is stored twice, once with and once without `model.`")
        found[name] = tensor
    if config.tie_word_embeddings and EMBEDDING_NAME not in found and TIED_NAME in found:
        found[EMBEDDING_NAME] = found.pop(TIED_NAME)
    for name, entry in expected.items():
        if name not in found:
            raise _missing(directory, name, entry, found)
        check_shape(found[name], entry.hf_shape)
    extra = [name for name in found if name not in expected and not BUFFER.search(name)]
    if config.tie_word_embeddings and TIED_NAME in extra:
        embedding = found[EMBEDDING_NAME]
        check_shape(found[TIED_NAME], embedding.shape)
        if found[TIED_NAME].read().tobytes() != embedding.read().tobytes():
            raise InputError(
                f"{found[TIED_NAME].path}: {TIED_NAME} differs from the embedding, but config.json says "
                "tie_word_embeddings true; expected false"
            )
        extra.remove(TIED_NAME)
    if extra:
        optional = {name: entry.only_if for entry in TABLE if entry.only_if for name in entry.of(config).hf_names()}
        field, value = optional.get(extra[0], (None, None))
        raise InputError(
            f"{found[extra[0]].path}: tensor {extra[0]} is not part of this model ({len(extra)} such); expected "
            + (f"{field} {str(value).lower()} in config.json" if field else "a LLaMA that fits its config.json")
        )
    return {name: found[name] for name in expected}


def _missing(directory: Path, name: str, entry: Parameter, found: Mapping[str, StoredTensor]) -> InputError:
    message = f"{directory}: tensor {name} is missing; expected shape {list(entry.hf_shape)}"
    if other := next((stored for stored in found if stored.endswith(f".{name}")), None):
        message += f": {other} is there, so remove the prefix {other.removesuffix(name)!r} from all names"
    elif name == TIED_NAME:
        message += (
            ": the model has no output layer; save it with AutoModelForCausalLM, or set tie_word_embeddings true in "
            "config.json if its output layer is the embedding"
        )
    return InputError(message)


def _headers(directory: Path) -> dict[str, StoredTensor]:
    """Reads the headers of all safetensors files in a directory; returns tensors by name.

    As in transformers, the index only says which files there are.
    """
    for name in ("quantize_config.json", "quant_config.json"):
        if (directory / name).is_file():
            raise InputError(f"{directory / name}: the weights are quantised; use the model that was quantised")
    if (directory / SINGLE_FILE).is_file():
        return _header(directory / SINGLE_FILE)
    index_path = directory / INDEX_FILE
    if not index_path.is_file():
        raise _no_weights(directory)
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index_path}: expected a weight_map from tensor names to file names")
    with reading(index_path, "its weight_map names no files of this directory"):
        paths = [_inside(directory, file, index_path) for file in sorted(set(weight_map.values()))]
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in _header(path).items():
            if name in found:
                raise InputError(
                    f"{tensor.path}: tensor {name} is in {found[name].path.name} too; expected it in one shard of "
                    f"{INDEX_FILE}"
                )
            found[name] = tensor
    for name, file in weight_map.items():
        # If the model needs its output layer, `find_tensors` refuses.
        if name not in found and name != TIED_NAME and not BUFFER.search(name):
            raise InputError(
                f"{directory / file}: tensor {name} is missing; {INDEX_FILE} has it in this shard: copy the shard and "
                "the index again"
            )
    return found


def _header(path: Path) -> dict[str, StoredTensor]:
    refuse_pointer(path)
    return read_header(path)


def _inside(directory: Path, file: str, index_path: Path) -> Path:
    """Returns the path of a shard in an index; refuses one outside the directory and the Hub cache's blobs."""
    path = directory / file
    if not is_inside(path, directory):
        raise InputError(f"{index_path}: names the file {file!r}, which is outside its directory; expected a file name")
    return path


def _no_weights(directory: Path) -> InputError:
    expected = f"expected {SINGLE_FILE} or {INDEX_FILE} with its shards"
    if others := sorted(directory.glob("*.safetensors")):
        if not others[0].exists():
            return InputError(f"{others[0]}: a link to {others[0].readlink()}, which is missing; download it again")
        return InputError(
            f"{others[0]} is there, but {expected}: copy the index, or rename a file that has all weights"
        )
    # The weights first: training leaves other pickled files beside them.
    pickled = [path.name for pattern in ("pytorch_model*", *PICKLED) for path in sorted(directory.glob(pattern))]
    other = other_format(directory)
    if not pickled or (other and not pickled[0].startswith("pytorch_model")):
        return InputError(f"{directory}: no weights; {expected}{other}")
    command = (
        'python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('{directory}-safetensors')\""
    )
    return InputError(
        f"{directory}: pickled weights ({pickled[0]}) are not read, because loading them can run code; "
        f"if you trust them, convert them and copy the tokenizer's files: {command}"
    )


def other_format(directory: Path) -> str:
    """Returns the end of a message: how to read what is in a place without a Hugging Face model; empty if unknown."""
    if directory.is_file():
        return ": a file; " + (
            "convert it with convert/from_gguf.py" if directory.suffix == ".gguf" else f"name {directory.parent}"
        )
    if found := sorted(directory.glob("*.gguf")):
        return f": convert the GGUF file with convert/from_gguf.py --src {found[0]}"
    if (directory / "params.json").is_file() or any(directory.glob("consolidated.*")):
        return ": these are Meta's or Mistral's own files; get the model's Hugging Face files"
    inner = sorted({*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")})
    return f": did you mean {inner[0].parent}?" if inner else ""


def _common(stored: list[StoredTensor]) -> np.dtype[Any]:
    """Returns the dtype that represents the tensors of all layers exactly."""
    dtypes = {tensor.dtype for tensor in stored}
    if len(dtypes) > 1:
        widest = np.result_type(*dtypes)
        if widest not in NAMES:
            raise InputError(f"{stored[0].path}: {stored[0].name} and other layers mix dtypes without a common one")
        return widest
    return dtypes.pop()
