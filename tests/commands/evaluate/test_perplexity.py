"""`eabf evaluate perplexity`, from the command line to table, JSON file and picture."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from eabf_jax import load
from eabf_jax.cli import main
from eabf_jax.commands.evaluate.perplexity import default_edges
from eabf_jax.data.chat import Encoded
from eabf_jax.data.dataset import DatasetWriter
from eabf_jax.evaluation.documents import read_documents
from eabf_jax.evaluation.perplexity import position_losses, sliding_losses
from eabf_jax.interop.native import save_params, write_model_json
from eabf_jax.model import Llama, LlamaConfig

TINY = Path(__file__).parents[3] / "assets/tiny"
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


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_model_json(directory, CONFIG)
    save_params(directory, Llama(CONFIG, rngs=nnx.Rngs(0)).parameters())
    return directory


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "documents"
    random = np.random.default_rng(0)
    with DatasetWriter(directory) as writer:
        for number, length in enumerate((48, 40, 44)):
            tokens = random.integers(0, CONFIG.vocab_size, length).astype(np.int32)
            writer.add("held_out", Encoded(tokens, np.ones(length, bool)), f"document {number}")
        writer.finish({"vocab_size": CONFIG.vocab_size})
    return directory


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "perplexity", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_two_schemes_side_by_side(
    model_directory: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    scheme = "{type: eabf, base: 500000, pretrained_window: 16}"
    code = run(
        *("--model", f"own={model_directory}", "--model", f"extended={model_directory}@{scheme}"),
        *("--data", str(dataset), "--bands", "0,16,40", "--dtype", "float32"),
        *("--json", str(figures), "--figure", str(picture)),
    )
    assert code == 0
    out = capsys.readouterr().out
    written = json.loads(figures.read_text())
    assert written["documents"] == 3
    assert written["length"] == 40  # of the shortest document
    documents = read_documents(str(dataset), "held_out", 40, None)
    title = "loss by position, nats per token, 3 documents of 40 tokens"
    assert (written["table"]["title"], written["table"]["header"]) == (title, ["model", "0-16", "16-40"])
    rows = {row[0]: row[1:] for row in written["table"]["rows"]}
    for label, rope in {"own": None, "extended": {"type": "eabf", "base": 500000, "pretrained_window": 16}}.items():
        model, tokenizer = load(model_directory, rope=rope, dtype="float32")
        assert tokenizer is None
        losses = position_losses(model, documents)
        for band, (start, end) in zip(written["bands"][label], ((1, 16), (16, 40)), strict=True):
            expected = losses[:, start - 1 : end - 1].mean()  # float32; the report has float64
            assert band["mean"] == pytest.approx(expected, rel=1e-6)
            assert f"{expected:.3f}" in out
            assert f"{expected:.3f}" in rows[label]  # without the markup of the best figure
    # Within the pretrained window the multiplier is 1, but the base differs; past it both do.
    assert written["bands"]["own"][1]["mean"] != written["bands"]["extended"][1]["mean"]
    # The file has the picture's values: 32 bands of the 39 positions with a loss.
    curve = written["curves"]["extended"]
    assert (len(curve), curve[0]["start"], curve[-1]["end"], written["pretrained_window"]) == (32, 1, 40, 16)
    sizes = [band["end"] - band["start"] for band in curve]
    assert sum(sizes) == 39
    assert np.dot(sizes, [band["mean"] for band in curve]) / 39 == pytest.approx(losses.mean(), rel=1e-6)
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = str(tmp_path / "again.json"), str(tmp_path / "again.png")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "redraw", str(figures), "--json", again[0], "--figure", again[1]])
    assert ended.value.code == 0
    # `redraw` gives the same table, file and picture without a model.
    assert capsys.readouterr().out.partition("figures:")[0] == out.partition("figures:")[0]
    assert json.loads(Path(again[0]).read_text()) == written
    assert Path(again[1]).read_bytes() == picture.read_bytes()


def test_windows_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With two texts, two windows and two schemes, the figures follow from the losses, paired by document."""
    lines = [
        "{}".format(json.dumps({"text": text * 6})) for text in ("One two three. ", "The history of it all. ", "a ")
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.svg"
    scheme = {"type": "eabf", "base": 100000, "pretrained_window": 16}
    code = run(
        *("--model", f"own={TINY}", "--model", f"extended={TINY}@{json.dumps(scheme)}", "--dtype", "float32"),
        *("--data", str(tmp_path / "texts.jsonl"), "--length", "24", "--skip-shorter", "--windows", "8,24"),
        *("--stride", "3", "--json", str(figures), "--figure", str(picture)),
    )
    assert code == 0
    out = capsys.readouterr().out
    written = json.loads(figures.read_text())
    assert (written["documents"], written["length"]) == (2, 24)
    assert {"command", "device", "versions"} < set(written)
    _, tokenizer = load(TINY)
    documents = read_documents(str(tmp_path / "texts.jsonl"), "", 24, None, tokenizer=tokenizer, skip_shorter=True)
    means = {}
    for label, rope in {"own": None, "extended": scheme}.items():
        model, _ = load(TINY, rope=rope, dtype="float32")
        for number, window in enumerate((8, 24)):
            found = written["windows"][label][number]
            means[label, window] = sliding_losses(model, documents, window, 3).mean(axis=1)
            perplexity = np.exp(means[label, window].mean())  # a few float32 roundings of 2e-7 in the exponent, 4.5
            assert (found["window"], found["stride"]) == (window, 3)
            assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5)
            assert f"{perplexity:.3f}" in out
    difference = means["extended", 24] - means["own", 24]
    assert written["beside_first"]["own"][1] == {"mean": 0.0, "half_width": 0.0}
    # The difference of two float32 means near 4.5, each with a few roundings of 2e-7.
    assert written["beside_first"]["extended"][1]["mean"] == pytest.approx(difference.mean(), abs=1e-6)
    # With two documents, the half-width is Student's t of 1 degree of freedom, 12.7062, x half of their difference.
    expected = 12.7062 * abs(difference[0] - difference[1]) / 2
    assert written["beside_first"]["extended"][1]["half_width"] == pytest.approx(expected, rel=1e-3)
    assert picture.read_text().lstrip().startswith("<?xml")


