"""`eabf evaluate passkey` and `line-retrieval`, from the command line to table, JSON file and picture."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from eabf_jax import load
from eabf_jax.cli import main
from eabf_jax.commands.evaluate import retrieval
from eabf_jax.commands.evaluate.retrieval import by_length, short_and_long
from eabf_jax.evaluation import line_retrieval, passkey
from eabf_jax.evaluation.intervals import clustered
from eabf_jax.evaluation.retrieval import Cell, measure

TINY = Path(__file__).parents[3] / "assets/tiny"
SCHEME = {"type": "eabf", "base": 100000, "pretrained_window": 512}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("task", ["passkey", "line-retrieval"])
def test_two_schemes_answer_the_same_prompts(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    depths = ("--depths", "0,100") if task == "passkey" else ()
    code = run(
        *(task, "--model", f"own={TINY}", "--model", f"extended={TINY}@{json.dumps(SCHEME)}", "--dtype", "float32"),
        *("--lengths", "240,280", *depths, "--samples", "2", "--seed", "3", "--pretrained-window", "240"),
        *("--json", str(figures), "--figure", str(picture)),
    )
    assert code == 0
    out = capsys.readouterr().out
    assert "≤ 240" in out and "> 240" in out and "note:" not in out
    written = json.loads(figures.read_text())
    assert (written["seed"], written["samples"], written["note"]) == (3, 2, "")
    assert {"command", "device", "versions"} < set(written)
    model, tokenizer = load(TINY, rope=SCHEME, dtype="float32")
    assert tokenizer is not None
    lengths = [240, 280]
    prompts = (
        passkey.prompts(tokenizer, lengths, [0, 100], 2, 3)
        if task == "passkey"
        else line_retrieval.prompts(tokenizer, lengths, 2, 3)
    )
    for cell, found in zip(measure(model, prompts), written["cells"]["extended"], strict=True):
        # Devices share rows equally, so the programs are the same.
        assert found == pytest.approx(dataclasses.asdict(cell))
    # The answers' likelihood differs between the schemes, even where neither finds an answer.
    own, extended = (sum(cell["loss"] for cell in written["cells"][label]) for label in ("own", "extended"))
    assert own != pytest.approx(extended, rel=1e-3)
    assert [row["total"] for row in written["by_length"]["own"]] == [4, 4] if depths else [2, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (
        run("redraw", str(figures), "--json", str(tmp_path / "again.json"), "--figure", str(tmp_path / "again.png"))
        == 0
    )
    # `redraw` gives the same table, file and picture without a model.
    assert capsys.readouterr().out.partition("figures:")[0] == out.partition("figures:")[0]
    assert json.loads((tmp_path / "again.json").read_text()) == written
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()


def test_cells_are_pooled_by_length_and_by_the_pretrained_window() -> None:
    cells = [Cell(n, d, hits, 10, 0.0) for n, d, hits in ((4, 0, 9), (4, 50, 8), (8, 0, 5), (8, 50, 1), (16, 0, 0))]
    assert {n: (share.hits, share.total) for n, share in by_length(cells).items()} == {
        4: (17, 20),
        8: (6, 20),
        16: (0, 10),
    }
    pooled = short_and_long(cells, 4)
    assert {name: (share.hits, share.total) for name, share in pooled.items()} == {"short": (17, 20), "long": (6, 30)}
    # Three cells are three clusters; a length with one cell has no interval.
    assert pooled["long"] == clustered([(5, 10), (1, 10), (0, 10)])
    assert math.isnan(by_length(cells)[16].low)


def test_records_whose_place_is_left_to_chance_count_one_by_one() -> None:
    cells = [Cell(4, None, 2, 50, 0.0), Cell(8, None, 1, 50, 0.0)]
    assert by_length(cells)[4] == clustered([(1, 1)] * 2 + [(0, 1)] * 48)
    assert short_and_long(cells, 8)["short"] == clustered([(1, 1)] * 3 + [(0, 1)] * 97)
    assert list(short_and_long(cells, 16)) == ["short"]


def test_what_keeps_prompts_apart_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "measure", lambda *_, **__: [Cell(160, 50, 0, 1, 0.0)])
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    common = ("--lengths", "160", "--depths", "50", "--samples", "1", "--model", f"a={TINY}", "--model", f"b={other}")
    (other / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "chat_template"})
    )
    assert run("passkey", *common) == 0
    assert "note: the chat templates differ" in capsys.readouterr().out
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<s>"}))
    assert run("passkey", *common, "--no-chat-template") == 0
    assert "note: the tokenizers differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--lengths", "8k"), "--lengths '8k' is not a list of numbers such as 4096,8192"),
        (("--lengths", "200,100"), "--lengths 200,100: ascending numbers from 1"),
        (("--lengths", "0"), "--lengths 0: ascending numbers from 1"),
        (("--lengths", "30"), "length 30: the question alone has"),
        (("--depths", "0,101"), "--depths 0,101: ascending numbers from 0 to 100"),
        (("--samples", "0"), "--samples 0: a positive number"),
        (("--seed", "-1"), "--seed -1: 0 or a positive number"),
        (("--model", "x=nowhere"), "nowhere: no such directory"),
        (("--model", "x=y@pi"), "expected a scheme such as"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("passkey", "--model", str(TINY), "--lengths", "100", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert complaint in error
