"""Writes GGUF files of the LLaMA architecture for llama.cpp, one layer of one parameter at a time."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

from eabf_jax import __version__
from eabf_jax.errors import InputError
from eabf_jax.interop import native
from eabf_jax.interop.architectures import beyond_llama
from eabf_jax.interop.directory import new_file
from eabf_jax.interop.gguf import (
    ARCHITECTURE,
    EPSILON,
    OWN_ROPE,
    PREFIX,
    ROTARY_FACTORS,
    SHAPE,
    permuted,
    rotary_keys,
)
from eabf_jax.interop.gguf_file import read_gguf
from eabf_jax.interop.gguf_vocabulary import tokenizer_keys
from eabf_jax.interop.huggingface import Summary, open_leaves, tokenizer_directory
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import parameters

# By the name of each dtype: GGUF's type of a tensor, and of a file of mostly such tensors.
KINDS: Mapping[str, tuple[Any, Any]] = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}

# Marks a file as ours while its tensors have this size: llama-quantize keeps the key and changes the size.
MARK = "eabf_jax.tensor_bytes"


def to_gguf(
    src: Path | str,
    dst: Path | str,
    overwrite: bool = False,
    step: int | None = None,
    dtype: str | None = None,
    base: Path | str | None = None,
) -> Summary:
    """Converts a model of any kind to a GGUF file, with its tokenizer and chat templates.

    Adapters are merged into their base. Norms and biases are float32, as llama.cpp needs them.

    Args:
      src: a Hugging Face or native directory, or a run.
      dst: the .gguf file to make.
      step, base: as for `open_leaves`.
      dtype: of the matrices, a name in `KINDS`; None keeps the stored ones. With q8_0, a matrix whose rows are not
        whole blocks of 32 is float16, as in llama.cpp's converter.

    Raises:
      InputError: files are missing or damaged; llama.cpp has no such rotary scheme or tokenizer; a value is too large
        for float16; or `dst` is in use.
    Source: llama.cpp, `convert_hf_to_gguf.py`; docs/gguf.md (keys).
    """
    if dtype is not None and dtype not in KINDS:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(KINDS)}")
    source = Path(src)
    if step is not None and not native.is_native(source):
        raise InputError(f"{source}: not a native model directory or a run, so it has no step {step}; leave it out")
    leaves = open_leaves(source, step, base)
    config = leaves.config
    strange = [found.name for found in leaves.dtypes.values() if found.name not in KINDS]
    if dtype is None and strange:
        raise InputError(f"{source}: weights are {strange[0]}, which is not kept; choose --dtype {', '.join(KINDS)}")
    _check_features(config)
    keys, factors = _model_keys(config)
    keys |= tokenizer_keys(tokenizer_directory(source, base), config)
    entries = parameters(config)
    kinds = {entry.path: _kind(entry.hf_shape, dtype or leaves.dtypes[entry.path].name) for entry in entries}
    planned = {
        name: (entry.hf_shape, kinds[entry.path], _nbytes(entry.hf_shape, kinds[entry.path]))
        for entry in entries
        for name in entry.gguf_names()
    }
    if factors is not None:
        planned = {ROTARY_FACTORS: (factors.shape, "float32", factors.nbytes), **planned}
    total = sum(nbytes for _, _, nbytes in planned.values())

    def tensors() -> Iterator[np.ndarray]:
        if factors is not None:
            yield factors
        for entry in entries:
            for name, own in zip(entry.gguf_names(), leaves.tensors(entry), strict=True):
                rows = permuted(own, len(own) // config.head_dim) if entry.entry.rotated else own
                yield _stored(rows, kinds[entry.path], name)

    widest = max(leaves.dtypes.values(), key=lambda found: found.itemsize).name
    with (
        new_file(dst, _not_ours, overwrite=overwrite, sources=[source]) as partial,
        closing(gguf.GGUFWriter(partial, ARCHITECTURE)) as writer,
    ):
        _add(writer, "general.type", "model")
        _add(writer, "general.name", Path(dst).stem)
        writer.add_file_type(KINDS[dtype or widest][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_uint64(MARK, total)
        for key, value in {**keys, "eabf_jax.version": __version__}.items():
            _add(writer, key, value)
        for name, (shape, kind, nbytes) in planned.items():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=KINDS[kind][0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # Not by the writer's own method, whose errors do not say that the disk is full.
        (file,) = writer.fout
        for array in tensors():
            writer.write_padding(file, file.tell())
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
        writer.write_padding(file, file.tell())
        writer.close()  # before the file is renamed
    return Summary(len(planned), total)


def _check_features(config: LlamaConfig) -> None:
    """Refuses a model with a feature that the architecture of the file lacks."""
    for name, value in beyond_llama(config).items():
        if name != "attention_output_bias":  # which biases there are shows in the tensors
            raise InputError(
                f"GGUF files of the architecture {ARCHITECTURE!r} cannot express {name} {value!r} of this model "
                f"({config.model_type}): convert its Hugging Face directory with llama.cpp's own converter"
            )


def _model_keys(config: LlamaConfig) -> tuple[dict[str, Any], np.ndarray | None]:
    """Returns the keys of the model and its rotary scheme, and `rope_freqs.weight`, if the scheme needs it."""
    rotary, factors = rotary_keys(config.rope, config.head_dim)
    keys = {name: getattr(config, field) for field, (name, _) in SHAPE.items()}
    keys |= {
        EPSILON: config.rms_norm_eps,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.head_dim,
        **{f"rope.{key}": value for key, value in rotary.items()},
    }
    return {
        **{PREFIX + key: value for key, value in keys.items()},
        OWN_ROPE: json.dumps(config.rope.to_dict()),
    }, factors


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def _kind(shape: tuple[int, ...], dtype: str) -> str:
    """Returns the dtype in which a tensor is stored."""
    if len(shape) == 1:
        return "float32"
    return "float16" if dtype == "q8_0" and shape[-1] % _blocks("q8_0")[0] else dtype


def _blocks(dtype: str) -> tuple[int, int]:
    """Returns the number of elements and of bytes of a block."""
    return gguf.GGML_QUANT_SIZES[KINDS[dtype][0]]


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    elements, nbytes = _blocks(dtype)
    return math.prod(shape) // elements * nbytes


def _stored(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    if dtype == "q8_0":
        return gguf.quants.quantize(np.ascontiguousarray(array, np.float32), KINDS[dtype][0])
    with np.errstate(over="ignore"):  # checked below
        found = array.astype(jnp.dtype(dtype), copy=False)
    if dtype == "float16" and not np.isfinite(found).all():
        largest = np.abs(array.astype(np.float32)).max()
        raise InputError(
            f"tensor {name} holds {largest:.6g}, and float16 ends at 65,504: choose --dtype bfloat16 or float32"
        )
    return found


def _not_ours(path: Path) -> str | None:
    """Returns why a file is not one that `to_gguf` wrote, or None if it is."""
    try:
        file = read_gguf(path)
    except InputError:
        return "it is not a GGUF file that eabf-jax wrote"
    if MARK not in file.metadata:
        return f"no key {MARK} marks it as a GGUF file that eabf-jax wrote"
    if file.metadata[MARK] != sum(int(tensor.n_bytes) for tensor in file.tensors.values()):
        return "its tensors are not as eabf-jax wrote them"
    return None
