import logging

import pytest

from eabf_jax import hardware
from eabf_jax.errors import InputError
from eabf_jax.hardware import DEVICES, GIB, device_at_hand, device_named, device_of_kind


@pytest.mark.parametrize(
    ("kind", "name", "gigabytes", "teraflops", "gigabytes_per_second"),
    [
        # from NVIDIA's data sheets (half of each peak with sparsity) and Google Cloud's page on each TPU
        ("NVIDIA H100 80GB HBM3", "h100", 80, 989.4, 3350),
        ("NVIDIA H100 PCIe", "h100-pcie", 80, 756, 2000),
        ("NVIDIA H100 NVL", "h100-nvl", 94, 1671 / 2, 3900),
        ("NVIDIA H200", "h200", 141, 989.4, 4800),
        ("NVIDIA H200 NVL", "h200-nvl", 141, 1671 / 2, 4800),
        ("NVIDIA A100-SXM4-40GB", "a100-40", 40, 312, 1555),
        ("NVIDIA A100-PCIE-40GB", "a100-40", 40, 312, 1555),
        ("NVIDIA A100-SXM4-80GB", "a100-80", 80, 312, 2039),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie", 80, 312, 1935),
        ("TPU v4", "v4", 32, 275, 1200),
        ("TPU v5 lite", "v5e", 16, 197, 819),
        ("TPU v5e", "v5e", 16, 197, 819),
        ("TPU v5", "v5p", 95, 459, 2765),
        ("TPU v5p", "v5p", 95, 459, 2765),
        ("TPU v6 lite", "v6e", 32, 918, 1638),
        ("TPU v6e", "v6e", 32, 918, 1638),
    ],
)
def test_each_kind_has_the_figures_of_its_data_sheet(kind, name, gigabytes, teraflops, gigabytes_per_second):
    found = device_of_kind(kind)
    assert found is DEVICES[name] and found.platform == ("tpu" if kind.startswith("TPU") else "gpu")
    assert found.flops == pytest.approx(teraflops * 1e12, rel=1e-12)
    assert found.bandwidth == pytest.approx(gigabytes_per_second * 1e9, rel=1e-12)
    # The share that a program gets; the vendors' gigabytes are between 1e9 bytes and a GiB (TPU v5p: 95 for 96 GiB).
    assert 0.93 * gigabytes * 1e9 < found.memory < (gigabytes + (name == "v5p")) * GIB


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA H100", "NVIDIA H800", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L4", "TPU v3", "TPU7x"]
)
def test_a_kind_that_is_not_in_the_table_has_no_figures(kind):
    assert device_of_kind(kind) is None


def test_devices_are_known_by_name_and_the_one_at_hand_by_itself():
    assert device_named("H100") is DEVICES["h100"]
    with pytest.raises(InputError, match="unknown device 'h1000': did you mean 'h100'"):
        device_named("h1000")
    found = device_at_hand()
    assert found.platform == "cpu" and found.memory > GIB


@pytest.mark.parametrize(
    ("kind", "limit", "name", "memory", "unknown"),
    [
        ("NVIDIA H100 80GB HBM3", 60 * GIB, "h100", 60 * GIB, False),
        ("TPU v5 lite", None, "v5e", DEVICES["v5e"].memory, False),
        ("TPU v5", None, "v5p", DEVICES["v5p"].memory, False),
        ("NVIDIA L4", 20 * GIB, "NVIDIA L4", 20 * GIB, True),
    ],
)
def test_the_memory_of_the_device_at_hand_is_what_its_allocator_says(
    monkeypatch, caplog, kind, limit, name, memory, unknown
):
    class Found:
        platform = "tpu" if kind.startswith("TPU") else "gpu"
        device_kind = kind

        def memory_stats(self):
            return {"bytes_limit": limit} if limit else None

    monkeypatch.setattr(hardware.jax, "devices", lambda: [Found()])
    monkeypatch.setattr(hardware.jax, "local_device_count", lambda: 2)
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "84")
    with caplog.at_level(logging.WARNING):
        found = device_at_hand()
    assert (found.name, found.memory, found.pinned_limit) == (name, memory, 42 * GIB)
    told = "unknown device 'NVIDIA L4': the planner takes its memory (20.0 GiB) from its allocator and assumes "
    assert [record.getMessage()[: len(told)] for record in caplog.records] == [told] * unknown


def test_a_device_of_unknown_memory_is_asked_for(monkeypatch):
    class Found:
        platform, device_kind = "gpu", "Other"

        def memory_stats(self):
            return None

    monkeypatch.setattr(hardware.jax, "devices", lambda: [Found()])
    with pytest.raises(InputError, match="memory of the device 'Other' is not known; --device names one of h100"):
        device_at_hand()
