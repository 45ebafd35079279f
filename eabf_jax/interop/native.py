"""The native model directory: model.json, the tokenizer's files, and Orbax checkpoints of the parameters.

model.json                  config and rotary scheme; `adapter` if the directory holds only adapters
tokenizer.json, …           as in a Hugging Face directory
README.md                   converted models: front matter with the known licence and origin
checkpoints/<step>/params   written by the trainer; a converted model is a run at step 0 with only parameters; its
                            `checksums.json` is compared with the files when the model is opened
config.yaml, dataset.json   runs: the configuration, and the dataset's metadata
metrics.jsonl               runs: one object per step
evaluation/*.json           optional reports of `eabf evaluate --json`, for the model card
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from eabf_jax.checksums import check, write_checksums
from eabf_jax.destination import Mark
from eabf_jax.errors import InputError, one_line
from eabf_jax.interop.directory import read_json_object, write_json
from eabf_jax.interop.tokenizer import TOKENIZER_FILES, Tokenizer
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import check_shapes, flatten, nest
from eabf_jax.reading import prefixed, reading

MODEL_FILE = "model.json"
ADAPTER = "adapter"  # the key in model.json that describes adapters; see adapter.py
CHECKPOINTS = "checkpoints"
CONFIG_FILE, DATASET_FILE, METRICS_FILE, EVALUATION = "config.yaml", "dataset.json", "metrics.jsonl", "evaluation"
CARD_FILE, TENSORBOARD = "README.md", "tensorboard"
_ENTRIES = (CARD_FILE, CHECKPOINTS, CONFIG_FILE, DATASET_FILE, METRICS_FILE, EVALUATION, TENSORBOARD, *TOKENIZER_FILES)
NATIVE = Mark("a native model directory", MODEL_FILE, ("hidden_size", "rope"), _ENTRIES)

# Small chunks keep compression buffers small, and let each process read only the parts it holds.
CHUNK_BYTES = 64 * 2**20


def is_native(directory: Path | str) -> bool:
    """Returns whether a directory is a native model directory."""
    return (Path(directory) / MODEL_FILE).is_file()


def write_model_json(
    directory: Path | str, config: LlamaConfig, dtype: str = "float32", adapter: Mapping[str, Any] | None = None
) -> None:
    """Writes model.json.

    Args:
      dtype: of the stored parameters, for human readers; loading takes it from the checkpoint.
      adapter: `Adapter.to_json()`, for a directory that holds only adapters.
    """
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["rope"] = config.rope.to_dict()
    if isinstance(config.eos_token_id, tuple):
        fields["eos_token_id"] = list(config.eos_token_id)
    write_json(Path(directory) / MODEL_FILE, {**fields, "dtype": dtype, **({ADAPTER: adapter} if adapter else {})})


def read_model_json(directory: Path | str) -> LlamaConfig:
    """Reads model.json.

    Raises:
      InputError: the file is missing, or fields are missing, unknown or of the wrong type.
    """
    path = Path(directory) / MODEL_FILE
    found = read_json_object(path)
    found.pop("dtype", None)
    found.pop(ADAPTER, None)
    try:
        with reading(path, "not the description of a model"):
            return LlamaConfig.from_fields({"rope": None, **found})
    except InputError as error:
        raise prefixed(path, error) from error


def save_params(directory: Path | str, params: Mapping[str, Any], step: int = 0) -> None:
    """Saves parameters as the `params` item of a step's checkpoint, and returns once they are on disk.

    Args:
      params: nested mapping of NumPy or JAX arrays, written in their own dtypes.
    """
    leaves = {name: _resident(leaf) for name, leaf in flatten(params)}
    # Orbax refuses a leaf larger than its limit, and holds up to the limit beside the model itself.
    largest = max(leaf.nbytes for leaf in leaves.values())
    handler = _Params(save_concurrent_gb=1 + largest // 10**9)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    path = (Path(directory) / CHECKPOINTS).absolute()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("params", ocp.args.PyTreeSave, handler)
    with quiet_orbax(), ocp.CheckpointManager(path, options=options, handler_registry=registry) as manager:
        item = ocp.args.PyTreeSave(nest(leaves), save_args=chunks(params), ocdbt_target_data_file_size=CHUNK_BYTES)
        manager.save(step, args=ocp.args.Composite(params=item))


class Checksummed(ocp.handlers.CheckpointHandler):
    """Adds checksums to an Orbax handler that it is mixed into, when all processes have written their files."""

    def finalize(self, directory: Any) -> None:
        """Completes an item's files; Orbax gives the folder its final name afterwards."""
        super().finalize(directory)
        if jax.process_index() == 0:
            write_checksums(Path(directory))


class _Params(Checksummed, ocp.PyTreeCheckpointHandler):
    pass


