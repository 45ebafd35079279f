"""Eight simulated CPU devices for every test; set before JAX is first imported."""

import gc
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

if TYPE_CHECKING:
    from eabf_jax.interop.tokenizer import Tokenizer

# Nearly all the time of these tests is compilation, and what they compile runs once: the compiler need not try hard.
# It need not cut a program up for threads either, where as many processes as cores compile.
# The CPU's compiler reads these flags as its devices are made. The TPU's, which would end the process at a flag that it
# does not know, and the processes that tests start do not see them.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {QUICK}")
    jax.devices()

# The millions of objects that imports make stay to the end: the collector need not look at them, now or later. Tracing
# makes many more, but hardly a cycle: it need not look often.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


# Their assertions tell what differs, as those of test files do.
pytest.register_assert_rewrite("float64_attention", "gguf_files", "hf_directories", "runs")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test has compiled, the next one reads; JAX writes without locks, so each process has its own folder."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session")
def quick_flags() -> str:
    """XLA_FLAGS for processes that a test starts: programs compile several times as fast, into slower code."""
    return QUICK


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes in one thread: for little work at a time, several would wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> "Tokenizer":
    """The tiny model's."""
    from eabf_jax.interop.tokenizer import load_tokenizer

    return load_tokenizer(Path(__file__).parents[1] / "assets/tiny")


@pytest.fixture
def user_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's file with the example of docs/schemes.md; what is registered during the test is forgotten after it."""
    from eabf_jax.rope import registry
    from eabf_jax.training.recipe import RopeConfig

    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(RopeConfig, "_choice_registry", dict(RopeConfig.get_known_choices()))
    program = Path(__file__).parent / "interop/export/write_export_references.py"
    written: Path = runpy.run_path(str(program))["user_schemes"](tmp_path)
    # A name of its own in each test, because a module is imported only once.
    return written.rename(tmp_path / f"my_schemes_{abs(hash(tmp_path))}.py")
