import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from eabf_jax import cli
from eabf_jax.errors import InputError
from eabf_jax.hardware import DEVICES, GIB
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.parallel.topology import compile_only_devices, tpu_slice
from eabf_jax.training import compile as command
from eabf_jax.training.plan import plan
from eabf_jax.training.recipe import load_config
from eabf_jax.training.trainer import extended_config, lower_train_step

ROOT = Path(__file__).parents[2]
PAPER = ("--config_path", str(ROOT / "configs/llama2_7b_eabf_16k.yaml"))
# Small, but with grouped heads of the width that the TPU's kernels need, and both kinds of layer (exempt and scaled).
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 1024,
}
# By hand: q, k, v, o, gate, up, down and two norms per layer; embedding, output and last norm.
PARAMETERS = 3 * (512 * 512 + 2 * 512 * 256 + 512 * 512 + 3 * 512 * 1024 + 2 * 512) + 2 * 512 * 512 + 512


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    values = {
        "output": "runs/small",
        "window": 2048,
        "rope": {"type": "eabf", "base": 500_000, "pretrained_window": 1024, "unscaled_layers": 2},
        "model": {"shape": SHAPE},
        "recipe": {"batch_size": 8},
        "compute": {"remat": "full"},
    }
    path = tmp_path_factory.mktemp("compile") / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", *arguments])
    return stop.value.code


def test_a_step_is_compiled_for_a_tpu_slice_that_is_not_there(config_path, tmp_path, capsys):
    out = tmp_path / "figures.json"
    mesh = ("--mesh.fsdp", "2", "--mesh.context", "2")
    assert run("--topology", "v4-8", "--config_path", config_path, *mesh, "--json", str(out)) == 0
    assert "compiled, of 30.75 GiB" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found["topology"], found["chips"]) == ("v4-8", 4)
    assert found["mesh"] == {"data": 1, "fsdp": 2, "context": 2, "tensor": 1}
    parts = found["hbm_gib_by_part"]
    # Norm scales (seven of 512 numbers) are on every chip; the figures are rounded to a thousandth.
    share = ((PARAMETERS - 7 * 512) / 4 + 7 * 512) / GIB
    for name, size in {"parameters": 2, "master rest": 2, "moments": 8, "gradients": 4}.items():
        assert parts[name] == pytest.approx(size * share, abs=0.0006)
    assert found["hbm_gib_per_chip"] == pytest.approx(sum(parts.values()), abs=0.004)
    assert parts["workspace"] > 0
    # Each layer's parameters are gathered per microbatch, forward and backward: 3 of 4 parts, 2 bytes per number.
    layers = 2 * PARAMETERS * 3 / 4
    assert found["collective_bytes_per_chip"]["all-gather"] > 2 * layers
    assert found["versions"]["libtpu"] != "unknown"
    estimate = found["estimate"]
    assert estimate["step_seconds_at_least"] <= estimate["step_seconds_without_overlap"]


def test_the_step_that_is_compiled_runs_the_splash_kernel(config_path):
    config = load_config(["--config_path", config_path])
    mesh = make_mesh(MeshConfig(fsdp=4), compile_only_devices(tpu_slice("v4-8")))
    text = lower_train_step(config, mesh).as_text()
    assert "tpu_custom_call" in text and "splash_mha_fwd" in text and "splash_mha_dkv" in text


