"""`eabf suggest`, from the command line to evidence, picture and a configuration that trains what was suggested."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flax import nnx

from eabf_jax import load
from eabf_jax.analysis import suggest
from eabf_jax.cli import main
from eabf_jax.data.chat import Encoded
from eabf_jax.data.dataset import DatasetWriter
from eabf_jax.evaluation.documents import read_documents
from eabf_jax.evaluation.perplexity import position_losses
from eabf_jax.interop.native import save_params, write_model_json
from eabf_jax.model import Llama, LlamaConfig
from eabf_jax.training.recipe import load_config
from eabf_jax.training.trainer import train

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=16,
    initializer_range=0.5,
)
WINDOW = 48


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a dataset and a configuration."""
    place = tmp_path_factory.mktemp("suggest")
    (place / "model").mkdir()
    write_model_json(place / "model", CONFIG)
    save_params(place / "model", Llama(CONFIG, rngs=nnx.Rngs(0)).parameters())
    random = np.random.default_rng(0)
    with DatasetWriter(place / "data") as writer:
        for split, count in (("train", 8), ("held_out", 5)):
            for number in range(count):
                tokens = random.integers(0, CONFIG.vocab_size, WINDOW).astype(np.int32)
                writer.add(split, Encoded(tokens, np.ones(WINDOW, bool)), f"{split} {number}")
        short = np.zeros(20, np.int32)
        writer.add("held_out", Encoded(short, np.ones(20, bool)), "short")
        writer.finish({"vocab_size": CONFIG.vocab_size})
    settings = {
        "output": str(place / "run"),
        "window": WINDOW,
        "rope": {"type": "pi", "base": 10_000, "factor": 3},
        "model": {"path": str(place / "model")},
        "data": {"directory": str(place / "data")},
        "recipe": {"batch_size": 8, "steps": 3, "learning_rate": 0.02},
        "compute": {"dtype": "float32", "microbatch_size": 1, "remat": "none"},
    }
    (place / "mine.yaml").write_text(yaml.safe_dump(settings))
    return place


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["suggest", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_written_configuration_trains_the_best_candidate(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, evidence, picture = tmp_path / "suggested.yaml", tmp_path / "evidence.json", tmp_path / "picture.png"
    code = run(
        *("--config_path", str(place / "mine.yaml"), "--write", str(written), "--documents", "3"),
        *("--json", str(evidence), "--figure", str(picture), "--bases", "20000,100000"),
    )
    assert code == 0
    out = capsys.readouterr().out
    found: dict[str, Any] = json.loads(evidence.read_text())
    assert (found["pretrained_window"], found["window"], found["far_band"]) == (16, WINDOW, [36, WINDOW])
    # Two bases, by-parts and YaRN, each with and without; then the best of each family with the other multipliers.
    rounds = [[entry["steps"] for entry in candidate["rounds"]] for candidate in found["candidates"]]
    assert [len(steps) for steps in rounds][:7] == [3, 3, 2, 2, 2, 2, 1]
    assert {tuple(steps) for steps in rounds} == {(0, 1, 3), (0, 1), (0,)}
    assert 8 < len(rounds) <= 8 + 2 * 9
    far = [candidate["rounds"][-1]["far"]["mean"] for candidate in found["candidates"]]
    assert far[0] < far[1]
    assert found["candidates"][0]["scheme"] == found["suggestion"]
    # The configuration is the one given, with the suggested scheme, and its training gives the reported loss.
    config, given = (
        load_config(["--config_path", str(written)]),
        load_config(["--config_path", str(place / "mine.yaml")]),
    )
    assert config.scheme.to_dict() == found["suggestion"]
    config.rope = given.rope
    assert config == given
    config = load_config(["--config_path", str(written), "--output", str(tmp_path / "run")])
    documents = read_documents(str(place / "data"), "held_out", WINDOW, None, skip_shorter=True)[-3:]
    losses = position_losses(load(train(config), dtype="float32")[0], documents).astype(np.float64)
    assert far[0] == pytest.approx(losses[:, 35:].mean(), abs=1e-5)
    inside = found["candidates"][0]["rounds"][-1]["inside"]["mean"]
    assert inside == pytest.approx(losses[:, :15].mean(), abs=1e-5)
    assert "suggested for" in out
    assert f"about {0.0424 * WINDOW**1.628:,.0f}" in out
    assert written.read_text().startswith("# suggested for")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evidence.json", "picture.png", "run", "suggested.yaml"]


def test_one_step_has_one_round_and_a_warm_up_is_shortened(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates whose training diverges come after the others."""
    real, trained = suggest.train, []

    def counted(config: Any) -> Path:
        trained.append((config.recipe.steps, config.recipe.warmup_steps))
        if len(trained) == 1:
            raise suggest.Diverged("not finite at step 1")
        return real(config)

    monkeypatch.setattr(suggest, "train", counted)
    for steps, warmup, expected in ((1, 0, [(1, 0)] * 6), (2, 1, [(1, 0)] * 6 + [(2, 1)] * 2)):
        trained.clear()
        target = tmp_path / f"{steps}.yaml"
        evidence = tmp_path / f"{steps}.json"
        code = run(
            *("--config_path", str(place / "mine.yaml"), "--write", str(target), "--documents", "2"),
            *("--bases", "20000,40000", "--json", str(evidence)),
            *("--recipe.steps", str(steps), "--recipe.warmup_steps", str(warmup)),
        )
        assert (code, trained) == (0, expected)
        rounds = [[entry["steps"] for entry in c["rounds"]] for c in json.loads(evidence.read_text())["candidates"]]
        assert rounds[0][-1] == steps
        assert sum(1 in told for told in rounds) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--write", "mine.txt"), "--write mine.txt: the name of a new .yaml file"),
        (("--write", "nowhere/mine.yaml"), "in a directory that exists"),
        (("--documents", "6"), "--documents 6: at least 2 are needed, and split 'held_out'"),
        (("--documents", "1"), "at least 2 are needed"),
        (("--documents", "0"), "--documents 0: a positive number"),
        (("--split", "validation"), "validation"),
        (("--split", "train"), "--split train is the split that the run trains on"),
        (("--bases", "10,x"), "--bases 10,x: numbers above 1"),
        (("--bases", "1"), "--bases 1: numbers above 1"),
        (("--window", "16"), "window 16 is not larger than the model's own window 16"),
        (("--model.path", "null"), "model.path is not set"),
        (("--recipe.batch_size", "9"), "9"),
        (("--frobnicate", "1"), "frobnicate"),
    ],
)
def test_bad_input_is_one_line_before_the_search(
    options: tuple[str, ...], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--config_path": str(place / "mine.yaml"), "--write": str(tmp_path / "s.yaml"), "--documents": "3"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    assert run(*(part for pair in given.items() for part in pair)) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