def repeated_texts(path: Path, count: int = 3, words: int = 40) -> Path:
    """Writes texts whose second half repeats the first, and one without repetition, which may have no key token."""
    draw = random.Random(1)
    nouns = ["river", "meadow", "lantern", "copper", "violin", "harbour", "winter", "garden", "paper", "silver"]
    halves = [" ".join(f"{draw.choice(nouns)} {draw.randint(10, 99)}" for _ in range(words)) for _ in range(count + 2)]
    texts = [f"{half} {half}" for half in halves[:count]] + [f"{halves[-2]} {halves[-1]}"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_loss_on_key_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures follow from the losses by the definition; table, JSON and picture are drawn again alike."""
    texts, figures, picture = repeated_texts(tmp_path / "texts.jsonl"), tmp_path / "a.json", tmp_path / "a.png"
    scheme = {"type": "pi", "factor": 4}
    length, context, stride = 280, 60, 20
    code = run(
        *("--model", f"pi={TINY}@{json.dumps(scheme)}", "--model", f"own={TINY}", "--dtype", "float32"),
        *("--data", str(texts), "--length", str(length), "--key-tokens", "own", "--bands", "0,60,80,180,280"),
        *("--short-context", str(context), "--short-stride", str(stride), "--json", str(figures)),
        *("--figure", str(picture)),
    )
    assert code == 0
    out = capsys.readouterr().out
    written = json.loads(figures.read_text())
    found = written["key_tokens"]
    assert (found["evaluator"], found["short_context"], found["short_stride"]) == ("own", context, stride)
    model, tokenizer = load(TINY, dtype="float32")
    documents = read_documents(str(texts), "", length, None, tokenizer=tokenizer)
    long, short = position_losses(model, documents), sliding_losses(model, documents, context + stride, stride)
    losses = {"own": long, "pi": position_losses(load(TINY, rope=scheme, dtype="float32")[0], documents)}
    bands = [(0, 60), (60, 80), (80, 180), (180, 280), (0, 280)]
    for label in ("own", "pi"):
        for part, paired, (start, end) in zip(found["losses"][label], found["beside_first"][label], bands, strict=True):
            means, differences, tokens = [], [], 0
            for row in range(len(documents)):
                keys = [
                    position
                    for position in range(max(start, context + stride), end)
                    if short[row, position - 1] - long[row, position - 1] > 2 and long[row, position - 1] < 2
                ]
                if keys:
                    means.append(np.mean([losses[label][row, position - 1] for position in keys], dtype=np.float64))
                    first = np.mean([losses["pi"][row, position - 1] for position in keys], dtype=np.float64)
                    differences.append(means[-1] - first)
                    tokens += len(keys)
            assert (part["start"], part["end"], part["tokens"], part["documents"]) == (start, end, tokens, len(means))
            if not means:
                assert end <= context + stride and part["mean"] is None and part["perplexity"] is None
                continue
            # Means of float32 losses that two programs may round differently.
            assert part["mean"] == pytest.approx(np.mean(means), rel=1e-5)
            assert part["perplexity"] == pytest.approx(np.exp(np.mean(means)), rel=1e-4)
            assert paired["mean"] == pytest.approx(np.mean(differences), abs=1e-4)
            if len(means) > 1:
                interval = scipy.stats.ttest_1samp(means, 0).confidence_interval(0.95)
                assert part["half_width"] == pytest.approx((interval.high - interval.low) / 2, rel=1e-4)
                assert part["high"] == pytest.approx(np.exp(interval.high), rel=1e-4)
    # The repeated halves have key tokens.
    whole = found["losses"]["own"][-1]
    assert whole["tokens"] > 20
    rows = {row[0]: row[1:] for row in written["table"]["rows"]}
    assert rows["own"][:2] == ["–", "–"] and rows["own"][-1] == f"{whole['mean']:.3f}"
    assert rows["key tokens (documents)"][-1] == f"{whole['tokens']} ({whole['documents']})"
    assert len(written["bands"]["own"]) == 4  # the loss on all tokens is there too
    again = str(tmp_path / "again.json"), str(tmp_path / "again.png")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "redraw", str(figures), "--json", again[0], "--figure", again[1]])
    assert ended.value.code == 0
    assert capsys.readouterr().out.partition("figures:")[0] == out.partition("figures:")[0]
    assert json.loads(Path(again[0]).read_text()) == written
    assert Path(again[1]).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--key-tokens", "owm"), "unknown --key-tokens 'owm': did you mean 'own'"),
        (("--key-tokens", "own", "--windows", "64"), "--key-tokens and --windows are different measurements"),
        (("--key-tokens", "own"), "--short-context 1024 with --short-stride 256: windows of 1280 tokens"),
        (("--key-tokens", "own", "--short-context", "0"), "--short-context 0: a positive number"),
        (("--key-tokens", "own", "--short-stride", "-1"), "--short-stride -1: a positive number"),
        (("--key-tokens", "small"), "--key-tokens small: its window is 64 tokens, and the documents have 100"),
        (("--key-tokens", "own", "--short-context", "97", "--short-stride", "1"), "no key token found"),
        (
            ("--key-tokens", "own", "--short-context", "50", "--short-stride", "10", "--bands", "0,60"),
            "no key token found",
        ),
    ],
)
def test_key_tokens_that_cannot_be_found(
    options: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = repeated_texts(tmp_path / "texts.jsonl")
    models = ("--model", f"own={TINY}", "--model", f"small={TINY}@{{window: 64}}")
    assert run(*models, "--data", str(texts), "--length", "100", "--documents", "2", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert complaint in error


def test_texts_are_refused_for_different_tokenizers(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("One two three.")
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<s>"}))
    assert run("--model", f"a={TINY}", "--model", f"b={other}", "--data", str(tmp_path / "a.txt")) == 2
    assert "tokenizers differ" in capsys.readouterr().err
    assert run("--model", str(model_directory), "--data", str(tmp_path / "a.txt")) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_default_bands_double_up_to_the_length() -> None:
    assert default_edges(2048) == [0, 256, 512, 1024, 2048]
    assert default_edges(3000) == [0, 256, 512, 1024, 2048, 3000]
    assert default_edges(40) == [0, 40]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--length", "41"), "the shortest of 40 tokens; 41 are needed"),
        (("--split", "hold_out"), "did you mean 'held_out'"),
        (("--bands", "0,a"), "not a list of positions"),
        (("--bands", "0,64"), "band ends at 64"),
        (("--windows", "16,x"), "not a list of lengths"),
        (("--windows", "64"), "window 64: from 2 to the documents' 40 tokens"),
        (("--windows", "16", "--stride", "16"), "--stride 16: from 1 to 15"),
        (("--windows", "16", "--bands", "0,16"), "give one of the two"),
        (("--data", "nowhere"), "nowhere does not exist: `eabf prepare"),
        (("--dtype", "int8"), "unknown --dtype 'int8'"),
        (("--model", "nowhere"), "nowhere: no such directory"),
        (("--model", "x=nowhere@{type: eabff}"), "did you mean 'eabf'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    complaint: str,
    model_directory: Path,
    dataset: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--model", str(model_directory), "--data", str(dataset), *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert complaint in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--documents", "0"), "--documents 0: a positive number"),
        (("--length", "-3"), "--length -3: a positive number"),
        (("--batch-size", "0"), "--batch-size 0: a positive number"),
        (("--dtype", "float8"), "unknown --dtype 'float8'"),
        (("--model", "b=x@{type: eabff}"), "did you mean 'eabf'"),
        (("--model", "a=y"), "--model 'a' is used twice"),
    ],
)
def test_bad_options_are_told_first(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "a=nowhere", "--data", "nowhere", *options) == 2
    assert message in capsys.readouterr().err


def test_tokens_outside_the_vocabulary_and_weights_that_are_not_numbers(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = dataclasses.replace(CONFIG, vocab_size=40)
    write_model_json(tmp_path, smaller)
    params = Llama(smaller, rngs=nnx.Rngs(0)).parameters()
    save_params(tmp_path, params)
    assert run("--model", f"small={tmp_path}", "--data", str(dataset)) == 2
    assert "only has ids below 40" in capsys.readouterr().err
    write_model_json(tmp_path, CONFIG)
    params = jax.tree.map(
        lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), Llama(CONFIG, rngs=nnx.Rngs(0)).parameters()
    )
    save_params(tmp_path, params, step=1)
    assert run("--model", f"broken={tmp_path}", "--data", str(dataset)) == 2
    assert "broken: the loss is not finite" in capsys.readouterr().err
