"""Records where a figure comes from, and detects whether the code that it measures has changed since.

Every benchmark puts `record(...)` into its result file. `changed(report)` returns the measured files that have changed,
and plot_performance.py marks such a figure as stale. A digest covers only the code, not comments, docstrings and
layout.
"""

import ast
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# The code in this folder only acts across devices, so figures of one device do not depend on it.
SHARING = "eabf_jax/parallel/"
_ATTENTION = tuple(
    f"eabf_jax/model/attention/{name}.py" for name in ("__init__", "backend", "chunked", "cudnn", "reference", "splash")
)
_STEP = (
    *_ATTENTION,
    *(f"eabf_jax/model/{name}.py" for name in ("llama", "parameters")),
    *(f"eabf_jax/rope/{name}.py" for name in ("frequencies", "logit_scale")),
    *(f"{SHARING}{name}.py" for name in ("context", "fsdp", "rules")),
    *(
        f"eabf_jax/training/{name}.py"
        for name in ("backward", "host_memory", "layerwise", "loss", "master", "optimizer", "plan", "step")
    ),
    "eabf_jax/hardware.py",
)
# The code that each benchmark measures: the files that run while its clock runs, and those that choose their settings.
MEASURED: Mapping[str, tuple[str, ...]] = {
    "train_step": ("benchmarks/train_step.py", "benchmarks/peer_train_step.py", *_STEP),
    "torchtitan_step": ("benchmarks/torchtitan_step.py",),
    "whole_run": (
        "benchmarks/whole_run.py",
        *_STEP,
        *(f"eabf_jax/training/{name}.py" for name in ("checkpoint", "trainer")),
        *(f"eabf_jax/interop/{name}.py" for name in ("native", "safetensors_stream")),
    ),
    "generate": (
        "benchmarks/generate.py",
        *_ATTENTION,
        *(f"eabf_jax/model/{name}.py" for name in ("decoder", "kv_cache", "llama", "parameters")),
        *(f"eabf_jax/rope/{name}.py" for name in ("frequencies", "logit_scale")),
        *(f"eabf_jax/inference/{name}.py" for name in ("generate", "placement", "sampling")),
        "eabf_jax/hardware.py",
    ),
    "gpu_numerics": (
        "benchmarks/gpu_numerics.py",
        *_ATTENTION,
        *(f"eabf_jax/model/{name}.py" for name in ("decoder", "kv_cache", "llama", "parameters")),
        *(f"eabf_jax/rope/{name}.py" for name in ("frequencies", "logit_scale", "named", "registry", "schemes")),
        *(f"eabf_jax/inference/{name}.py" for name in ("generate", "placement")),
        "eabf_jax/training/backward.py",
    ),
    "llama_cpp_parity": (
        *(f"benchmarks/llama_cpp_{name}.py" for name in ("parity", "peer")),
        *(
            f"eabf_jax/interop/gguf{name}.py"
            for name in ("", "_architectures", "_rope", "_tokenizer", "_vocabulary", "_writer")
        ),
    ),
}

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
    *("torch", "transformers", "triton", "liger-kernel", "torchtitan"),
)
# Prefixes of environment variables that change a measurement.
ENVIRONMENT = ("XLA_", "JAX_", "LIBTPU_", "CUDA_VISIBLE_DEVICES", "PYTORCH_", "TORCH", "NCCL_")
COMMIT = "BENCHMARK_COMMIT"


def record(benchmark: str) -> dict[str, Any]:
    """Returns the origin of a result, as every result file has it.

    Args:
      benchmark: a key of MEASURED.

    Returns:
      `benchmark`, `command`, `date`, `commit` (null outside a git checkout if BENCHMARK_COMMIT is not set), `versions`,
      `environment`, `card` (null without an NVIDIA driver) and `sources`, the digests by file.
    """
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions()},
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(ENVIRONMENT)},
        "card": card(),
        "sources": {name: digest(ROOT / name) for name in MEASURED[benchmark]},
    }


def changed(report: Mapping[str, Any]) -> list[str] | None:
    """Returns the measured files whose code has changed.

    Args:
      report: a result file.

    Returns:
      The files, empty if the figure is of today's code; None if the report does not record what it measured.
    """
    sources = report.get("sources")
    if sources is None:
        return None
    alone = report.get("devices", 1) == 1
    counted = {name: found for name, found in sources.items() if not (alone and name.startswith(SHARING))}
    return [name for name, found in counted.items() if digest(ROOT / name) != found]


def digest(path: Path) -> str | None:
    """Computes a digest of a Python file's code, without comments, docstrings and layout; None if it does not exist."""
    if not path.is_file():
        return None
    return _digest(path.read_text(encoding="utf-8"))


@functools.cache
def _digest(code: str) -> str:
    return hashlib.sha256(_canonical(ast.parse(code)).encode()).hexdigest()[:16]


def _canonical(node: Any) -> str:
    """Writes a syntax tree as text that, unlike ast.dump's and ast.unparse's, is equal in all releases of Python."""
    if isinstance(node, list):
        # A string on its own is a docstring or has no effect.
        return "[" + " ".join(_canonical(item) for item in node if not _is_text(item)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.JoinedStr):  # Python 3.12 adds empty strings
        return "f[" + " ".join(_canonical(part) for part in node.values if getattr(part, "value", None) != "") + "]"
    # Empty fields are left out, because later releases have fields that earlier ones lack.
    fields = [
        f"{name}={_canonical(value)}" for name, value in ast.iter_fields(node) if value is not None and value != []
    ]
    return f"{type(node).__name__}({' '.join(fields)})"


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def commit() -> str | None:
    """Returns the checked-out commit, with `-dirty` if tracked files differ from it."""
    told = os.environ.get(COMMIT)
    if told:
        return told
    found = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return found or None


def card() -> str | None:
    """Returns name, memory, power limit and driver of the first card."""
    fields = "name,memory.total,power.limit,driver_version"
    found = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def versions() -> dict[str, str]:
    """Returns the versions of the installed PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str:
    """Returns the output of a program; empty if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
