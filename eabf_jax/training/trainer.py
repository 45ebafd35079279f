"""The training loop: one linear function from a configuration to a finished run directory."""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from eabf_jax.data.dataset import read_metadata, tokenizer_digest
from eabf_jax.data.loader import Mode, make_loader, resume, steps_per_epoch
from eabf_jax.destination import check_apart, replacing, whole
from eabf_jax.errors import CAN_CONTINUE, InputError, Stopped
from eabf_jax.hardware import Device, device_at_hand, device_of_kind
from eabf_jax.interop.adapter import Adapter, digest, read_adapter
from eabf_jax.interop.directory import read_json_object, write_json
from eabf_jax.interop.huggingface import open_leaves, tokenizer_directory
from eabf_jax.interop.loading import load_parameters, read_config
from eabf_jax.interop.native import (
    CHECKPOINTS,
    CONFIG_FILE,
    DATASET_FILE,
    METRICS_FILE,
    MODEL_FILE,
    NATIVE,
    TENSORBOARD,
    check_vocabulary,
    write_model_json,
)
from eabf_jax.interop.tokenizer import TOKENIZER_FILES, Tokenizer, has_tokenizer, load_tokenizer
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama
from eabf_jax.model.lora import split_trained
from eabf_jax.parallel.context import zigzag_order
from eabf_jax.parallel.mesh import make_mesh
from eabf_jax.parallel.processes import all_or_none, gathered
from eabf_jax.parallel.rules import process_batch_shard
from eabf_jax.signals import REPEAT
from eabf_jax.training.backward import Microbatch, Tree, merge
from eabf_jax.training.checkpoint import Checkpoints, latest_step, set_aside, sound_step
from eabf_jax.training.layerwise import Layerwise
from eabf_jax.training.lock import LOCK_FILE, locked
from eabf_jax.training.loss import next_tokens
from eabf_jax.training.optimizer import learning_rate_schedule, make_optimizer
from eabf_jax.training.plan import Plan, check, choose, settle_mesh
from eabf_jax.training.recipe import (
    TrainConfig,
    check_window,
    config_differences,
    dump_config,
    is_written_config,
    total_steps,
)
from eabf_jax.training.step import Program, Saved, Step, build_model, microbatch_sharding
from eabf_jax.training.tracking import Tracker, flops_per_token

# Everything that a run writes; overwriting removes these entries and no others.
_RUN_ENTRIES = (CONFIG_FILE, DATASET_FILE, MODEL_FILE, METRICS_FILE, TENSORBOARD, CHECKPOINTS, *TOKENIZER_FILES)


def train(config: TrainConfig) -> Path:
    """Runs the recipe from a model and a dataset to a run directory; resumes a run that was interrupted.

    Returns:
      The run's directory: a native model directory that also holds `config.yaml`, `metrics.jsonl` and `tensorboard/`.
    Raises:
      InputError: wrong input; another process that trains in the same directory.
      Diverged: a metric is not finite; the last good checkpoint stays.
      Preempted: a signal or a preemption stopped the run.
    """
    with contextlib.ExitStack() as held:
        return _train(config, held)


