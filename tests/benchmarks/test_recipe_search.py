"""Every scheme has the same choices, the lowest loss is chosen, and finished cells are not repeated."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from eabf_jax.data.chat import Encoded
from eabf_jax.data.dataset import DatasetWriter

SHAPE = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 16,
}  # fmt: skip
ROPES = {"pi": {"type": "pi", "base": 10_000, "factor": 2}, "abf": {"type": "abf", "base": 20_000}}


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("recipe_search")


@pytest.fixture
def search(program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the program on a micro model with two configurations; returns its exit status and its file."""
    random = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "data") as writer:
        for split, count in (("train", 8), ("held_out", 3)):
            for number in range(count):
                tokens = random.integers(0, SHAPE["vocab_size"], 32).astype(np.int32)
                writer.add(split, Encoded(tokens, np.ones(32, bool)), f"{split} {number}")
        writer.finish({"vocab_size": SHAPE["vocab_size"]})
    for name, rope in ROPES.items():
        settings = {
            "output": "unused",
            "window": 32,
            "rope": rope,
            "model": {"shape": SHAPE},
            "recipe": {"batch_size": 8, "epochs": 1},
            "compute": {"dtype": "float32", "remat": "none"},
        }
        (tmp_path / f"micro_{name}.yaml").write_text(yaml.safe_dump(settings))

    def start(*arguments: str):
        command = ["x", "--config", str(tmp_path / "micro_{}.yaml"), "--schemes", "pi,abf", "--data"]
        command += [str(tmp_path / "data"), "--json", str(tmp_path / "found.json"), "--bases", "20000,40000"]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        with pytest.raises(SystemExit) as ended:
            program.run(program.main)
        path = tmp_path / "found.json"
        return ended.value.code, json.loads(path.read_text()) if path.is_file() else None

    return start


def test_a_run_is_the_configuration_with_the_choice_in_it(program, search, tmp_path: Path, monkeypatch) -> None:
    trained = []
    train = program.train

    def keep(config):
        trained.append((config.scheme.to_dict(), config.recipe.learning_rate, config.recipe.steps))
        return train(config)

    monkeypatch.setattr(program, "train", keep)
    options = ("--schemes", "abf", "--bases", "40000", "--learning-rates", "1e-3", "--recipe.steps", "1")
    code, found = search("--skip", "1", *options)
    assert code == 0
    assert trained == [({"type": "abf", "base": 40_000.0}, 1e-3, 1)]
    assert found["training_documents"] == [f"train {number}" for number in range(8)]
    assert found["validation_documents"] == ["held_out 1", "held_out 2"]
    assert {"command", "commit", "date", "device", "versions"} < set(found)
    [cell] = found["cells"]
    assert 0 < cell["loss"] == pytest.approx(cell["bands"][0])  # of 32 tokens, one band


def test_every_scheme_has_the_same_choices_and_a_second_start_goes_on(program, search, monkeypatch, capsys) -> None:
    measured = []

    def measure(config, *_):
        base, rate = config.scheme.to_dict()["base"], config.recipe.learning_rate
        measured.append((type(config.rope).__name__, base, rate))
        return {"loss": abs(base - 20_000) / 20_000 + abs(rate - 2e-4) * 1000, "bands": [1.0]}

    monkeypatch.setattr(program, "measure", measure)
    clock = iter(np.arange(0, 1000, 10.0))  # each call is 10 s after the one before
    monkeypatch.setattr(program.time, "monotonic", lambda: float(next(clock)))
    code, found = search("--time-limit", "60")
    assert code == 3 and 0 < len(found["cells"]) < 9
    assert f"time is up with {len(found['cells'])} of 9 runs" in capsys.readouterr().out
    code, found = search()
    assert code == 0
    [again] = found["continued"]
    assert {"command", "commit", "date", "device", "versions"} == set(again) - {"devices"}
    rates = (1e-4, 2e-4, 4e-4)
    assert measured == [
        *(("pi_rope", 10_000, rate) for rate in rates),
        *(("abf_rope", base, rate) for base in (20_000, 40_000) for rate in rates),
    ]
    assert [cell["base"] for cell in found["cells"]] == [None] * 3 + [20_000] * 3 + [40_000] * 3
    best = found["chosen"]["abf"]
    assert (best["base"], best["learning_rate"], best["loss"]) == (20_000, 2e-4, 0)
    assert (best["base_at_the_edge"], best["learning_rate_at_the_edge"]) == (True, False)
    assert search()[0] == 0 and len(measured) == 9
    assert search("--recipe.steps", "9")[0] == 2
    assert "was made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--learning-rates", "0,x"), "--learning-rates 0,x: positive numbers such as 1e-4,2e-4"),
        (("--skip", "3"), "--skip 3 leaves no held-out document"),
        (("--schemes", "pie"), "cannot read the configuration"),
    ],
)
def test_bad_input_is_one_line(search, arguments: tuple[str, ...], complaint: str, capsys) -> None:
    assert search(*arguments) == (2, None)
    assert complaint in capsys.readouterr().err
