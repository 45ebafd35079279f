"""A scheme from a user's file in every command: training, evaluation, cached decoding, export, prediction."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from eabf_jax import cli, load
from eabf_jax.inference import Generator
from eabf_jax.rope import Scheme
from eabf_jax.training.recipe import dump_config

ROPE = {"type": "sharp_slow_half", "base": 10_000.0, "factor": 2.0, "pretrained_window": 32, "strength": 0.5}
AFTER_AT = "{type: sharp_slow_half, factor: 2, pretrained_window: 32, strength: 0.5}"


def main(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


def yaml_of(config: Any, path: Path) -> str:
    path.write_text(yaml.safe_dump(yaml.safe_load(dump_config(config)) | {"rope": ROPE}))
    return str(path)


def test_every_command_knows_an_imported_scheme(
    user_schemes: Path, run_config, base_model, dataset, tmp_path: Path, monkeypatch, capsys
) -> None:
    config = yaml_of(run_config(tmp_path / "run", recipe={"steps": 1}), tmp_path / "run.yaml")
    assert main("train", "--config_path", config) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unknown rotary scheme 'sharp_slow_half'" in error and "--import" in error
    known = ["--import", str(user_schemes)]
    assert main("train", *known, "--config_path", config, "--rope.strength", "0.5") == 0
    s = Scheme.from_dict(ROPE)
    model, _ = load(tmp_path / "run", dtype="float32")
    assert model.config.rope == s

    # Cached decoding across the end of the pretrained window equals the repeated argmax of full forward passes.
    row = list(range(29))
    forward = jax.jit(lambda tokens: model(tokens))
    for _ in range(8):
        padded = jnp.array([row + [0] * (37 - len(row))])
        row.append(int(forward(padded)[0, len(row) - 1].argmax()))
    (completion,) = Generator(model, attention="reference").generate([row[:29]], 8)
    assert completion.tokens == row[29:]

    figures = tmp_path / "figures.json"
    models = [f"plain={base_model}", f"at={base_model}@{AFTER_AT}"]
    options = [option for name in models for option in ("--model", name)]
    options += [*("--data", str(dataset), "--split", "train", "--documents", "8", "--batch-size", "1")]
    options += [*("--length", "40", "--skip-shorter", "--bands", "0,32,40", "--dtype", "float32")]
    assert main("evaluate", "perplexity", *known, *options, "--json", str(figures)) == 0
    bands = json.loads(figures.read_text())["bands"]
    assert bands["plain"][1]["mean"] != bands["at"][1]["mean"]

    monkeypatch.setattr(
        sys, "argv", ["to_hf.py", *known, "--src", str(tmp_path / "run"), "--dst", str(tmp_path / "hf")]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).parents[2] / "convert/to_hf.py"), run_name="__main__")
    assert ended.value.code == 0
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert written["eabf_scheme"] == ROPE and written["eabf_rotary"]["logit_scale"]["kind"] == "by_position"
    exported, _ = load(tmp_path / "hf", dtype="float32")
    assert exported.config.rope == s
    tokens = np.array([row])
    np.testing.assert_array_equal(forward(tokens), jax.jit(lambda x: exported(x))(tokens))


def test_a_bad_import_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("train",), ("compile",), ("generate",), ("evaluate", "perplexity"), ("prepare",)):
        assert main(*command, "--import", str(tmp_path / "none.py")) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--import {tmp_path / 'none.py'} cannot be imported: FileNotFound" in error
