"""The cost of a train step, predicted from shapes or read from the compiled program."""

import dataclasses
import math
import re
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from eabf_jax.errors import InputError
from eabf_jax.hardware import DEVICES, GIB, device_at_hand, device_named
from eabf_jax.parallel.collectives import collective_bytes
from eabf_jax.parallel.mesh import axis_sizes, make_mesh
from eabf_jax.parallel.topology import SLICES, Slice, compile_only_devices
from eabf_jax.training.plan import Plan, check, choose, mesh_told, preferred_meshes, settle_mesh
from eabf_jax.training.recipe import TrainConfig
from eabf_jax.training.trainer import extended_config, lower_train_step


def predict(config: TrainConfig, device_name: str | None = None, count: int | None = None) -> dict[str, Any]:
    """Returns the planner's prediction as `eabf compile` reports it.

    Args:
      device_name: a name in `hardware.DEVICES`; None means this machine's devices.
      count: number of devices; None means all of this machine's devices, or one device if `device_name` is given.

    Raises:
      InputError: the step does not fit, or the arguments are wrong.
    """
    if count is not None and count < 1:
        raise InputError(f"--devices {count}: a positive number is needed")
    device = device_named(device_name) if device_name else device_at_hand()
    devices = count or (1 if device_name else jax.device_count())
    model_config = extended_config(config)
    mesh = axis_sizes(settle_mesh(config, model_config, devices, device), devices)
    found = choose(config, model_config, mesh, device)
    check(found)
    compute = found.config.compute
    return {
        "device": found.device.name,
        "devices": devices,
        "mesh": dict(mesh),
        "window": config.window,
        "microbatch_size": compute.microbatch_size,
        "remat": compute.remat,
        "optimizer_memory": compute.optimizer_memory,
        "gather": compute.gather,
        "gib_per_device": gib(found.total),
        "gib_by_part": {name: gib(size) for name, size in found.parts.items()},
        "host_gib_by_part": {name: gib(size) for name, size in found.host.items()},
        "device_gib": gib(found.device.memory),
    }


def compile_for(config: TrainConfig, slice_: Slice) -> dict[str, Any]:
    """Compiles the step for a TPU slice and reads its memory and traffic from the program.

    Args:
      config: the run; the planner chooses `auto` settings.

    Raises:
      InputError: the step does not fit into a chip's memory; the TPU compiler is not installed.
    """
    devices = compile_only_devices(slice_)
    device = DEVICES[slice_.generation]
    model_config = extended_config(config)
    arranged = make_mesh(settle_mesh(config, model_config, len(devices), device), devices)
    mesh = arranged.shape
    # The compiler decides, not the planner: a step that the planner predicts to be too large is compiled anyway.
    predicted = choose(config, model_config, mesh, device)
    config = predicted.config
    lowered = lower_train_step(config, arranged)
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        told = refused(error, slice_)
        if told is None:
            raise
        raise InputError(f"{told} (predicted {predicted.total / GIB:.1f}); {_what_fits(slice_, predicted)}") from error
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    total = hbm_bytes(compiled)
    parts = _state_bytes(compiled, lowered)
    # The compiler reports temporaries as one sum; gradients and kept activations are known from their shapes.
    parts["gradients"] = predicted.parts["gradients"]
    rest = total - sum(parts.values())
    # Small activations may be in faster memory than HBM.
    parts["kept activations"] = min(predicted.parts["kept activations"], rest)
    parts["workspace"] = rest - parts["kept activations"]
    text = compiled.as_text() or ""
    traffic = collective_bytes(text)
    estimate = roofline(predicted, slice_, sum(traffic.values()))
    tokens = config.recipe.batch_size * config.window
    return {
        "topology": slice_.name,
        "chips": slice_.chips,
        "mesh": dict(mesh),
        "window": config.window,
        "batch_size": config.recipe.batch_size,
        "microbatch_size": config.compute.microbatch_size,
        "remat": config.compute.remat,
        "hbm_gib_per_chip": gib(total),
        "hbm_gib_by_part": {name: gib(size) for name, size in parts.items()},
        "hbm_gib_available": gib(device.memory),
        "planned_gib_per_chip": gib(predicted.total),
        "host_gib_per_chip": gib(memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes),
        "model_flops_per_chip": predicted.model_flops,
        "recomputed_flops_per_chip": predicted.recomputed_flops,
        # The compiler counts the body of a loop once, whatever its number of iterations.
        "compiler_flops_loops_once": (compiled.cost_analysis() or {}).get("flops", 0.0),
        "collective_bytes_per_chip": traffic,
        "collective_bytes_by_what_they_carry": collective_bytes(text, by="carries"),
        "estimate": {**estimate, "tokens_per_second_at_most": tokens / estimate["step_seconds_at_least"]},
        "compile_seconds": round(seconds, 1),
        "versions": {"jax": jax.__version__, "libtpu": libtpu_version()},
    }


