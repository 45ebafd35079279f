"""Writes GGUF files for llama.cpp, one layer of one tensor at a time."""

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
from eabf_jax.interop.architectures import ARCHITECTURES, OWN_KEY, OWN_TYPE
from eabf_jax.interop.directory import new_file
from eabf_jax.interop.gguf import EPSILON, OWN_FEATURES, SHAPE
from eabf_jax.interop.gguf_architectures import DIMENSIONS, GGUF_ARCHITECTURES, MULTIPLIERS, GgufArchitecture
from eabf_jax.interop.gguf_file import read_gguf
from eabf_jax.interop.gguf_rope import OWN_ROPE, rotary_keys
from eabf_jax.interop.gguf_vocabulary import tokenizer_keys
from eabf_jax.interop.huggingface import Summary, open_leaves, tokenizer_directory
from eabf_jax.model.config import LlamaConfig

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
      InputError: files are missing or damaged; llama.cpp lacks a feature, the rotary scheme or the tokenizer; a value
        is too large for float16; or `dst` is in use.
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
    architecture, rotary, factors = architecture_for(config)
    keys = _model_keys(config, architecture, rotary) | tokenizer_keys(tokenizer_directory(source, base), config)
    files = []
    for tensor in architecture.tensors(config):
        stored = np.result_type(*(leaves.dtypes[part.path] for part in tensor.parts)).name
        files.append((tensor, _kind(tensor.shape, dtype or stored)))
    planned = {name: (found.shape, "float32", found.nbytes) for name, found in factors.items()}
    planned |= {
        name: (tensor.shape, kind, _nbytes(tensor.shape, kind)) for tensor, kind in files for name in tensor.names
    }
    total = sum(nbytes for _, _, nbytes in planned.values())

    def tensors() -> Iterator[np.ndarray]:
        yield from factors.values()
        for tensor, kind in files:
            for name, *own in zip(tensor.names, *map(leaves.tensors, tensor.parts), strict=True):
                rows = [
                    architecture.stored(x, part, config.head_dim) for x, part in zip(own, tensor.parts, strict=True)
                ]
                yield _stored(rows[0] if len(rows) == 1 else np.concatenate(rows), kind, name)

    widest = max(leaves.dtypes.values(), key=lambda found: found.itemsize).name
    with (
        new_file(dst, _not_ours, overwrite=overwrite, sources=[source]) as partial,
        closing(gguf.GGUFWriter(partial, architecture.name)) as writer,
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


def architecture_for(config: LlamaConfig) -> tuple[GgufArchitecture, dict[str, Any], dict[str, np.ndarray]]:
    """Finds the architecture as which llama.cpp computes a model, and the keys and tensors of the rotary scheme there.

    Raises:
      InputError: none has the model's features and its rotary scheme; the message is that of the nearest one.
    """
    first = None
    for entry in sorted(GGUF_ARCHITECTURES.values(), key=lambda entry: config.model_type not in entry.model_types):
        try:
            entry.check(config)
            return entry, *rotary_keys(config.rope, config.rotary_dim, entry)
        except InputError as error:
            first = first or error
    assert first is not None  # there are architectures
    raise first


def _model_keys(config: LlamaConfig, architecture: GgufArchitecture, rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a model."""
    keys = {name: getattr(config, field) for field, (name, _) in SHAPE.items()}
    keys |= {
        EPSILON: config.rms_norm_eps,
        "attention.value_length": config.head_dim,
        "vocab_size": config.vocab_size,
        DIMENSIONS: config.rotary_dim,
        **{key: getattr(config, field) for field, key in MULTIPLIERS.items() if key in architecture.reads},
        **rotary,
    }
    return {
        **{architecture.prefix + key: value for key, value in keys.items() if value is not None},
        OWN_FEATURES: json.dumps(ARCHITECTURES[OWN_TYPE].write(config).get(OWN_KEY, {})),
        OWN_ROPE: json.dumps(config.rope.to_dict()),
    }


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