def _train(config: TrainConfig, held: contextlib.ExitStack) -> Path:
    """Implements `train`; `held` receives the lock, which it releases when training ends."""
    run = Path(config.output)
    with all_or_none():
        planned, mesh, steps, tokenizer = settle(config)
        model_config, recipe, data = planned.model_config, config.recipe, config.data
        step_of = prepare_step(planned, mesh, steps)
        index, count = process_batch_shard(mesh)
        batches = make_loader(
            data.directory, data.split, **_rows(config), seed=recipe.seed, process_index=index, process_count=count
        )
        _check_output(run, config)
        adapter = _adapter(run, config)
    if _reached(run, config) >= steps and sound_step(run, steps) >= steps:
        return run
    with all_or_none():
        if jax.process_index() == 0:
            held.enter_context(locked(run))
        _check_output(run, config)  # the previous holder of the lock may have written here
    start = 0 if config.overwrite else sound_step(run, steps)
    if start >= steps:
        return run
    with all_or_none():
        if jax.process_index() == 0 and not config.overwrite:
            set_aside(run, start)
    state = None
    frozen = _frozen_params(config, step_of.frozen)
    if not start:
        # The model is read first, so that nothing is written if it cannot be read.
        state = step_of.begin(_initial_params(config, model_config, step_of.abstract), frozen)
        with all_or_none():
            _begin_run(run, config, model_config, tokenizer, adapter)
    with Checkpoints(run, config.checkpoint.keep) as checkpoints, _first_signal() as received:
        if state is None:
            saved, position = checkpoints.restore(start, step_of.abstract)
            try:
                resume(batches, position, start)
            except InputError as error:
                raise InputError(
                    f"checkpoint {start} in {run}: {error}: remove it to resume from the one before"
                ) from error
            state = step_of.restored(start, saved, frozen)
        schedule = learning_rate_schedule(recipe, steps)
        row_tokens = recipe.batch_size * config.window
        known = device_of_kind(jax.devices()[0].device_kind)
        with Tracker(run, steps=steps, start=start, quiet=jax.process_index() != 0) as tracker:
            once = {"compile_seconds": step_of.compile()}
            tracker.compiled()
            for step in range(start + 1, steps + 1):
                began = time.perf_counter()
                batch = place_batch(
                    next(batches), mesh, planned.microbatches, every_token=recipe.objective == "pretrain"
                )
                state, metrics = step_of(state, batch)
                figures = {name: float(value) for name, value in metrics._asdict().items()}
                if not all(map(math.isfinite, figures.values())):
                    good = checkpoints.latest_step()
                    kept = f"checkpoint {good} in {run} is the last good one" if good else "no checkpoint was written"
                    found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
                    raise Diverged(
                        f"not finite at step {step}: {found}; stopped, {kept} "
                        "(a lower recipe.learning_rate is the usual cure)"
                    )
                seconds = time.perf_counter() - began
                rate = row_tokens / seconds
                per_device = rate * flops_per_token(model_config, config.window, config.lora) / jax.device_count()
                tracker.record(
                    step,
                    {
                        "loss": figures["loss"],
                        "learning_rate": float(schedule(step - 1)),
                        "gradient_norm": figures["gradient_norm"],
                        "parameter_norm": figures["parameter_norm"],
                        "trained_tokens": int(metrics.tokens),
                        "tokens_per_second": rate,
                        "mfu": per_device / known.flops if known else None,
                        "seconds": seconds,
                        **once,
                    },
                )
                once = {}
                # A signal to one process stops all processes after the same step.
                number = max(gathered(next(iter(received), 0)))
                stopping = number > 0 or checkpoints.reached_preemption(step)
                due = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
                if step == steps:  # nothing resumes from the last step; without moments it takes a third of the size
                    checkpoints.save(step, step_of.saved(state, moments=False), {})
                elif due or (stopping and planned.can_checkpoint):
                    checkpoints.save(step, step_of.saved(state), batches.get_state())
                if stopping and step < steps:
                    raise Preempted(step, steps, number or signal.SIGTERM, resumable=planned.can_checkpoint)
    return run


class Settled(NamedTuple):
    """A run whose model, data and memory were checked."""

    planned: Plan
    mesh: Mesh
    steps: int  # optimizer steps
    tokenizer: Tokenizer | None  # to keep beside the model


