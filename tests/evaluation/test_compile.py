"""Evaluation and generation, compiled for TPU slices without a TPU."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from eabf_jax import cli
from eabf_jax.errors import InputError
from eabf_jax.evaluation import compile as command
from eabf_jax.evaluation.scorer import evaluation_mesh
from eabf_jax.model.config import LlamaConfig
from eabf_jax.parallel.topology import tpu_slice
from eabf_jax.training.plan import GIB
from eabf_jax.training.recipe import load_config

# Small, but with grouped heads of the width that the TPU's kernels need.
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 1024,
}
# By hand: q, k, v, o, gate, up, down and two norms per layer; embedding, output and last norm. bfloat16: two bytes.
NORMS = 2 * 5 * 512
KERNELS = 2 * (2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024) + 2 * 512 * 512)
CACHE = 2 * 2 * 2 * 2 * 128 * 1024  # bytes, layers, keys and values, heads, for one row of 1,024 tokens


def compiled(tmp_path: Path, purpose: str, *settings: str) -> dict[str, Any]:
    path, out = tmp_path / "small.yaml", tmp_path / "figures.json"
    rope = {"type": "eabf", "base": 500_000, "pretrained_window": 512, "unscaled_layers": 1}
    shape = {**SHAPE, "max_position_embeddings": 512}
    path.write_text(yaml.safe_dump({"output": "x", "window": 1024, "rope": rope, "model": {"shape": shape}}))
    arguments = ["--topology", "v4-8", "--for", purpose, "--config_path", str(path), "--json", str(out), *settings]
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", *arguments])
    assert stop.value.code == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(
    ("purpose", "settings", "mesh", "rows", "weights", "cache"),
    [
        # small enough that every chip holds the whole model
        ("evaluate", (), {"data": 4}, 4, KERNELS + NORMS, 0),
        ("generate", ("--mesh.tensor", "2"), {"data": 2, "tensor": 2}, 2, KERNELS / 2 + NORMS, CACHE / 2),
    ],
)
def test_memory_of_a_chip(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    purpose: str,
    settings: tuple[str, ...],
    mesh: dict[str, int],
    rows: int,
    weights: float,
    cache: float,
) -> None:
    found = compiled(tmp_path, purpose, *settings)
    assert {axis: size for axis, size in found["mesh"].items() if size > 1} == mesh and found["rows"] == rows
    parts = found["hbm_gib_by_part"]
    assert parts["weights"] == pytest.approx(weights / GIB, abs=0.0006)
    assert parts.get("cache", 0) == pytest.approx(cache / GIB, abs=0.0006)
    assert found["hbm_gib_per_chip"] == pytest.approx(sum(parts.values()), abs=0.002) and parts["workspace"] > 0
    assert "compiled, of 30.75 GiB" in capsys.readouterr().out


def test_a_model_too_large_for_a_device_is_split() -> None:
    config, weights = LlamaConfig(**SHAPE), KERNELS + NORMS

    def scoring(dtype: str, tensor: int, memory: float) -> tuple[int, ...]:
        shape = evaluation_mesh(config, dtype, tensor, memory=memory).shape
        return shape["data"], shape["fsdp"], shape["tensor"]

    assert scoring("bfloat16", 1, 2 * weights) == (8, 1, 1)
    assert scoring("bfloat16", 1, 1.5 * weights) == (1, 8, 1)
    assert scoring("bfloat16", 2, 1.5 * weights) == (4, 1, 2)
    assert scoring("float32", 2, 1.5 * weights) == (1, 4, 2)
    with pytest.raises(InputError, match="tensor is 3, which does not divide the 8 devices"):
        scoring("bfloat16", 3, weights)

    def generating(memory: float, tensor: int = 1) -> int:
        mesh = command._generation_mesh(config, "bfloat16", 1024, tensor, jax.devices(), memory)
        return mesh.shape["tensor"]

    held = weights + CACHE
    assert (generating(2 * held), generating(held), generating(1.0), generating(2 * held, 2)) == (1, 2, 2, 2)


def test_a_refusal_of_the_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Program:
        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 36.10G of 30.75G hbm.")

    monkeypatch.setattr(command, "lower_scoring", lambda *_: Program())
    path = Path(__file__).parents[2] / "configs/llama2_7b_eabf_16k.yaml"
    with pytest.raises(InputError, match=r"a chip of v4-8 has: 36.10 GiB of 30.75$"):
        command.compile_for("evaluate", load_config(["--config_path", str(path)]), tpu_slice("v4-8"))
