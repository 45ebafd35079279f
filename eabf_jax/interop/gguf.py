"""Converts GGUF files to Hugging Face directories, and names what the files hold."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from eabf_jax import rope
from eabf_jax.errors import InputError, one_line
from eabf_jax.interop.architectures import ARCHITECTURES, OWN_KEY, OWN_TYPE, PARTIAL, rotary_keys
from eabf_jax.interop.directory import EXPORT, new_directory
from eabf_jax.interop.gguf_architectures import (
    DIMENSIONS,
    GGUF_ARCHITECTURES,
    LOG_MULTIPLIER,
    MULTIPLIERS,
    WINDOW,
    GgufArchitecture,
)
from eabf_jax.interop.gguf_file import (
    COUNT,
    NUMBER,
    TEXT,
    GgufFile,
    Kind,
    dequantised,
    only,
    read_gguf,
    shortest,
    shown,
)
from eabf_jax.interop.gguf_rope import ROPE, near, read_rope
from eabf_jax.interop.gguf_tokenizer import Vocabulary, read_vocabulary, write_tokenizer
from eabf_jax.interop.huggingface import MAX_SHARD_BYTES, Summary, as_architecture, files_of, write_config
from eabf_jax.interop.safetensors_stream import PlannedTensor, write_sharded
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import Parameter, check_shapes, optional_fields
from eabf_jax.reading import parse_json, reading
from eabf_jax.rope import frequencies as frequency_rules

DTYPES = ("float32", "bfloat16", "float16")

Shape = dict[str, int]

# The sizes in the config: the key of each below the prefix of the architecture, and its default if it is absent.
SHAPE: Mapping[str, tuple[str, Callable[[Shape], int] | None]] = {
    "num_hidden_layers": ("block_count", None),
    "max_position_embeddings": ("context_length", None),
    "hidden_size": ("embedding_length", None),
    "intermediate_size": ("feed_forward_length", None),
    "num_attention_heads": ("attention.head_count", None),
    "num_key_value_heads": ("attention.head_count_kv", lambda shape: shape["num_attention_heads"]),
    "head_dim": ("attention.key_length", lambda shape: shape["hidden_size"] // shape["num_attention_heads"]),
}
EPSILON = "attention.layer_norm_rms_epsilon"

_POSITIVE = Kind("a number above 0", lambda value: NUMBER.fits(value) and value > 0)

# The features in our own terms, which `to_gguf` adds for the way back. Other programs do not read them.
OWN_FEATURES = "eabf_jax.features"

# Keys below the prefix without effect.
HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned")


def _always(*values: Any, because: str) -> Callable[[LlamaConfig], Kind]:
    return lambda config: only(f"{values[0]!r}: {because}", *values)


# Keys below the prefix with only certain supported values, which may depend on the config, in all architectures whose
# entry does not say otherwise.
FIXED: Mapping[str, Callable[[LlamaConfig], Kind]] = {
    "vocab_size": lambda config: only(f"{config.vocab_size}, the rows of token_embd.weight", config.vocab_size),
    "attention.value_length": lambda config: only(f"{config.head_dim}, the length of a key", config.head_dim),
    "attention.scale": lambda config: Kind(
        f"{config.head_dim} ** -0.5, or 0, which means the same",
        lambda value: value == 0 or near(value, config.head_dim**-0.5),
    ),
    "attention.causal": _always(True, because="attention is causal"),
    WINDOW: lambda config: Kind(
        f"0 or at least {config.max_position_embeddings}: llama.cpp lets every token see all earlier ones; for a model "
        "with a shorter window, convert its Hugging Face files",
        lambda value: value == 0 or (COUNT.fits(value) and value >= config.max_position_embeddings),
    ),
    "attention.clamp_kqv": _always(0.0, because="nothing is clamped"),
    "attention.max_alibi_bias": _always(0.0, because="positions are only rotary"),
    "attn_logit_softcapping": _always(0.0, because="attention logits are not capped"),
    "final_logit_softcapping": _always(0.0, because="logits are not capped"),
    DIMENSIONS: lambda config: only(f"{config.head_dim}: the whole head is rotated", config.head_dim),
    "rope.scaling.alpha": _always(0.0, because="no supported scheme has it"),
    "rope.scaling.yarn_ext_factor": lambda config: only(
        "1.0 with YaRN and 0.0 without", -1.0, float(config.rope.frequencies.function is frequency_rules.yarn)
    ),
    LOG_MULTIPLIER: _always(0.0, because="no supported scheme has it"),
    "expert_count": _always(0, because="a dense model"),
    "expert_used_count": _always(0, because="a dense model"),
    "logit_scale": _always(1.0, 0.0, because="logits are not scaled"),
    "residual_scale": _always(1.0, 0.0, because="residuals are not scaled"),
    "embedding_scale": _always(1.0, 0.0, because="embeddings are not scaled"),
    "use_parallel_residual": _always(False, because="attention and MLP follow each other"),
}

KEYS = (*(key for key, _ in SHAPE.values()), EPSILON, *ROPE, *HARMLESS, *FIXED)

# The same for keys of all architectures.
GENERAL: Mapping[str, Kind] = {
    "general.type": only("'model': adapters and projectors are not complete models", "model"),
    "general.quantization_version": only("2: earlier versions have other block layouts", 2),
}


def from_gguf(src: Path | str, dst: Path | str, dtype: str = "float32", overwrite: bool = False) -> Summary:
    """Converts a GGUF file to a Hugging Face directory: weights, config, tokenizer, chat template.

    Args:
      src: the .gguf file, or any part of a split one.
      dst: the Hugging Face directory to make.
      dtype: of the stored weights: float32, bfloat16 or float16.

    Raises:
      InputError: the file is incomplete or of another architecture; its metadata, quantisation or tokenizer is unknown;
        or tensors are missing, extra or of another shape.
    Source: llama.cpp, `convert_hf_to_gguf.py` (names, permutation of q and k); docs/gguf.md (keys).
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    with reading(src, "not the GGUF file of a model that can be read"):
        file = read_gguf(src)
        architecture = architecture_of(file)
        vocabulary = read_vocabulary(file)
        config = config_from_gguf(file, vocabulary)
    if vocabulary is not None and len(vocabulary.pieces) > config.vocab_size:
        raise file.error(
            f"the tokenizer has {len(vocabulary.pieces)} tokens, expected at most {config.vocab_size}, the rows of "
            "token_embd.weight"
        )
    sources = architecture.tensors(config)
    shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in file.tensors.items()}
    expected: dict[str, tuple[int, ...]] = {
        name: (config.rotary_dim // 2,) for name in architecture.factors if name in shapes
    }
    expected |= {name: source.shape for source in sources for name in source.names}
    check_shapes(shapes, expected, str(file.path), "tensor")
    element, files = np.dtype(jnp.dtype(dtype)), files_of(config)
    planned = [PlannedTensor(name, element, written.shape) for written in files for name in written.names]
    places = {part.path: (source, place) for source in sources for place, part in enumerate(source.parts)}
    read = functools.lru_cache(maxsize=1)(functools.partial(dequantised, file))

    def rows(part: Parameter, layer: int) -> np.ndarray:
        source, place = places[part.path]
        begin = sum(before.hf_shape[0] for before in source.parts[:place])
        array = read(source.names[layer]).reshape(source.shape)[begin : begin + part.hf_shape[0]]
        return architecture.restored(array, part, config.head_dim).astype(element, copy=False)

    def tensors() -> Iterator[np.ndarray]:
        for written in files:
            for layer in range(len(written.names)):
                parts = [rows(part, layer) for part in written.parts]
                yield parts[0] if len(parts) == 1 else np.concatenate(parts)

    with new_directory(dst, EXPORT, overwrite=overwrite, sources=[file.path]) as partial:
        if vocabulary is not None:
            with reading(file.path, "its vocabulary does not form a tokenizer"):
                write_tokenizer(partial, vocabulary)
        write_config(partial, config, dtype)
        write_sharded(partial, planned, tensors(), MAX_SHARD_BYTES)
    return Summary(len(planned), sum(tensor.nbytes for tensor in planned))


def architecture_of(file: GgufFile) -> GgufArchitecture:
    """Returns the architecture of a file, which holds a complete model.

    Raises:
      InputError: another architecture, an adapter, or quantisation of another version.
    """
    name = file.metadata.get("general.architecture")
    architecture = GGUF_ARCHITECTURES.get(str(name))
    if architecture is None:
        raise file.error(f"architecture is {name!r}, expected one of {', '.join(GGUF_ARCHITECTURES)}")
    for key, kind in GENERAL.items():
        file.value(key, kind, None)
    return architecture


def config_from_gguf(file: GgufFile, vocabulary: Vocabulary | None) -> LlamaConfig:
    """Reads the model's shape from GGUF metadata.

    Args:
      file: a file of one of `GGUF_ARCHITECTURES`.
      vocabulary: its vocabulary, for the ids of special tokens; None if the file has no tokenizer.

    Raises:
      InputError: a key is missing or unknown, or has an unsupported value; or llama.cpp would not compute the model.
    """
    architecture = architecture_of(file)
    prefix = architecture.prefix
    file.refuse_unknown(prefix, {prefix + key for key in (*KEYS, *architecture.reads, *architecture.fixed)})
    shape: Shape = {}
    for field in SHAPE:
        shape[field] = _size(file, prefix, field, shape)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "is missing" if embedding is None else f"has shape {embedding.shape[::-1].tolist()}"
        raise file.error(
            f"tensor token_embd.weight {found}, expected [tokens, {shape['hidden_size']}] ({len(file.tensors)} tensors)"
        )
    ids: Mapping[str, int] = {} if vocabulary is None else vocabulary.ids
    ends = () if vocabulary is None else vocabulary.ends
    fields: dict[str, Any] = {**shape, **optional_fields(file.tensors)}
    fields |= architecture.fields(shape["num_hidden_layers"]) | _keyed(file, architecture, shape["head_dim"])
    rotary_dim = int(shape["head_dim"] * fields.get(PARTIAL, 1.0))
    try:
        config = LlamaConfig(
            **fields,
            vocab_size=int(embedding.shape[1]),
            rms_norm_eps=shortest(file.value(prefix + EPSILON, _POSITIVE)),
            bos_token_id=ids.get("bos"),
            eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
            pad_token_id=ids.get("pad"),
            rope=read_rope(file, architecture, rotary_dim, shape["max_position_embeddings"]),
        )
        for key, one in FIXED.items():
            if key not in (*architecture.reads, *architecture.fixed):
                file.value(prefix + key, one(config), None)
        for key, kind in architecture.fixed.items():
            file.value(prefix + key, kind, None)
        config = _named(file, architecture, config)
        architecture.check(config)
    except InputError as error:
        message = str(error)
        raise error if message.startswith(str(file.path)) else file.error(message) from error
    return config


def _keyed(file: GgufFile, architecture: GgufArchitecture, head_dim: int) -> dict[str, Any]:
    """Reads the features that are keys."""
    found: dict[str, Any] = {}
    if DIMENSIONS in architecture.reads:
        found[PARTIAL] = file.value(architecture.prefix + DIMENSIONS, COUNT, head_dim) / head_dim
    for field, key in MULTIPLIERS.items():
        if key in architecture.reads:
            # llama.cpp divides by the last one, but takes 0 or none for the default of the others.
            known = (_POSITIVE,) if key == "logit_scale" else (NUMBER, 0.0)
            value = file.value(architecture.prefix + key, *known)
            found |= {field: shortest(value)} if value else {}
    return found


def _named(file: GgufFile, architecture: GgufArchitecture, config: LlamaConfig) -> LlamaConfig:
    """Returns the model with transformers' name for its architecture, and with the features that `to_gguf` noted."""
    told = file.value(OWN_FEATURES, TEXT, None)
    if told is None:
        kinds = [*architecture.model_types, *(kind for kind in ARCHITECTURES if kind != OWN_TYPE)]
        for kind in kinds:
            with suppress(InputError):
                return as_architecture(config, kind)
        # Our own code has every feature.
        models = [dataclasses.replace(config, model_type=kind) for kind in kinds]
        return next((model for model in models if rope.needs_remote_code(rotary_keys(model))), models[0])
    try:
        noted = ARCHITECTURES[OWN_TYPE].read({OWN_KEY: parse_json(told, OWN_FEATURES)}, config.num_hidden_layers)
        found = dataclasses.replace(config, **noted)
    except ValueError as error:
        raise file.error(f"{OWN_FEATURES} is {shown(told)}, expected features: {one_line(error)}") from error
    # llama.cpp has no windows, and of the part that is rotated, the files say the number of dimensions.
    unsaid = {"model_type", "sliding_window", "full_attention_layers", PARTIAL}
    for name in (*({*noted} - unsaid), "rotary_dim"):
        own, there = getattr(found, name), getattr(config, name)
        if own != there and not (isinstance(there, float) and near(own, there)):
            raise file.error(
                f"{OWN_FEATURES} has {name} {own!r}, but the keys and tensors {there!r}; expected the same: remove "
                f"{OWN_FEATURES} to read the others"
            )
    return found


def _size(file: GgufFile, prefix: str, field: str, shape: Shape) -> int:
    """Reads a size that may depend on the earlier ones in `SHAPE`; a file may give it as one value per layer."""
    name, default = SHAPE[field]
    key = prefix + name
    found = file.metadata.get(key)
    if found is None and default is not None:
        return default(shape)
    if isinstance(found, list):
        layers = shape.get("num_hidden_layers")
        same = Kind(
            f"one whole number above 0, the same for all {layers} layers",
            lambda value: len(value) == layers and len(set(value)) == 1 and COUNT.fits(value[0]),
        )
        return int(file.value(key, same)[0])
    count = int(file.value(key, COUNT))
    # Otherwise the names of all tensors would be made before the first is found missing.
    if field == "num_hidden_layers" and file.tensors and count > len(file.tensors):
        raise file.error(f"{key} is {count}, expected at most {len(file.tensors)}, the number of tensors")
    return count
