"""The memory of evaluation and generation on a TPU slice, read from the compiled programs."""

import math
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eabf_jax.errors import InputError
from eabf_jax.evaluation.scorer import evaluation_mesh, lower_scoring
from eabf_jax.hardware import DEVICES
from eabf_jax.inference import placement
from eabf_jax.inference.generate import lower_generation
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import parameter_count
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.parallel.rules import batch_ways
from eabf_jax.parallel.topology import Slice, compile_only_devices
from eabf_jax.training.compile import gib, hbm_bytes, libtpu_version, refused, share_bytes
from eabf_jax.training.recipe import TrainConfig
from eabf_jax.training.trainer import extended_config

# Fraction of a chip's memory for the weights and cache of generation; the rest is for the step itself.
_HELD = 0.85


def compile_for(purpose: Literal["evaluate", "generate"], config: TrainConfig, slice_: Slice) -> dict[str, Any]:
    """Compiles the scoring of a window, or the reading of a prompt and the decode loop up to a window's end.

    Every group of devices that shares a model takes one row.

    Args:
      config: a run; its model, window, scheme, `compute.dtype` and `mesh.tensor` are used.

    Raises:
      InputError: it does not fit into a chip's memory; the TPU compiler is not installed.
    """
    devices = compile_only_devices(slice_)
    memory, model_config, dtype = DEVICES[slice_.generation].memory, extended_config(config), config.compute.dtype
    tensor = config.mesh.tensor if isinstance(config.mesh, MeshConfig) else 1
    if purpose == "evaluate":
        mesh = evaluation_mesh(model_config, dtype, tensor, devices, memory)
        programs: tuple[jax.stages.Lowered, ...] = (lower_scoring(model_config, dtype, mesh, config.window),)
    else:
        mesh = _generation_mesh(model_config, dtype, config.window, tensor, devices, memory)
        programs = lower_generation(model_config, dtype, mesh, config.window)
    began = time.perf_counter()
    try:
        compiled = [program.compile() for program in programs]
    except jax.errors.JaxRuntimeError as error:
        told = refused(error, slice_)
        raise error if told is None else InputError(told) from error
    seconds = time.perf_counter() - began
    # The last program takes everything that stays in memory: parameters, or weights and caches of all layers.
    arguments, places = programs[-1].in_avals[0], compiled[-1].input_shardings[0]
    parts = {"weights": share_bytes(arguments[0], places[0])}
    if purpose == "generate":
        parts["cache"] = share_bytes(arguments[1].caches, places[1].caches)
    held = sum(parts.values())
    # A layer that reads a prompt counts its own weights and cache twice, a small overestimate.
    parts["workspace"] = max(hbm_bytes(compiled[-1]) - held, *map(hbm_bytes, compiled[:-1]), 0.0)
    total = sum(parts.values())
    if total > memory:
        raise InputError(
            f"to {purpose} with a window of {config.window} takes {gib(total)} GiB; {gib(memory)} are available on a "
            f"chip of {slice_.name}: use a larger slice, a larger mesh.tensor or a shorter window"
        )
    return {
        "for": purpose,
        "topology": slice_.name,
        "chips": slice_.chips,
        "mesh": dict(mesh.shape),
        "window": config.window,
        "rows": batch_ways(mesh),
        "dtype": dtype,
        "hbm_gib_per_chip": gib(total),
        "hbm_gib_by_part": {name: gib(size) for name, size in parts.items()},
        "hbm_gib_available": gib(memory),
        "compile_seconds": round(seconds, 1),
        "versions": {"jax": jax.__version__, "libtpu": libtpu_version()},
    }


def _generation_mesh(
    config: LlamaConfig, dtype: str, window: int, tensor: int, devices: list[jax.Device], memory: float
) -> Mesh:
    """Returns a mesh with the fewest devices per model, at least `tensor`, that hold its weights and a row's cache."""
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * window
    held = (parameter_count(config) + cache) * jnp.dtype(dtype).itemsize
    heads = math.gcd(config.num_key_value_heads, len(devices))
    ways = [n for n in range(tensor, heads + 1) if heads % n == 0] or [tensor]
    mesh = make_mesh(MeshConfig(-1, 1, next((n for n in ways if held / n <= _HELD * memory), ways[-1])), devices)
    placement.check(mesh, config)
    return mesh
