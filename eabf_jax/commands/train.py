"""`eabf train`, the same as train.py; `training.recipe` reads its command line."""

import contextlib
import math

import jax

from eabf_jax.parallel.mesh import gpu_defaults, use_every_core
from eabf_jax.parallel.processes import connected
from eabf_jax.training.recipe import load_config


def run(given: list[str]) -> None:
    """Trains, or resumes a run; `given` is `--config_path FILE` and any `--dotted.key value`."""
    config = load_config(given, prog="train.py")
    # Negative if one axis takes all remaining devices.
    devices = -1 if config.mesh == "auto" else math.prod(config.mesh.sizes)
    rows = 1 if config.compute.microbatch_size == "auto" else config.compute.microbatch_size
    use_every_core(devices if devices > 0 else config.recipe.batch_size // rows)
    gpu_defaults()
    with connected() if config.distributed else contextlib.nullcontext():
        from eabf_jax.training.trainer import train  # late, because its imports use JAX

        done = train(config)
        if jax.process_index() == 0:
            print(f"{done}: finished; python convert/to_hf.py --src {done} --dst DIR exports it")
