"""Eight simulated CPU devices for every test; set before JAX is first imported."""

import os
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
# Nearly all the time of these tests is compilation, and what they compile runs once: the compiler need not try hard.
# Only flags that the TPU's compiler knows too, which ends the process at any other.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For tests whose time is nearly all compilation: the compiler need not try hard."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
