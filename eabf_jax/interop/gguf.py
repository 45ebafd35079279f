"""Converts GGUF files of the LLaMA architecture to Hugging Face directories, and names what the files hold."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from eabf_jax import rope
from eabf_jax.errors import InputError, one_line
from eabf_jax.interop.directory import EXPORT, new_directory
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
from eabf_jax.interop.gguf_tokenizer import Vocabulary, read_vocabulary, write_tokenizer
from eabf_jax.interop.huggingface import MAX_SHARD_BYTES, Summary, write_config
from eabf_jax.interop.safetensors_stream import PlannedTensor, write_sharded
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import check_shapes, optional_fields, parameters
from eabf_jax.rope import Scheme, scheme
from eabf_jax.rope import logit_scale as logit_rules

ARCHITECTURE = "llama"
PREFIX = f"{ARCHITECTURE}."
DTYPES = ("float32", "bfloat16", "float16")

# Not a weight of the Hugging Face model: these factors become part of the rotary scheme.
ROTARY_FACTORS = "rope_freqs.weight"

# Window and bands of every Llama 3 release with rotary factors; GGUF stores only the factors.
LLAMA3_WINDOW, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0

Shape = dict[str, int]

# The sizes in the config: the key of each below `llama.`, and its default if the file lacks the key.
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

# The keys of the rotary scheme, below `llama.rope.`: the kind of each, and llama.cpp's default.
ROPE: Mapping[str, tuple[Kind, Any]] = {
    "freq_base": (NUMBER, 10_000.0),
    "scale_linear": (NUMBER, 0.0),
    "scaling.type": (TEXT, "linear"),
    "scaling.factor": (NUMBER, None),
    "scaling.attn_factor": (NUMBER, 1.0),
    "scaling.original_context_length": (COUNT, None),
    "scaling.yarn_beta_fast": (NUMBER, 32.0),
    "scaling.yarn_beta_slow": (NUMBER, 1.0),
    "scaling.yarn_attn_factor": (NUMBER, None),
}

_POSITIVE = Kind("a number above 0", lambda value: NUMBER.fits(value) and value > 0)

# YaRN's ramp, which llama.cpp does not read from the file for this architecture.
YARN_RAMP: Mapping[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}

# The scheme in our own terms, which `to_gguf` adds for the way back. Other programs do not read it.
OWN_ROPE = "eabf_jax.rope"

SCALING_TYPES = ("none", "linear", "yarn")

# Keys below `llama.` without effect: llama.cpp does not read them for this architecture.
HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned")


def _always(*values: Any, because: str) -> Callable[[LlamaConfig], Kind]:
    return lambda config: only(f"{values[0]!r}: {because}", *values)


def _near(value: Any, expected: float) -> bool:
    return NUMBER.fits(value) and math.isclose(value, expected, rel_tol=1e-6)


# Keys below `llama.` for which a LLaMA model allows only certain values, which may depend on its config.
FIXED: Mapping[str, Callable[[LlamaConfig], Kind]] = {
    "vocab_size": lambda config: only(f"{config.vocab_size}, the rows of token_embd.weight", config.vocab_size),
    "attention.value_length": lambda config: only(f"{config.head_dim}, the length of a key", config.head_dim),
    "attention.scale": lambda config: Kind(
        f"{config.head_dim} ** -0.5, or 0, which means the same",
        lambda value: value == 0 or _near(value, config.head_dim**-0.5),
    ),
    "attention.causal": _always(True, because="attention is causal"),
    "attention.sliding_window": lambda config: Kind(
        f"0 or at least {config.max_position_embeddings}: every token sees all earlier ones",
        lambda value: value == 0 or (COUNT.fits(value) and value >= config.max_position_embeddings),
    ),
    "attention.clamp_kqv": _always(0.0, because="nothing is clamped"),
    "attention.max_alibi_bias": _always(0.0, because="positions are only rotary"),
    "attn_logit_softcapping": _always(0.0, because="attention logits are not capped"),
    "final_logit_softcapping": _always(0.0, because="logits are not capped"),
    "rope.dimension_count": lambda config: only(f"{config.head_dim}: the whole head is rotated", config.head_dim),
    "rope.scaling.alpha": _always(0.0, because="no supported scheme has it"),
    "rope.scaling.yarn_ext_factor": lambda config: only(
        "1.0 with YaRN and 0.0 without", -1.0, float(config.rope.name == "yarn")
    ),
    "rope.scaling.yarn_log_multiplier": _always(0.0, because="no supported scheme has it"),
    "expert_count": _always(0, because="a dense model"),
    "expert_used_count": _always(0, because="a dense model"),
    "logit_scale": _always(1.0, 0.0, because="logits are not scaled"),
    "residual_scale": _always(1.0, 0.0, because="residuals are not scaled"),
    "embedding_scale": _always(1.0, 0.0, because="embeddings are not scaled"),
    "use_parallel_residual": _always(False, because="attention and MLP follow each other"),
}

KEYS = (*(key for key, _ in SHAPE.values()), EPSILON, *(f"rope.{key}" for key in ROPE), *HARMLESS, *FIXED)

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
    file = read_gguf(src)
    _check_model(file)
    vocabulary = read_vocabulary(file)
    config = config_from_gguf(file, vocabulary)
    if vocabulary is not None and len(vocabulary.pieces) > config.vocab_size:
        raise file.error(
            f"the tokenizer has {len(vocabulary.pieces)} tokens, expected at most {config.vocab_size}, the rows of "
            "token_embd.weight"
        )
    entries = parameters(config)
    element = np.dtype(jnp.dtype(dtype))
    planned = [PlannedTensor(name, element, entry.hf_shape) for entry in entries for name in entry.hf_names()]
    shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in file.tensors.items()}
    shapes.pop(ROTARY_FACTORS, None)
    expected = {name: entry.hf_shape for entry in entries for name in entry.gguf_names()}
    check_shapes(shapes, expected, str(file.path), "tensor")

    def tensors() -> Iterator[np.ndarray]:
        for entry in entries:
            for name in entry.gguf_names():
                array = dequantised(file, name).reshape(entry.hf_shape)
                rows = unpermuted(array, len(array) // config.head_dim) if entry.entry.rotated else array
                yield rows.astype(element, copy=False)

    with new_directory(dst, EXPORT, overwrite=overwrite, sources=[file.path]) as partial:
        if vocabulary is not None:
            write_tokenizer(partial, vocabulary)
        write_config(partial, config, dtype)
        write_sharded(partial, planned, tensors(), MAX_SHARD_BYTES)
    return Summary(len(planned), sum(tensor.nbytes for tensor in planned))


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's permutation, which interleaves the two halves of each head.

    Args:
      rows: [heads * head_dim, …], a q or k weight or bias as GGUF stores it.
      heads: number of its heads.

    Returns:
      The same rows, in Hugging Face's order.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes `unpermuted`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def config_from_gguf(file: GgufFile, vocabulary: Vocabulary | None) -> LlamaConfig:
    """Reads the model's shape from GGUF metadata.

    Args:
      file: a file of the LLaMA architecture.
      vocabulary: its vocabulary, for the ids of special tokens; None if the file has no tokenizer.

    Raises:
      InputError: a key is missing or unknown, or has an unsupported value.
    """
    file.refuse_unknown(PREFIX, {PREFIX + key for key in KEYS})
    shape: Shape = {}
    for field in SHAPE:
        shape[field] = _size(file, field, shape)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        found = "is missing" if embedding is None else f"has shape {embedding.shape[::-1].tolist()}"
        raise file.error(
            f"tensor token_embd.weight {found}, expected [tokens, {shape['hidden_size']}] ({len(file.tensors)} tensors)"
        )
    ids: Mapping[str, int] = {} if vocabulary is None else vocabulary.ids
    ends = () if vocabulary is None else vocabulary.ends
    sizes: dict[str, Any] = {**shape, **optional_fields(file.tensors)}
    try:
        config = LlamaConfig(
            **sizes,
            vocab_size=int(embedding.shape[1]),
            rms_norm_eps=shortest(file.value(PREFIX + EPSILON, _POSITIVE)),
            bos_token_id=ids.get("bos"),
            eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
            pad_token_id=ids.get("pad"),
            rope=_rope(file, shape["head_dim"], shape["max_position_embeddings"]),
        )
    except InputError as error:
        message = str(error)
        raise error if message.startswith(str(file.path)) else file.error(message) from error
    for key, kind in FIXED.items():
        file.value(PREFIX + key, kind(config), None)
    return config


def _check_model(file: GgufFile) -> None:
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise file.error(f"architecture is {architecture!r}, expected {ARCHITECTURE!r}")
    for key, kind in GENERAL.items():
        file.value(key, kind, None)


def _size(file: GgufFile, field: str, shape: Shape) -> int:
    """Reads a size that may depend on the earlier ones in `SHAPE`; a file may give it as one value per layer."""
    name, default = SHAPE[field]
    key = PREFIX + name
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


def rotary_keys(s: Scheme, head_dim: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """Writes a rotary scheme as llama.cpp reads it for this architecture.

    A changed base, PI and YaRN have keys. Any other scheme whose frequencies do not follow the length becomes the
    numbers by which llama.cpp divides the plain frequencies, and a factor on cos and sin.

    Returns:
      Keys below `llama.rope.` with their values, and `rope_freqs.weight`, float32 [head_dim // 2], or None without it.

    Raises:
      InputError: the scheme follows the length or has a multiplier.
    Source: llama.cpp, `llama_context` and ggml's `rope_yarn`.
    """
    for has, what in (
        (s.logit_multiplier.function is not logit_rules.none, "multiplies the attention logits"),
        (s.depends_on_length, "follows the length of the text"),
    ):
        if has:
            raise InputError(
                f"the rotary scheme {s.name!r} {what}, which llama.cpp cannot do for this architecture: export the "
                "model with convert/to_hf.py, and serve it with transformers"
            )
    written = rope.to_hf(s, head_dim, spelling="rope_parameters")
    section = {} if rope.needs_remote_code(written) else written["rope_parameters"]
    kind, base = section.get("rope_type"), written["rope_parameters"]["rope_theta"]
    keys: dict[str, Any] = {"freq_base": float(base)}
    if kind == "default":
        return keys, None
    if kind == "linear":
        return {**keys, "scaling.type": "linear", "scaling.factor": float(section["factor"])}, None
    bound = dict(s.frequencies.parameters)
    if kind == "yarn" and all(bound[name] == value for name, value in YARN_RAMP.items()):
        keys |= {"scaling.type": "yarn", "scaling.factor": float(bound["factor"])}
        keys["scaling.original_context_length"] = bound["pretrained_window"]
        own = float(s.rotation_scale()) / _yarn_magnitude(bound["factor"])
    else:
        own = float(s.rotation_scale())
    if own != 1.0:
        keys["scaling.attn_factor"] = own
    if "scaling.type" in keys:
        return keys, None
    plain = scheme("default", base=base).inverse_frequencies(head_dim)
    return keys, np.asarray(plain) / np.asarray(s.inverse_frequencies(head_dim))


def _yarn_magnitude(factor: float) -> float:
    """Returns YaRN's usual factor on cos and sin."""
    return 0.1 * math.log(max(factor, 1.0)) + 1.0


def _own_rope(file: GgufFile, told: str, head_dim: int) -> Scheme:
    """Reads the scheme that `to_gguf` noted, and compares it with the keys that llama.cpp reads."""
    try:
        found = Scheme.from_dict(json.loads(told))
        keys, factors = rotary_keys(found, head_dim)
    except ValueError as error:
        raise file.error(f"{OWN_ROPE} is {shown(told)}, expected a rotary scheme: {one_line(error)}") from error
    stored = {key: file.metadata[f"{PREFIX}rope.{key}"] for key in ROPE if f"{PREFIX}rope.{key}" in file.metadata}
    rounded = {key: float(np.float32(value)) if type(value) is float else value for key, value in keys.items()}
    there = dequantised(file, ROTARY_FACTORS).reshape(-1) if ROTARY_FACTORS in file.tensors else None
    same = factors is there if factors is None or there is None else np.allclose(factors, there, rtol=1e-6)
    if stored != rounded or not same:
        raise file.error(
            f"{OWN_ROPE} is {shown(told)}, but the keys under {PREFIX}rope. or {ROTARY_FACTORS} are of another scheme; "
            f"expected the same one: remove {OWN_ROPE} to read the others"
        )
    return found


def _rope(file: GgufFile, head_dim: int, window: int) -> Scheme:
    told = file.value(OWN_ROPE, TEXT, None)
    if told is not None:
        return _own_rope(file, told, head_dim)
    values = {key: file.value(f"{PREFIX}rope.{key}", kind, default) for key, (kind, default) in ROPE.items()}
    values |= {key: shortest(value) for key, value in values.items() if type(value) is float}
    base, kind, factor, own, whole = (
        values[key]
        for key in ("freq_base", "scaling.type", "scaling.factor", "scaling.attn_factor", "scaling.yarn_attn_factor")
    )
    if kind not in SCALING_TYPES:
        raise file.error(f"rope scaling type is {kind!r}, expected one of {', '.join(SCALING_TYPES)}")
    factor = values["scale_linear"] if factor is None else factor
    if kind == "none" or factor == 0.0:
        factor = 1.0
    if factor < 0.0:
        raise file.error(f"rope scaling factor is {factor}, expected a number above 0")
    yarn = kind == "yarn" and factor != 1.0
    # llama.cpp multiplies cos and sin by this and by attn_factor, and ignores yarn_attn_factor. Other programs store
    # there the product of both (Hugging Face's attention_factor), so one file can mean two models.
    magnitude = _yarn_magnitude(factor) if yarn else 1.0
    if whole is not None and not _near(whole, magnitude):
        raise file.error(
            f"{PREFIX}rope.scaling.yarn_attn_factor is {whole}, expected none or {magnitude:.7g}, which follows from "
            "the factor: programs disagree on the meaning of other values; set rope.scaling.attn_factor instead"
        )
    if not yarn and own != 1.0:
        raise file.error(f"{PREFIX}rope.scaling.attn_factor is {own}, expected 1.0: only YaRN scales cos and sin")
    if ROTARY_FACTORS in file.tensors:
        if factor != 1.0:
            raise file.error(f"rope scaling factor is {factor}, but there is {ROTARY_FACTORS} too; expected only one")
        return _llama3_rope(file, base, head_dim)
    if yarn:
        return scheme(
            "yarn",
            base=base,
            factor=factor,
            pretrained_window=values["scaling.original_context_length"] or window,
            beta_fast=values["scaling.yarn_beta_fast"],
            beta_slow=values["scaling.yarn_beta_slow"],
            attention_factor=None if own == 1.0 else own * magnitude,
        )
    return scheme("default", base=base) if factor == 1.0 else scheme("pi", base=base, factor=factor)


def _llama3_rope(file: GgufFile, base: float, head_dim: int) -> Scheme:
    """Finds the Llama 3 scheme that divides each frequency by the stored factor."""
    factors = dequantised(file, ROTARY_FACTORS).reshape(-1)
    found = scheme(
        "llama3",
        base=base,
        factor=shortest(factors.max()),
        low_freq_factor=LLAMA3_LOW,
        high_freq_factor=LLAMA3_HIGH,
        pretrained_window=LLAMA3_WINDOW,
    )
    plain = np.asarray(scheme("default", base=base).inverse_frequencies(head_dim))
    expected = plain / np.asarray(found.inverse_frequencies(head_dim))
    # Both are float32 quotients, so matching factors agree to a few units in the last place.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise file.error(f"{ROTARY_FACTORS} holds factors that are not Llama 3's; no supported scheme has them")
    return found
