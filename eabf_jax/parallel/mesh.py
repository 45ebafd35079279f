"""The device mesh: data parallel x fully sharded data parallel x context parallel x tensor parallel."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from eabf_jax.errors import InputError
from eabf_jax.hardware import PINNED_LIMIT, PINNED_SHARE

# Slowest-varying first: devices adjacent on the last axis are also adjacent on the interconnect, if JAX knows it.
AXES = ("data", "fsdp", "context", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices per mesh axis; `--mesh auto` chooses the simplest mesh on which the step fits."""

    data: int = 1  # replicas of the parameters, each with its own part of the batch
    fsdp: int = -1  # devices that split the parameters and the batch; -1: all that the other axes leave
    tensor: int = 1  # devices that split every matrix product
    context: int = 1  # devices that split every row of tokens, and the parameters too

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
    """Makes each CPU core a JAX device (up to eight), so that training without an accelerator uses all cores.

    XLA runs much of a transformer layer on one thread; two devices on two cores are about twice as fast as one. Call
    this before JAX is first used. It does nothing if XLA_FLAGS or JAX_NUM_CPU_DEVICES sets a number of devices.

    Args:
      rows: a number that the device count must divide, such as the rows of a batch.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    # The cores that this process may use, on systems that report them.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", max(n for n in (1, 2, 4, 8) if n <= cores and rows % n == 0))


def axis_sizes(config: MeshConfig, count: int) -> dict[str, int]:
    """Resolves the number of devices along each axis, by name in the order of `AXES`.

    Raises:
      InputError: the axes do not multiply to the number of devices.
    """
    sizes = list(config.sizes)
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        if count % rest:
            raise InputError(f"mesh axes of {rest} devices do not divide the {count} devices available")
        sizes[sizes.index(-1)] = count // rest
    if math.prod(sizes) != count:
        raise InputError(
            f"mesh {_listed(sizes, ' x ')} takes {math.prod(sizes)} devices; {count} are available (set one axis to "
            "-1 to take all that are left)"
        )
    return dict(zip(AXES, sizes, strict=True))


def gpu_memory_defaults() -> None:
    """Lets JAX use nearly all memory of a GPU, and most of its host's; has no effect without a GPU.

    Call this before JAX is first used. Environment variables that are already set are kept.
    """
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    # The rest of the GPU's memory is for CUDA itself, and for kernel workspaces outside the pool.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.97")
    os.environ.setdefault(PINNED_LIMIT, str(int(PINNED_SHARE * host)))


def gpu_defaults() -> None:
    """Applies `gpu_memory_defaults` and turns off two compiler features that slow training down."""
    gpu_memory_defaults()
    flags = os.environ.get("XLA_FLAGS", "")
    for flag in (
        # Triton's products win autotuning on a cool device, but only cuBLAS keeps its speed on a hot one.
        "--xla_gpu_enable_triton_gemm=false",
        # Reusing one CUDA graph for the next layer forces a graph update, which blocks Python.
        "--xla_gpu_enable_command_buffer=",
    ):
        if flag.partition("=")[0] not in flags:
            flags += f" {flag}"
    os.environ["XLA_FLAGS"] = flags.strip()


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arranges devices as a mesh with the axes `AXES`.

    Args:
      devices: the devices to arrange; None means all.

    Raises:
      InputError: the axes do not multiply to the number of devices.
    """
    sizes = axis_sizes(config, len(devices) if devices is not None else jax.device_count())
    arranged = mesh_utils.create_device_mesh(
        tuple(sizes.values()),
        devices,
        # Needed, for example, for an axis of 32 in a torus of 4 x 4 x 4, which takes half of the last dimension.
        allow_split_physical_axes=True,
    )
    return Mesh(arranged, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
