"""TPU slices by name, and compiling for them without a TPU: libtpu's compiler needs only the slice's shape."""

import importlib.util
import os
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import topologies

from eabf_jax.errors import InputError, unknown_name

# Chips along each dimension of the torus, by number of chips. Source: Google's documentation of v4 and v5p topologies.
_CUBES = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)}
_SQUARES = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}

# Without a TPU and these settings, libtpu queries the cloud's metadata server for its hardware, and takes a lock that
# allows only one process at a time.
_COMPILER_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Slice:
    """A part of a TPU pod."""

    name: str  # Google Cloud's name, e.g. v4-32
    generation: str  # v4, v5e, v5p or v6e
    shape: tuple[int, ...]  # chips along each dimension

    @property
    def chips(self) -> int:
        """Number of chips; each is one JAX device."""
        return int(np.prod(self.shape))

    @property
    def wrapped(self) -> tuple[bool, ...]:
        """Whether each dimension is a ring; in 3D, all are if the slice consists of whole 4 x 4 x 4 cubes."""
        if len(self.shape) == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)  # a side of the whole pod is a ring

    @property
    def links(self) -> int:
        """Links per chip: two along a ring, one along any other dimension of more than one chip."""
        return sum(2 if ring else 1 for size, ring in zip(self.shape, self.wrapped, strict=True) if size > 1)


_SLICES = [
    # The name counts TensorCores, two per chip.
    *(Slice(f"{kind}-{2 * chips}", kind, cube) for kind in ("v4", "v5p") for chips, cube in _CUBES.items()),
    *(Slice(f"{kind}-{chips}", kind, square) for kind in ("v5e", "v6e") for chips, square in _SQUARES.items()),
]
SLICES = {slice_.name: slice_ for slice_ in _SLICES}


def tpu_slice(name: str) -> Slice:
    """Finds a slice by name.

    Args:
      name: v4-8 to v4-512, v5p-8 to v5p-512, v5e-4 (or v5litepod-4) to v5e-256, or v6e-4 to v6e-256.

    Raises:
      InputError: unknown name.
    """
    plain = name.lower().replace("v5litepod", "v5e")
    if plain not in SLICES:
        raise unknown_name("TPU slice", name, SLICES)
    return SLICES[plain]


def compile_only_devices(slice_: Slice) -> list[jax.Device]:
    """Returns the devices of a slice, one per chip, for compiling without TPU hardware.

    Call this before JAX is first used: it makes this process run everything on the CPU.

    Raises:
      InputError: libtpu, which contains the compiler, is not installed or does not load, or does not know the slice.
    """
    for name, value in _COMPILER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError("the TPU compiler is not installed: pip install libtpu")
    jax.config.update("jax_platforms", "cpu")
    name = f"{slice_.generation}:{'x'.join(map(str, slice_.shape))}"
    options = {}
    if len(slice_.shape) == 3:
        options = {
            "chip_config_name": "megacore",  # both cores of a chip as one device
            "chips_per_host_bounds": (2, 2, 1),
            "num_slices": 1,
            "wrap": slice_.wrapped,
        }
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)
    except (RuntimeError, NotImplementedError, OSError) as error:  # JaxRuntimeError is a RuntimeError
        raise InputError(f"the TPU compiler knows no {slice_.name}, or does not load: {error}") from error
