"""The device mesh: data parallel x fully sharded data parallel x context parallel x tensor parallel."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from eabf_jax.errors import InputError

# Slowest first: neighbours on the last axis are neighbours on the interconnect where JAX knows it.
AXES = ("data", "fsdp", "context", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis takes; `--mesh auto` chooses the simplest that the step fits on."""

    data: int = 1  # replicas of the parameters, each with its own part of the batch
    fsdp: int = -1  # devices that share the parameters and split the batch; -1: all that the other axes leave
    tensor: int = 1  # devices that split every matrix product
    context: int = 1  # devices that split every row of tokens, and share the parameters as well

    def __post_init__(self) -> None:
        sizes = self.sizes
        if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(
                f"mesh {_listed(sizes, ', ')}: every axis takes a positive number of devices, and one of them may be "
                "-1 (all that are left)"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each axis, in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)


def _listed(sizes: Sequence[int], separator: str) -> str:
    return separator.join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))


def use_every_core(rows: int = 8) -> None:
    """Makes a device of every CPU core (up to eight), so that a machine without accelerator is not idle.

    XLA runs much of a transformer's layer on one thread; two devices on two cores are about twice as fast as one. To be
    called before JAX is first used; a number of devices set in XLA_FLAGS or JAX_NUM_CPU_DEVICES is left alone.

    Args:
      rows: what the devices are to share; their number divides it.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    # The cores that this process may use, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", max(n for n in (1, 2, 4, 8) if n <= cores and rows % n == 0))


def axis_sizes(config: MeshConfig, count: int) -> dict[str, int]:
    """Devices along each axis.

    Args:
      config: the size of each axis.
      count: devices to arrange.

    Returns:
      By axis, in the order of `AXES`.
    Raises:
      InputError: the axes do not multiply to the number of devices.
    """
    sizes = list(config.sizes)
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        if count % rest:
            raise InputError(f"mesh axes of {rest} devices do not divide the {count} devices at hand")
        sizes[sizes.index(-1)] = count // rest
    if math.prod(sizes) != count:
        raise InputError(
            f"mesh {_listed(sizes, ' x ')} takes {math.prod(sizes)} devices; {count} are at hand (set one axis to "
            "-1 to take all that are left)"
        )
    return dict(zip(AXES, sizes, strict=True))


def gpu_memory_defaults() -> None:
    """Lets JAX have nearly all memory of a GPU and of its host.

    To be called before JAX is first used; what is set in the environment is left alone, and nothing but a GPU reads it.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    # The rest of the GPU's is for CUDA's own, and for kernels' workspaces outside the pool.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.97")
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(int(0.9 * host)))


def gpu_defaults() -> None:
    """`gpu_memory_defaults`, and two of the compiler's choices that training does better without."""
    gpu_memory_defaults()
    flags = os.environ.get("XLA_FLAGS", "")
    for flag in (
        # cuBLAS keeps its speed on a hot device; Triton's products win the compiler's trials on a cool one.
        "--xla_gpu_enable_triton_gemm=false",
        # A CUDA graph that is called again for the next layer is rewritten first, and Python waits for it.
        "--xla_gpu_enable_command_buffer=",
    ):
        if flag.partition("=")[0] not in flags:
            flags += f" {flag}"
    os.environ["XLA_FLAGS"] = flags.strip()


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arranges devices as a mesh with the axes `AXES`.

    Args:
      config: the size of each axis.
      devices: the devices to arrange; None takes all of them.

    Returns:
      The mesh.
    Raises:
      InputError: the axes do not multiply to the number of devices.
    """
    sizes = axis_sizes(config, len(devices) if devices is not None else jax.device_count())
    arranged = mesh_utils.create_device_mesh(
        tuple(sizes.values()),
        devices,
        # An axis of 32 in a torus of 4 x 4 x 4 takes half of the last dimension.
        allow_split_physical_axes=True,
    )
    return Mesh(arranged, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
