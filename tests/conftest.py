"""Eight simulated CPU devices for every test; set before JAX is first imported."""

import os
import runpy
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

# Nearly all the time of these tests is compilation, and what they compile runs once: the compiler need not try hard.
# The CPU's compiler reads these flags as its devices are made. The TPU's, which would end the process at a flag that it
# does not know, and the processes that tests start do not see them.
with pytest.MonkeyPatch.context() as patch:
    for flag in ("backend_optimization_level=0", "llvm_disable_expensive_passes=true", "cpu_use_fusion_emitters=false"):
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_{flag}")
    jax.devices()


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For tests whose time is nearly all compilation: the compiler need not try hard."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def user_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's file with the example of docs/schemes.md; what is registered during the test is forgotten after it."""
    from eabf_jax.rope import registry
    from eabf_jax.training.recipe import RopeConfig

    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(RopeConfig, "_choice_registry", dict(RopeConfig.get_known_choices()))
    written: Path = runpy.run_path(str(Path(__file__).parent / "interop/write_export_references.py"))["user_schemes"](
        tmp_path
    )
    # A name of its own in each test, because a module is imported only once.
    return written.rename(tmp_path / f"my_schemes_{abs(hash(tmp_path))}.py")
