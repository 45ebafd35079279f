"""The one table of accelerators: how JAX names each, its memory, its peaks, and where the figures come from."""

import dataclasses
import logging
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import jax

from eabf_jax.errors import InputError, unknown_name

GIB = 2**30
# The environment variable with the GiB that XLA lets a process use for arrays on a GPU's host.
PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
# The share of host memory for arrays; the rest is for data and the system.
PINNED_SHARE = 0.75


@dataclass(frozen=True)
class Device:
    """One kind of accelerator."""

    name: str
    kinds: tuple[str, ...]  # every spelling of `jax.Device.device_kind`
    platform: Literal["gpu", "tpu", "cpu"]
    memory: float  # bytes available to a program; less than the data sheet says
    flops: float  # dense bfloat16 peak, FLOP/s
    bandwidth: float  # memory bandwidth, bytes/s
    link: float = 0.0  # bytes/s of one link to a neighbour, one way (TPU)
    host_memory: float = 128 * GIB  # bytes of its share of the host's memory; an assumption about other machines
    pinned_limit: float = math.inf  # bytes that XLA lets arrays on the host take

    @property
    def pinned_memory(self) -> float:
        """Bytes that arrays on the host can take."""
        return min(PINNED_SHARE * self.host_memory, self.pinned_limit)


# Peaks: half of a data sheet's figure "with sparsity". H100 SXM and PCIe: NVIDIA H100 Tensor Core GPU Architecture
# (white paper). H100 NVL: NVIDIA H100 data sheet. H200 and H200 NVL: NVIDIA H200 data sheet. A100: NVIDIA A100 data
# sheet. TPUs: Google Cloud's pages on TPU v4, v5e, v5p and v6e; their links: "How to Scale Your Model" (Google
# DeepMind). Memory of GPUs: 97 % of what CUDA reports, the fraction set by `mesh.gpu_memory_defaults`. Memory of TPUs:
# what the compiler says that it leaves to a program.
DEVICES = {
    device.name: device
    for device in (
        Device("h100", ("NVIDIA H100 80GB HBM3",), "gpu", 76.8 * GIB, 989.4e12, 3.35e12),
        Device("h100-pcie", ("NVIDIA H100 PCIe",), "gpu", 76.8 * GIB, 756e12, 2.0e12),
        Device("h100-nvl", ("NVIDIA H100 NVL",), "gpu", 90.2 * GIB, 835.5e12, 3.9e12),
        Device("h200", ("NVIDIA H200",), "gpu", 135.6 * GIB, 989.4e12, 4.8e12),
        Device("h200-nvl", ("NVIDIA H200 NVL",), "gpu", 135.6 * GIB, 835.5e12, 4.8e12),
        Device("a100-80", ("NVIDIA A100-SXM4-80GB",), "gpu", 76.8 * GIB, 312e12, 2.039e12),
        Device("a100-80-pcie", ("NVIDIA A100 80GB PCIe",), "gpu", 76.8 * GIB, 312e12, 1.935e12),
        Device("a100-40", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), "gpu", 38.2 * GIB, 312e12, 1.555e12),
        Device("v4", ("TPU v4",), "tpu", 30.75 * GIB, 275e12, 1.2e12, 45e9),
        Device("v5e", ("TPU v5 lite", "TPU v5e"), "tpu", 15.75 * GIB, 197e12, 0.819e12, 45e9),
        Device("v5p", ("TPU v5", "TPU v5p"), "tpu", 95.7 * GIB, 459e12, 2.765e12, 90e9),
        Device("v6e", ("TPU v6 lite", "TPU v6e"), "tpu", 31.2 * GIB, 918e12, 1.638e12, 90e9),
    )
}
_BY_KIND = {kind: device for device in DEVICES.values() for kind in device.kinds}


def device_of_kind(kind: str) -> Device | None:
    """Returns the row for a `jax.Device.device_kind`; None if the table has none.

    A kind must be spelled exactly as in the table, because variants of a card have other peaks.
    """
    return _BY_KIND.get(kind)


def device_named(name: str) -> Device:
    """Finds a device by its name in `DEVICES`, or raises InputError."""
    if name.lower() not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    return DEVICES[name.lower()]


def device_at_hand() -> Device:
    """Returns the kind of device that JAX sees, with the memory that is actually available to a program.

    Logs a warning if the device is unknown.

    Raises:
      InputError: the device is unknown and does not report its memory.
    """
    device = jax.devices()[0]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    if device.platform == "cpu":
        return Device("cpu", (), "cpu", memory=host, flops=1e11, bandwidth=2e10, host_memory=host)
    kind, limit = device.device_kind, (device.memory_stats() or {}).get("bytes_limit")
    found = device_of_kind(kind)
    if found is None:
        if limit is None:
            raise InputError(
                f"the memory of the device {kind!r} is not known; --device names one of {', '.join(DEVICES)}"
            )
        platform: Any = "tpu" if device.platform == "tpu" else "gpu"
        found = Device(kind, (), platform, limit, flops=1e14, bandwidth=1e12)
        logging.getLogger(__name__).warning(
            "unknown device %r: the planner takes its memory (%.1f GiB) from its allocator and assumes 100 TFLOP/s and "
            "1 TB/s; the MFU is null",
            *(kind, limit / GIB),
        )
    pinned = float(os.environ.get(PINNED_LIMIT, "inf")) * GIB / jax.local_device_count()
    return dataclasses.replace(found, memory=limit or found.memory, host_memory=host, pinned_limit=pinned)