def test_processes_compile_at_the_same_time():
    compile_only_devices(tpu_slice("v4-8"))  # this process is using the compiler
    code = (
        "import jax, jax.numpy as jnp\n"
        "from eabf_jax.parallel.topology import compile_only_devices, tpu_slice\n"
        "from jax.sharding import SingleDeviceSharding\n"
        "at = SingleDeviceSharding(compile_only_devices(tpu_slice('v4-16'))[0])\n"
        "jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=at)).compile()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (40.89G) exceeds available HBM (30.75G). HLO module: jit_train_step.",
            "40.89 GiB of 30.75",
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 36.10G "
            "of 30.75G hbm. Exceeded hbm capacity by 5.35G.",
            "36.10 GiB of 30.75",
        ),
    ],
)
def test_a_step_that_the_compiler_finds_too_large_is_one_line(config_path, monkeypatch, capsys, text, told):
    """The texts are from libtpu 0.0.52 and an older release."""
    refuse_to_compile(monkeypatch, text)
    assert run("--topology", "v4-8", "--config_path", config_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs more memory than a chip of v4-8 has" in line and told in line


def refuse_to_compile(monkeypatch, text):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(command, "lower_train_step", lambda config, mesh: Lowered())


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        # Compiled in benchmarks/results/tpu_table.json: 29.4 GiB; at 65,536 tokens, on the next larger slice.
        (
            (),
            r"by prediction \(29\.\d GiB\): mesh.fsdp 2, mesh.context 2, compute.remat full, compute.microbatch_size 1",
        ),
        (("--window", "65536"), r"by prediction on v4-16 \(2\d\.\d GiB\): mesh.fsdp 4, mesh.context 2"),
        (("--window", str(2**26)), "no v4 slice is large enough, by prediction"),
    ],
    ids=str,
)
def test_a_refusal_names_what_fits(monkeypatch, capsys, settings, advice):
    refuse_to_compile(monkeypatch, "RESOURCE_EXHAUSTED: Used 36.10G of 30.75G hbm.")
    assert run(*PAPER, "--topology", "v4-8", *settings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(advice, line), line


def test_mesh_auto_chooses_what_fits(monkeypatch, capsys, tmp_path):
    """The mesh that the planner names is compiled, or shown if there is no topology."""
    seen = []
    monkeypatch.setattr(command, "lower_train_step", lambda config, mesh: seen.append((config, mesh)))
    with pytest.raises(AttributeError):
        run(*PAPER, "--topology", "v4-8", "--mesh", "auto")
    ((_, mesh),) = seen
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "context": 2, "tensor": 1} and mesh.size == 4
    out = tmp_path / "figures.json"
    assert run(*PAPER, "--mesh", "auto", "--device", "h100", "--devices", "2", "--json", str(out)) == 0
    assert json.loads(out.read_text())["mesh"] == {"data": 1, "fsdp": 2, "context": 1, "tensor": 1}


def test_an_argument_that_the_program_drops_takes_no_memory():
    """With float32 compute, the master's second half is empty, and no program takes it as an argument."""

    def step(state, batch):
        return dataclasses.replace(state, params=state.params + batch)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class State:
        params: Any
        rest: Any
        mu: Any
        nu: Any
        frozen: Any

    of = jax.ShapeDtypeStruct((8, 128), "float32")
    state = State(of, jax.ShapeDtypeStruct((0,), "int16"), of, of, {})
    lowered = jax.jit(step).lower(state, of)
    assert command._state_bytes(lowered.compile(), lowered) == {"parameters": 4096.0, "moments": 8192.0}


def test_other_errors_of_the_compiler_stay_what_they_are(config_path, monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(command, "lower_train_step", lambda config, mesh: Lowered())
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        cli.main(["compile", "--topology", "v4-8", "--config_path", config_path])


def test_the_estimate_is_what_the_slowest_resource_takes():
    config = load_config([*PAPER, "--compute.remat", "full"])
    found = plan(config, extended_config(config), {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}, DEVICES["v4"])
    slice_ = tpu_slice("v4-32")
    # 2 x 16,384 tokens per chip; per token 6 x 6.607e9 parameters in products + 6 x 32 x 4096 x 16384 of attention
    flops = 2 * 16384 * (6 * (6_738_415_616 - 32000 * 4096) + 6 * 32 * 4096 * 16384)
    assert found.model_flops == pytest.approx(flops, rel=1e-12)
    # Everything except the down projections is computed again.
    again = 2 * 16384 * 32 * (2 * 16384 * 4096 + 2 * 4096 * (4 * 4096 + 2 * 11008))
    assert found.recomputed_flops == pytest.approx(again, rel=1e-12)
    estimate = command.roofline(found, slice_, 3 * 45e9 * 100.0)
    assert estimate["compute_seconds"] == pytest.approx((flops + again) / 275e12)
    assert estimate["ici_seconds"] == pytest.approx(100.0)
    assert estimate["step_seconds_at_least"] == pytest.approx(100.0)
    assert estimate["mfu_at_most"] == pytest.approx(flops / 275e12 / 100.0)


def test_a_missing_compiler_is_one_line(config_path, monkeypatch, capsys):
    def missing(slice_):
        raise InputError("the TPU compiler is not installed: pip install libtpu")

    monkeypatch.setattr(command, "compile_only_devices", missing)
    assert run("--topology", "v4-8", "--config_path", config_path) == 2
    assert "pip install libtpu" in capsys.readouterr().err
