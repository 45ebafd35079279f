"""Gives every test eight simulated CPU devices, before JAX is first imported."""

import gc
import multiprocessing
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# The size of XLA's thread pools, of which the default is one thread per device. Each device can then have a thread that
# waits for a collective operation and one that waits to start the next program; with fewer, all threads may wait.
os.environ["NPROC"] = "16"

import jax
import pytest
from forked import Forked

if TYPE_CHECKING:
    from eabf_jax.interop.tokenizer import Tokenizer

# Nearly all the time of these tests is compilation, and each program runs once, so the compiler optimises little. It
# does not split a program over threads either, because there are as many processes as cores. The CPU backend reads
# these flags when it creates its devices. Two others do not see them: the TPU compiler, which would end the process at
# an unknown flag, and the processes that tests start.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {QUICK}")
    jax.devices()

# The garbage collector skips the millions of objects that imports leave, and looks seldom at those of tracing, which
# has few cycles.
gc.disable()


def pytest_xdist_auto_num_workers() -> int:
    """Starts one worker more than there are cores, because a worker often waits for a process that its test started."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


# Their failed assertions show the values compared, as in test files.
pytest.register_assert_rewrite("float64_attention", "gguf_files", "hf_directories", "runs")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches compiled programs for later tests. Each process has its own folder, because JAX writes without locks."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(scope="session")
def quick_flags() -> str:
    """Returns XLA_FLAGS for processes that a test starts: compilation is several times as fast, the code slower."""
    return QUICK


@pytest.fixture(scope="session")
def fork(tmp_path_factory: pytest.TempPathFactory, quick_flags: str) -> Callable[..., Forked]:
    """Starts a program with arguments in a separate process on CPU devices; returns the process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eabf_jax.cli", "eabf_jax.training.trainer"])
    outside = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def start(program: str, *arguments: object, devices: int = 1, **environment: str) -> Forked:
        return Forked(
            context,
            tmp_path_factory.mktemp("process"),
            program,
            [str(argument) for argument in arguments],
            {
                **outside,
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {quick_flags}",
                **environment,
            },
        )

    return start


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Limits torch to one thread, because on small inputs several threads mostly wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer() -> "Tokenizer":
    """Returns the tiny model's tokenizer."""
    from eabf_jax.interop.tokenizer import load_tokenizer

    return load_tokenizer(Path(__file__).parents[1] / "assets/tiny")


@pytest.fixture
def user_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes the example of docs/schemes.md as a user's file; undoes registrations after the test."""
    from eabf_jax.rope import registry
    from eabf_jax.training.recipe import RopeConfig

    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(RopeConfig, "_choice_registry", dict(RopeConfig.get_known_choices()))
    program = Path(__file__).parent / "interop/export/write_export_references.py"
    written: Path = runpy.run_path(str(program))["user_schemes"](tmp_path)
    # Each test has a different module name, because a module is imported only once.
    return written.rename(tmp_path / f"my_schemes_{abs(hash(tmp_path))}.py")
