"""`eabf entropy`, from the command line to table, JSON and CSV files and picture."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from eabf_jax import load
from eabf_jax.analysis.attention_entropy import attention_entropy
from eabf_jax.cli import main
from eabf_jax.commands.entropy import default_edges
from eabf_jax.evaluation.documents import read_documents

TINY = Path(__file__).parents[2] / "assets/tiny"
EABF = "{type: eabf, base: 100000, pretrained_window: 16, unscaled_layers: 1}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = ("One two three. " * 12, "The history of it all. " * 9, "A question and an answer, " * 7)
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["entropy", "--dtype", "float32", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_table_files_and_picture(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, table, picture = tmp_path / "e.json", tmp_path / "e.csv", tmp_path / "e.png"
    code = run(
        *("--model", f"own={TINY}", "--model", f"EABF={TINY}@{EABF}", "--data", str(texts), "--length", "32"),
        *("--window", "16", "--bands", "0,8,16,32"),
        *("--json", str(figures), "--csv", str(table), "--figure", str(picture)),
    )
    assert code == 0
    out = capsys.readouterr().out
    assert (
        "attention entropy beyond 16 tokens minus that at 8-16, nats, mean over heads, 3 documents of 32"
        in " ".join(out.split())
    )
    written = json.loads(figures.read_text())
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    documents = read_documents(str(texts), "", 32, None, tokenizer=load(TINY)[1])
    ropes = {"own": None, "EABF": {"type": "eabf", "base": 100000, "pretrained_window": 16, "unscaled_layers": 1}}
    for label, rope in ropes.items():
        model = load(TINY, rope=rope, dtype="float32")[0]
        each = np.stack([attention_entropy(model, row[None]) for row in documents]).astype(np.float64)
        means = np.stack([each[..., a:b].mean(-1) for a, b in ((0, 8), (8, 16), (16, 32))], axis=-1)
        change = (means[..., 2] - means[..., 1]).mean(2)  # [documents, layers]
        # Student's t for 2 degrees of freedom is 4.302653 (tables).
        half_widths = 4.302653 * change.std(0, ddof=1) / np.sqrt(3)
        for layer, (mean, half_width) in enumerate(zip(change.mean(0), half_widths, strict=True)):
            assert written["drift"][label][layer] == pytest.approx(
                {"mean": mean, "half_width": half_width}, abs=1e-5, rel=1e-4
            )
            assert f"{mean:.3f} ± {half_width:.3f}" in out
        for layer, head, band in np.ndindex(means.shape[1:]):
            assert written["heads"][label][layer][head][band]["mean"] == pytest.approx(
                means[:, layer, head, band].mean(), abs=1e-5
            )
        assert written["layers"][label][3][1]["mean"] == pytest.approx(means[:, 3, :, 1].mean(), abs=1e-5)
        rows = [line for line in lines if line["model"] == label]
        assert len(rows) == np.prod(means.shape[1:])
        (row,) = (r for r in rows if (r["layer"], r["head"], r["start"], r["end"]) == ("2", "1", "16", "32"))
        assert float(row["mean"]) == pytest.approx(means[:, 2, 1, 2].mean(), abs=1e-5)
    assert written["uniform"][1] == pytest.approx(np.log(np.arange(9, 17)).mean())
    assert written["pretrained_window"] == 16
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "last"),
    [((), "16-20"), (("--bands", "0,8,16"), "8-16")],
)
def test_bands_on_one_side_of_the_window_show_the_last_one(
    options: tuple[str, ...], last: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "e.json"
    code = run("--model", str(TINY), "--data", str(texts), "--length", "20", "--json", str(figures), *options)
    assert code == 0
    assert f"attention entropy at {last}, nats" in capsys.readouterr().out
    assert json.loads(figures.read_text())["drift"] == {str(TINY): []}


def test_default_bands_double_in_two_steps_and_meet_at_the_window() -> None:
    assert default_edges(128, 100) == [0, 16, 23, 32, 45, 50, 64, 91, 100, 128]
    assert default_edges(9, 512) == [0, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--length", "4096"), "the shortest of"),
        (("--length", "32", "--bands", "0,8,64"), "position band ends at 64, the documents at 32 tokens"),
        (("--length", "32", "--bands", "0,eight"), "--bands '0,eight' is not a list of positions"),
        (("--length", "32", "--window", "1"), "--window 1: at least 2 tokens are needed"),
        (("--length", "32", "--window", "16", "--bands", "0,8,16"), "--window 16: no band of 0,8,16 lies beyond it"),
        (("--length", "32", "--window", "16", "--bands", "0,32"), "or none in its last half"),
        (("--length", "32", "--window", "64"), "--window 64: no band of"),
        (("--length", "32", "--csv", "table.txt"), "--csv table.txt ends in '.txt'"),
        (("--documents", "0"), "--documents 0"),
    ],
)
def test_bad_options_are_one_line(
    options: tuple[str, ...], message: str, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", str(TINY), "--data", str(texts), *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