def settle(config: TrainConfig) -> Settled:
    """Checks a run against its model, its data and this machine, without reading weights or writing anything.

    Raises:
      InputError: as for `train`, except for what the output directory or the weights themselves are refused for.
    """
    base = base_config(config)
    model_config = extended_config(config, base)
    device = _least_device()
    mesh = make_mesh(settle_mesh(config, model_config, jax.device_count(), device))
    planned = choose(config, model_config, mesh.shape, device)
    check(planned)
    if config.checkpoint.every_steps and not planned.can_checkpoint:
        raise InputError(
            "host memory has no room for a checkpoint beside what the step keeps there: set checkpoint.every_steps "
            "null (parameters alone are saved, at the end), or use more devices"
        )
    recipe = config.recipe
    steps = total_steps(recipe, steps_per_epoch(config.data.directory, config.data.split, **_rows(config)))
    if steps >= 2**31:
        raise InputError(f"recipe.epochs {recipe.epochs} makes {steps} steps; fewer than 2**31 are needed")
    if recipe.warmup_steps >= steps:
        raise InputError(
            f"recipe.warmup_steps {recipe.warmup_steps} is not less than the run's {steps} steps: the peak "
            "rate would never be reached"
        )
    source = tokenizer_source(config)
    tokenizer = None if source is None else load_tokenizer(source)
    check_vocabularies(config.data.directory, base, source, tokenizer)
    return Settled(planned, mesh, steps, tokenizer)


def _rows(config: TrainConfig) -> dict[str, Any]:
    """Returns what determines the rows of an epoch, as keyword arguments of `make_loader`."""
    mode: Mode = "packed" if config.recipe.objective == "pretrain" else "conversations"
    return {
        "batch_size": config.recipe.batch_size,
        "length": config.window,
        "mode": mode,
        "samples": config.data.samples,
    }


def _least_device() -> Device:
    """Returns the local device with the least memory that any process sees, so that all choose the same settings."""
    device = device_at_hand()
    sizes = (device.memory, device.host_memory, min(device.host_memory, device.pinned_limit))
    memory, host, pinned = (min(gathered(int(size) >> 20)) << 20 for size in sizes)
    return dataclasses.replace(device, memory=memory, host_memory=host, pinned_limit=pinned)


class Diverged(InputError):
    """A metric of a step is not finite."""


class Preempted(Stopped):
    """A signal or a preemption stopped the run; a checkpoint was written if host memory has room for one."""

    def __init__(self, step: int, steps: int, number: int, *, resumable: bool):
        """Says after which step the signal of this number stopped the run, and whether it can be resumed."""
        again = "resume" if resumable else "start over: no checkpoint fits in host memory"
        status = CAN_CONTINUE if resumable and number == signal.SIGTERM else 128 + number
        super().__init__(f"stopped by a signal after step {step} of {steps}; run it again to {again}", status)


def base_config(config: TrainConfig) -> LlamaConfig:
    """Returns the configuration of a run's initial model, before the run changes window and scheme.

    Its window is `model.window` if that is set. The parameters are not read.

    Raises:
      InputError: neither a path nor a shape is given, or the two disagree; `model.window` is larger than the model's.
    """
    if config.model.path is None:
        return shape_config(config)
    found = read_config(config.model.path)
    fields = {entry.name: getattr(found, entry.name) for entry in dataclasses.fields(found)}
    told = LlamaConfig.from_fields({**fields, **(config.model.shape or {})})
    for name in fields:
        if getattr(told, name) != getattr(found, name):
            raise InputError(
                f"model.shape says {name} {getattr(told, name)}; the model in {config.model.path} has "
                f"{getattr(found, name)}"
            )
    return _with_window(config, found)


def shape_config(config: TrainConfig) -> LlamaConfig:
    """Returns the configuration that `model.shape` describes; see `base_config`."""
    if config.model.shape is None:
        raise InputError(
            "the configuration names no model: set model.path (a directory) or model.shape (to train from scratch)"
        )
    return _with_window(config, LlamaConfig.from_fields(config.model.shape))


def extended_config(config: TrainConfig, base: LlamaConfig | None = None) -> LlamaConfig:
    """Returns the model's configuration with the run's window and scheme.

    Args:
      base: from `base_config`; None takes it from `model.shape`, or else `model.path`.

    Raises:
      InputError: as for `base_config` and `check_window`.
    """
    if base is None:
        base = shape_config(config) if config.model.shape else base_config(config)
    check_window(config, base)
    return dataclasses.replace(base, max_position_embeddings=config.window, rope=config.scheme)


