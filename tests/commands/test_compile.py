"""`eabf compile`, from the command line to table and file."""

import json
from pathlib import Path

import pytest

from eabf_jax import cli
from eabf_jax.hardware import DEVICES, GIB
from eabf_jax.training.plan import plan
from eabf_jax.training.recipe import load_config
from eabf_jax.training.trainer import extended_config

PAPER = ("--config_path", str(Path(__file__).parents[2] / "configs/llama2_7b_eabf_16k.yaml"))


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", *arguments])
    return stop.value.code


def test_without_a_topology_the_memory_is_predicted(tmp_path, capsys):
    out = tmp_path / "figures.json"
    settings = ("--device", "h200", "--devices", "2", "--compute.remat", "dots:8,full", "--compute.gather", "layer")
    assert run(*PAPER, *settings, "--json", str(out)) == 0
    found = json.loads(out.read_text())
    config = load_config([*PAPER, "--compute.remat", "dots:8,full"])
    mesh = {"data": 1, "fsdp": 2, "context": 1, "tensor": 1}
    expected = plan(config, extended_config(config), mesh, DEVICES["h200"])
    assert found["gib_per_device"] == round(expected.total / GIB, 3)
    assert (found["device"], found["mesh"], found["remat"]) == ("h200", mesh, "dots:8,full")
    # Each part is rounded to a thousandth.
    assert sum(found["gib_by_part"].values()) == pytest.approx(found["gib_per_device"], abs=0.005)
    assert "predicted, of 135.60 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*PAPER, "--device", "h100", "--compute.optimizer_memory", "device"), "the step needs 107."),
        ((*PAPER, "--topology", "v4-9"), "unknown TPU slice 'v4-9'"),
        ((*PAPER, "--topology", "v4-8", "--device", "h100"), "leave out --device"),
        ((*PAPER, "--for", "generate"), "--for generate compiles for a TPU slice: name it with --topology"),
        ((*PAPER, "--device", "h100", "--windw", "3"), "did you mean 'window'"),
        ((*PAPER, "--device", "h100", "--devices", "0"), "--devices 0: a positive number is needed"),
        (("--device", "h100"), "--config_path"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
