"""The arithmetic around torchtitan's steps; the steps themselves need a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eabf_jax.errors import InputError
from eabf_jax.training.recipe import load_config

CONFIG = Path(__file__).parents[2] / "configs/llama2_7b_eabf_16k.yaml"


@pytest.fixture
def program(load_program):
    return load_program("torchtitan_step")


@pytest.fixture
def call(program, monkeypatch, tmp_path):
    """Runs the program with simulated processes; returns its file."""

    def run(process, *arguments):
        path = tmp_path / "out.json"
        monkeypatch.setattr(program, "record", lambda name: {"benchmark": name})
        monkeypatch.setattr(program.subprocess, "run", process)
        monkeypatch.setattr(
            sys, "argv", ["torchtitan_step", "--config_path", str(CONFIG), "--json", str(path), *arguments]
        )
        program.main()
        return json.loads(path.read_text())

    return run


def test_the_rate_is_that_of_the_median_step(call):
    def process(command, **_):
        mode, path = (command[len(command) - 1 - command[::-1].index(word) + 1] for word in ("--only", "--json"))
        assert mode == "full" and command[2:4] == ["--config_path", str(CONFIG)]
        measured = {"device": "NVIDIA H100 80GB HBM3", "seconds": [4.0, 9.0, 5.0], "peak_gib": 60.0}
        Path(path).write_text(json.dumps(measured))
        return subprocess.CompletedProcess(command, 0, stderr="")

    found = call(process, "--modes", "full", "--microbatches", "3")["modes"]["full"]
    assert found["tokens_per_second"] == pytest.approx(3 * 16_384 / 5.0)
    # 6 x (6,738,415,616 - 32,000 x 4,096) + 6 x 32 x 4,096 x 16,384 FLOPs per token, of 989.4 TFLOP/s
    flops = 6 * (6_738_415_616 - 32_000 * 4_096) + 6 * 32 * 4_096 * 16_384
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * flops / 989.4e12)
    assert not found["out_of_memory"] and load_config(["--config_path", str(CONFIG)]).window == 16_384


def test_a_mode_that_does_not_fit_leaves_the_others(call):
    def process(command, **_):
        full = command[-3] == "full"
        told = "ValueError: no\n" if full else "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n"
        return subprocess.CompletedProcess(command, 1, stderr=told)

    modes = call(process, "--modes", "none", "full")["modes"]
    assert modes["none"] == {"out_of_memory": True, "error": "torch.OutOfMemoryError: CUDA out of memory. Tried"}
    assert modes["full"] == {"out_of_memory": False, "error": "ValueError: no"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--modes", "ful"), "invalid choice: 'ful'"),
        (("--steps", "0"), "--steps 0: a positive number"),
        (("--length", "0"), "--length 0: a positive number"),
        (("--microbatches", "-1"), "--microbatches -1: a positive number"),
    ],
)
def test_bad_input_is_refused_before_any_process_starts(call, arguments, complaint):
    def process(*_, **__):
        pytest.fail("a process was started")

    with pytest.raises(InputError, match=complaint):
        call(process, *arguments)