def _with_window(config: TrainConfig, base: LlamaConfig) -> LlamaConfig:
    window, own = config.model.window, base.max_position_embeddings
    if window is not None and window > own:
        raise InputError(f"model.window {window} is larger than the model's own window {own}: a smaller one is needed")
    return base if window is None else dataclasses.replace(base, max_position_embeddings=window)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, microbatches: int, *, every_token: bool) -> Microbatch:
    """Puts this process's rows of a batch on its devices.

    Args:
      batch: arrays `tokens`, `loss_mask`, `positions`, `segment_ids`, each [rows of this process, length].
      every_token: True if rows hold several documents and the loss covers every token. If False, each row holds one
        document followed by padding, and the loss covers the tokens in `loss_mask`.

    Returns:
      Global arrays [microbatches, rows of a microbatch, length]; the tokens of a row are in `zigzag_order`.
    """
    segment_ids = batch["segment_ids"]
    learned = np.ones_like(batch["loss_mask"]) if every_token else batch["loss_mask"]
    targets, mask = next_tokens(batch["tokens"], learned, segment_ids)
    # With one document per row, padding comes last, so the causal mask already excludes it; kernels are faster without
    # segment ids.
    rows = Microbatch(batch["tokens"], targets, mask, batch["positions"], segment_ids if every_token else None)
    local, length = batch["tokens"].shape
    order = zigzag_order(length, mesh.shape["context"])
    shape = (microbatches, local * process_batch_shard(mesh)[1] // microbatches, length)

    def place(array: np.ndarray) -> Array:
        array = array[:, order].reshape(microbatches, -1, length)
        return jax.make_array_from_process_local_data(microbatch_sharding(mesh), array, shape)

    return jax.tree.map(place, rows)


def prepare_step(planned: Plan, mesh: Mesh, steps: int = 1) -> Step:
    """Builds the run's optimizer step from shapes alone.

    Args:
      planned: from `choose`.
      steps: optimizer steps of the run, for the schedule.

    Returns:
      A step of the kind that `compute.executor` names.
    Raises:
      InputError: a setting that the executor does not have.
    """
    config, microbatches = planned.config, planned.microbatches
    executor = config.compute.executor
    if executor == "auto":
        executor = "layerwise" if mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm") else "program"
    of_layerwise = {
        "compute.optimizer_memory 'host'": config.compute.optimizer_memory == "host",
        "compute.remat 'offload'": "offload" in config.compute.remat,
        "compute.gather 'step'": config.compute.gather == "step",
    }
    for setting, wanted in of_layerwise.items():
        if wanted and executor != "layerwise":
            raise InputError(f"{setting} needs compute.executor 'layerwise', not 'program'")
    shape = (microbatches, config.recipe.batch_size // microbatches, config.window)
    ids, flags = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=microbatch_sharding(mesh)) for dtype in (jnp.int32, jnp.bool_)
    )
    packed = config.recipe.objective == "pretrain"
    if packed and mesh.shape["context"] > 1:
        raise InputError("mesh.context above 1 takes one document a row: recipe.objective 'pretrain' packs several")
    kind: type[Program | Layerwise] = Layerwise if executor == "layerwise" else Program
    return kind(
        build_model(planned.model_config, config.compute, mesh, config.lora),
        make_optimizer(config.recipe, steps),
        config.compute,
        mesh,
        clip_norm=config.recipe.clip_norm,
        batch=Microbatch(ids, ids, flags, ids, ids if packed else None),
    )