def roofline(predicted: Plan, slice_: Slice, collective: float) -> dict[str, float]:
    """Estimates a step's time from hardware peaks; the result is a bound, not a measurement.

    It assumes that every matrix product runs at the bfloat16 peak, that each step reads and writes the state once, and
    that each microbatch writes and reads kept activations once and reads parameters three times. It also assumes that
    collectives use all links of a chip evenly at full rate.

    Args:
      predicted: the step's plan, for its FLOPs and sizes.
      slice_: the slice, for its links.
      collective: bytes that a chip sends per step.

    Returns:
      Seconds by resource; their maximum (full overlap) and their sum (no overlap); MFU at the maximum.
    """
    device, parts = predicted.device, predicted.parts
    updated = sum(parts[name] for name in ("parameters", "master rest", "moments", "gradients"))
    # Parameters are read in the compute dtype by the forward pass, the recomputation and the backward pass.
    read = 3 * (parts["gradients"] / 2 + parts.get("frozen parameters", 0.0))
    streamed = predicted.microbatches * (2 * parts["kept activations"] + read)
    seconds = {
        "compute_seconds": (predicted.model_flops + predicted.recomputed_flops) / device.flops,
        "hbm_seconds": (2 * updated + streamed) / device.bandwidth,
        "ici_seconds": collective / (slice_.links * device.link),
    }
    longest = max(seconds.values())
    return {
        **seconds,
        "step_seconds_at_least": longest,
        "step_seconds_without_overlap": sum(seconds.values()),
        "mfu_at_most": predicted.model_flops / device.flops / longest,
    }


def hbm_bytes(compiled: Any) -> int:
    """Returns the memory that a compiled program takes on one chip: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(held + memory.temp_size_in_bytes)


def share_bytes(tree: Any, at: Any) -> float:
    """Returns the bytes of arrays on one device.

    Args:
      tree: arrays or their shapes.
      at: their shardings, in the same structure; None for what a program does not take.
    """

    def share(leaf: Any, sharding: Any) -> float:
        if sharding is None:  # not an argument of the program: the rest of a float32 master has no elements
            return 0.0
        return float(leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape)))

    return sum(jax.tree.leaves(jax.tree.map(share, tree, at)))


def gib(size: float) -> float:
    return round(size / GIB, 3)


def _state_bytes(compiled: Any, lowered: Any) -> dict[str, float]:
    """Returns the bytes of the step's arguments on one chip, by part of the state."""
    state, places = lowered.in_avals[0][0], compiled.input_shardings[0][0]
    found: dict[str, float] = {}
    for field, name in (
        ("params", "parameters"),
        ("rest", "master rest"),
        ("mu", "moments"),
        ("nu", "moments"),
        ("frozen", "frozen parameters"),
    ):
        found[name] = found.get(name, 0.0) + share_bytes(getattr(state, field), getattr(places, field))
    return {name: value for name, value in found.items() if value}


def refused(error: Exception, slice_: Slice) -> str | None:
    """Returns the message for a program that the TPU compiler finds too large; None for any other error."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    numbers = re.search(r"\(?([\d.]+)G\)? (?:exceeds available HBM|of) \(?([\d.]+)G\)?", text)
    told = f"{numbers[1]} GiB of {numbers[2]}" if numbers else text
    return f"the TPU compiler needs more memory than a chip of {slice_.name} has: {told}"


def _what_fits(slice_: Slice, refused: Plan) -> str:
    """Names the smallest slice of the same generation, and a mesh on it, on which the step is predicted to fit."""
    compute = dataclasses.replace(refused.config.compute, remat="full", microbatch_size=1)
    config = dataclasses.replace(refused.config, compute=compute)
    for larger in SLICES.values():
        if larger.generation != slice_.generation or larger.chips < slice_.chips:
            continue
        found = next(preferred_meshes(config, refused.model_config, larger.chips, refused.device), None)
        # The compiler has just refused the same mesh on the same slice.
        if found is not None and found.fits and (larger is not slice_ or found.mesh != refused.mesh):
            where = f"on {larger.name} " if larger is not slice_ else ""
            return (
                f"what fits by prediction {where}({found.total / GIB:.1f} GiB): {mesh_told(found.mesh)}, compute.remat "
                "full, compute.microbatch_size 1 (mesh auto chooses such a mesh)"
            )
    return f"no {slice_.generation} slice is large enough, by prediction: a shorter window or adapters (lora) need less"


def libtpu_version() -> str:
    try:
        return version("libtpu")
    except PackageNotFoundError:
        return "unknown"