def chunks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how Orbax divides nested arrays: no chunk spans two layers, so that a layer can be read alone."""
    axes = {name: (0,) if name[0] == "layers" else () for name, _ in flatten(params)}
    return nest({name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=axes[name]) for name in axes})


def empty_leaf(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Makes an uninitialised array that JAX on CPU can use without a copy: JAX requires alignment to 64 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _resident(leaf: Any) -> jax.Array:
    """Returns the leaf as a JAX array, because Orbax would copy a NumPy array and so hold the model twice."""
    if isinstance(leaf, jax.Array):
        return leaf
    with jax.enable_x64(True):  # without it float64 would silently become float32
        return jax.device_put(leaf, jax.local_devices(backend="cpu")[0])


def checkpoint_path(directory: Path | str, step: int | None = None) -> Path:
    """Finds the folder of a step's `params` item; None means the latest step.

    Raises:
      InputError: there is no checkpoint, or none of that step.
    """
    root = (Path(directory) / CHECKPOINTS).absolute()
    found = steps(root)
    if not found:
        raise InputError(f"{root}: no checkpoint there; expected <step>/params")
    if step is not None and step not in found:
        raise InputError(f"{root}: no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    return root / str(found[-1] if step is None else step) / "params"


def steps(root: Path) -> list[int]:
    """Lists the steps of the checkpoints in a `checkpoints/` folder in ascending order; empty without such a folder."""
    found = root.iterdir() if root.is_dir() else ()
    return sorted(int(entry.name) for entry in found if entry.name.isdecimal() and (entry / "params").is_dir())


def stored_arrays(
    path: Path, expected: Mapping[tuple[str, ...], tuple[int, ...]]
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Verifies a checkpoint's files, reads its parameters' shapes and dtypes by path of keys, and checks the shapes.

    Each process compares its share of the files with their checksums; checkpoints of earlier releases have none.

    Args:
      path: folder of the `params` item.
      expected: shape by path of keys.

    Raises:
      InputError: there is no readable checkpoint, or its parameters do not fit.
    """
    verify(path)
    with _reading(path), ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise ValueError("its metadata cannot be read")
        tree = metadata.tree
    found = {name: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) for name, leaf in flatten(tree)}
    check_shapes({name: leaf.shape for name, leaf in found.items()}, expected, str(path))
    return found


def verify(path: Path) -> None:
    """Raises InputError, which names the files and says what can be done, if a checkpoint's item is damaged.

    Args:
      path: folder of the `params` item.
    """
    checked = check(path, jax.process_index(), jax.process_count())
    if checked is None or not checked.faults:
        return
    step, more = path.parent, len(checked.faults) - 1
    earlier = [other for other in steps(step.parent) if other < int(step.name)]
    others = f"; {more} other files too" if more else ""
    hint = f"move {step} away to use the one before, of step {earlier[-1]}" if earlier else "there is none before it"
    raise InputError(f"damaged checkpoint: {checked.faults[0]}{others}; {hint}")


def read_leaf(path: Path, name: tuple[str, ...], dtype: Any, layers: slice = slice(None)) -> np.ndarray:
    """Reads one parameter, or some of its layers, into host memory.

    Args:
      path: folder of the `params` item.
      name: the parameter's path of keys.
      dtype: the dtype to cast to; None keeps the stored one.
      layers: the layers to read of a stacked parameter.

    Raises:
      InputError: the checkpoint is damaged.
    """
    with _reading(path):
        stored = _open(path, name)
        return (stored if dtype is None else ts.cast(stored, dtype))[layers].read().result()


def place_leaf(path: Path, name: tuple[str, ...], dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Restores one parameter straight to its devices; each process reads only the parts that its devices hold.

    Args:
      path, name, dtype: as for `read_leaf`.

    Raises:
      InputError: the checkpoint is damaged.
    """
    arguments = ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=sharding)
    restore = ocp.args.PyTreeRestore(item=nest({name: 0}), restore_args=nest({name: arguments}), partial_restore=True)
    with _reading(path), ocp.PyTreeCheckpointer() as checkpointer:
        return dict(flatten(checkpointer.restore(path, args=restore)))[name]


def check_vocabulary(tokenizer: Tokenizer, config: LlamaConfig, directory: Path | str) -> None:
    """Raises InputError, which names the directory, if a tokenizer's vocabulary is larger than the embedding."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab_size} rows; "
            "expected a vocabulary no larger than the embedding: convert/from_hf.py --pad-embeddings appends the rows "
            "that are missing"
        )


def _open(path: Path, name: tuple[str, ...]) -> ts.TensorStore:
    """Opens one parameter in Orbax's format (Zarr arrays in OCDBT), because Orbax itself reads only whole arrays."""
    base = {"driver": "file", "path": f"{path}/"}
    store = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(name)}/"}
    spec = {"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True).result()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns any error of reading a checkpoint into InputError."""
    try:
        with quiet_orbax():
            yield
    # For damaged files, Orbax raises many types of errors, including bare Exception.
    except Exception as error:
        raise InputError(f"{path}: damaged checkpoint: {one_line(error)}") from error


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Turns off Orbax's log, whose warnings do not apply here and whose errors are also raised.

    After a failure the log stays off, because the checkpoint's other reads or writes then fail too, in tasks that
    nothing awaits and in callbacks to a closed event loop.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    hook = sys.unraisablehook
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda failure: None if str(failure.exc_value) == "Event loop is closed" else hook(failure)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    sys.unraisablehook = hook