def lower_train_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """Traces and lowers the run's optimizer step as one program, from shapes alone; allocates nothing.

    Args:
      config: the run; if `model.shape` is given, it describes the model and no weights are needed.

    Raises:
      InputError: as for `train`, except that the memory is not checked.
    """
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, executor="program"))
    planned = choose(config, extended_config(config), mesh.shape, device_at_hand())
    step = prepare_step(planned, mesh, config.recipe.steps or 1)
    assert isinstance(step, Program)
    return step.lower()


def _initial_params(config: TrainConfig, model_config: LlamaConfig, abstract: Saved) -> Tree:
    """Reads the trained parameters from `model.path` as float32; draws missing ones with the recipe's seed."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    if config.model.path is None:
        return random_params(model_config, config.recipe.seed, shardings)
    if config.lora is None:
        return load_parameters(config.model.path, dtype="float32", shardings=shardings)[1]
    lora, alone = config.lora, dataclasses.replace(config.lora, train_embeddings=False, train_norms=False)
    adapters, others = split_trained(shardings, alone)

    def draw() -> Tree:
        drawn = Llama(model_config, rngs=nnx.Rngs(config.recipe.seed), lora=lora).parameters()
        return split_trained(drawn, alone)[0]

    found = load_parameters(config.model.path, dtype="float32", shardings=others)[1]
    return merge(jax.jit(draw, out_shardings=adapters)(), found)


def _frozen_params(config: TrainConfig, shapes: Tree) -> Tree:
    """Reads the frozen parameters in the compute dtype."""
    if not shapes or config.model.path is None:
        return {}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return load_parameters(config.model.path, dtype=config.compute.dtype, shardings=shardings)[1]


def _adapter(run: Path, config: TrainConfig) -> Adapter | None:
    """Returns the adapter entry for the run's model.json; refuses to resume with a different base model."""
    if config.lora is None:
        return None
    if config.model.path is None:
        raise InputError("lora trains adapters of a model: set model.path, or lora null to train from scratch")
    base = Path(config.model.path).resolve()
    found = Adapter(config.lora, str(base), digest(open_leaves(base)))
    before = read_adapter(run) if (run / MODEL_FILE).is_file() and not config.overwrite else None
    if before is not None and before.base_digest != found.base_digest:
        raise InputError(
            f"the model in {base} is not the one that the run in {run} began with (digest {found.base_digest}, "
            f"expected {before.base_digest}); pass --overwrite true to start over"
        )
    return found


def random_params(model_config: LlamaConfig, seed: int, shardings: Tree) -> Tree:
    """Draws random float32 parameters directly on their devices.

    Args:
      shardings: a NamedSharding per parameter, as a nested dict.
    """
    return jax.jit(lambda: Llama(model_config, rngs=nnx.Rngs(seed)).parameters(), out_shardings=shardings)()


def tokenizer_source(config: TrainConfig) -> Path | None:
    """Returns the directory of the tokenizer; `model.tokenizer` must have one, `model.path` need not."""
    if config.model.tokenizer is not None:
        return Path(config.model.tokenizer)
    source = None if config.model.path is None else tokenizer_directory(config.model.path)
    return source if source is not None and has_tokenizer(source) else None


def check_vocabularies(directory: str, base: LlamaConfig, source: Path | None, tokenizer: Tokenizer | None) -> None:
    """Refuses a dataset whose token ids exceed the embedding, or that was made with another tokenizer.

    Args:
      base: the model's configuration.
      source, tokenizer: the tokenizer's directory, and the tokenizer; None if the model has none.
    """
    metadata = read_metadata(directory)
    if metadata.get("vocab_size", 0) > base.vocab_size:
        raise InputError(
            f"the dataset {directory} was tokenized with {metadata['vocab_size']} tokens; the model's embedding has "
            f"{base.vocab_size} rows: prepare it with the model's own tokenizer"
        )
    if tokenizer is None:
        return
    check_vocabulary(tokenizer, base, str(source))
    made_with = metadata.get("tokenizer")
    if made_with is not None and made_with != tokenizer_digest(tokenizer):
        raise InputError(
            f"the dataset {directory} was tokenized with another tokenizer (digest {made_with}) than the one in "
            f"{source} (digest {tokenizer_digest(tokenizer)}): prepare it with --tokenizer {source}"
        )


def _reached(run: Path, config: TrainConfig) -> int:
    """Returns the step to resume from, as process 0 sees it, because a shared directory can lag in other processes."""
    return gathered(0 if config.overwrite else latest_step(run))[0]


def _check_output(run: Path, config: TrainConfig) -> None:
    """Refuses an output directory unless it is empty, holds this same run, or holds a run to overwrite."""
    if jax.process_index() != 0:
        return
    sources = (config.model.path, config.model.tokenizer, config.data.directory)
    check_apart(run, [source for source in sources if source is not None])
    if not run.exists():
        return
    if not run.is_dir():
        raise InputError(f"output {run} is a file: name a directory for the run")
    written = run / CONFIG_FILE
    if config.overwrite:
        found = [name for name in _RUN_ENTRIES if (run / name).exists()]
        if found and NATIVE.read(run) is None and not _is_begun(run):
            raise InputError(
                f"output {run} holds {', '.join(found)}, but nothing marks it as a run's directory (no {MODEL_FILE} of "
                "ours): name another directory, or remove them by hand"
            )
    elif written.exists():
        differing = config_differences(written, config)
        if differing:
            raise InputError(
                f"output {run} holds a run with other values of {', '.join(differing)}; pass --overwrite true to start "
                "over, or name another directory"
            )
        _check_same_dataset(run, config)
    elif any(entry.name != LOCK_FILE for entry in run.iterdir()):
        raise InputError(
            f"output {run} is not empty and holds no run; name another directory, or pass --overwrite true "
            "(it replaces a run's files and leaves others)"
        )


def _check_same_dataset(run: Path, config: TrainConfig) -> None:
    """Refuses to resume if the dataset has been replaced since the run began."""
    if not (run / DATASET_FILE).is_file():  # the start was cut off before it wrote the file
        return
    before, now = read_json_object(run / DATASET_FILE), read_metadata(config.data.directory)
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if differing:
        raise InputError(
            f"the dataset in {config.data.directory} is not the one that the run in {run} began with (another "
            f"{', '.join(differing)} than in {run / DATASET_FILE}): prepare that one again, or pass --overwrite true "
            "to start over"
        )


def _is_begun(run: Path) -> bool:
    """Returns whether a directory is that of a run whose start was cut off before it wrote model.json.

    A configuration alone marks no run that has gone further: `eabf suggest --write` writes one to any directory.
    """
    later = (TENSORBOARD, METRICS_FILE, CHECKPOINTS)
    return is_written_config(run / CONFIG_FILE) and not any((run / name).exists() for name in later)


def _begin_run(
    run: Path, config: TrainConfig, model_config: LlamaConfig, tokenizer: Tokenizer | None, adapter: Adapter | None
) -> None:
    """Writes the run's initial files; config.yaml comes first, so that an interrupted start can still be resumed."""
    if jax.process_index() != 0:
        return
    with replacing(run, _RUN_ENTRIES) if config.overwrite else contextlib.nullcontext():
        with whole(run / CONFIG_FILE) as partial:
            partial.write_text(dump_config(config))
        write_json(run / DATASET_FILE, read_metadata(config.data.directory))
        write_model_json(run, model_config, adapter=adapter.to_json() if adapter else None)
        if tokenizer:
            tokenizer.save(run)


@contextlib.contextmanager
def _first_signal() -> Iterator[list[int]]:
    """Yields a list to which SIGTERM (preemption) or Ctrl-C adds its number, so that the loop can save and stop.

    A later signal takes effect at once.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may handle signals
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before: dict[int, Any] = {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}
    times: list[float] = []

    def receive(number: int, frame: Any) -> None:
        times.append(time.monotonic())
        if not received:
            received.append(number)
        elif times[-1] - times[0] > REPEAT:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
