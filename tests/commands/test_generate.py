"""`eabf generate` on the tiny model."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from eabf_jax import cli, load
from eabf_jax.inference import Generator
from eabf_jax.inference.text import truncated

TINY = Path(__file__).parents[2] / "assets/tiny"


class Terminal(io.StringIO):
    """Standard input from a terminal."""

    def isatty(self) -> bool:
        return True


def generate(*arguments: str, model: str = str(TINY)) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--model", model, "--dtype", "float32", "--max-new-tokens", "12", *arguments])
    return stop.value.code


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_a_prompt_from_argument_file_and_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All three give the generator's text for a prompt that begins with BOS."""
    model, tokenizer = load(TINY, dtype="float32")
    assert tokenizer is not None
    prompt = [1, *tokenizer.encode("The history of")]
    (expected,) = Generator(model, tokenizer).generate([prompt], 12)
    (tmp_path / "prompt.txt").write_text("The history of\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("The history of\n"))
    for number, given in enumerate((["The history of"], ["--file", str(tmp_path / "prompt.txt")], [])):
        report = tmp_path / f"{number}.json"
        assert generate(*given, "--json", str(report)) == 0
        assert capsys.readouterr().out == expected.text + "\n"
        (answer,) = read(report)["answers"]
        assert (answer["text"], answer["tokens"], answer["finish"]) == (expected.text, expected.tokens, "length")
        assert (answer["prompt_tokens"], answer["cut_tokens"]) == (len(prompt), 0)
        assert answer["first_token_seconds"] > 0 and answer["tokens_per_second"] > 0


def test_several_prompts_and_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--repetition-penalty", "1.1", "--seed", "5"]
    reports = [tmp_path / f"{number}.json" for number in range(2)]
    assert generate("One day", "The history of", "--stop", "e", *drawing, "--json", str(reports[0])) == 0
    out = capsys.readouterr().out
    assert generate("The history of", "--stop", "e", *drawing[:-1], "6", "--json", str(reports[1])) == 0
    both, second = (read(report) for report in reports)
    assert out == "".join(
        f"--- prompt {number} ---\n{answer['text']}\n" for number, answer in enumerate(both["answers"], 1)
    )
    assert both["answers"][1]["tokens"] == second["answers"][0]["tokens"]
    assert all("e" not in answer["text"] for answer in both["answers"])
    assert both["sampling"] == {
        "temperature": 0.9, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5,
    }  # fmt: skip


def test_a_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\nThank you!\n"))
    report = tmp_path / "chat.json"
    assert generate("Hi", "--chat", "--json", str(report)) == 0
    first, second = read(report)["answers"]
    assert capsys.readouterr().out == f"{first['text'].strip()}\n{second['text'].strip()}\n"
    assert first["text"] == " Hello! How can I assist you today?" and first["finish"] == "stop_token"
    # Question, answer and end token precede the second question.
    assert second["prompt_tokens"] > first["prompt_tokens"] + len(first["tokens"]) + 5
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert generate("Hi", "--chat", "--template", "vicuna", "--system", "Be brief.", "--json", str(report)) == 0
    assert read(report)["answers"][0]["prompt_tokens"] < first["prompt_tokens"]


@pytest.mark.parametrize(("how", "kept"), [("middle", [1, 2, 3, 7, 8, 9]), ("left", [1, 5, 6, 7, 8, 9])])
def test_truncation(how: str, kept: list[int]) -> None:
    assert truncated(range(1, 10), 6, how, bos_id=1) == kept
    assert truncated(range(1, 10), 5, how, bos_id=0) == {"middle": [1, 2, 7, 8, 9], "left": [5, 6, 7, 8, 9]}[how]


def test_a_prompt_longer_than_the_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 600
    assert generate(long) == 2
    tokens = 1 + len(load(TINY)[1].encode(long))  # type: ignore[union-attr]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"the prompt has {tokens} tokens: with 12 new ones it exceeds the window of 512 by {tokens - 500};" in error
    assert "--truncate middle or left cuts it" in error
    report = tmp_path / "cut.json"
    assert generate(long, "--truncate", "middle", "--json", str(report)) == 0
    (answer,) = read(report)["answers"]
    assert (answer["prompt_tokens"], answer["cut_tokens"]) == (500, tokens - 500)
    assert generate("A text of some words", "--window", "13", "--truncate", "left") == 2
    assert "--max-new-tokens 12 leaves no room for a prompt in the window of 13" in capsys.readouterr().err
    assert generate("A text of some words", "--model", f"{TINY}@{{window: 14}}") == 2
    assert "with 12 new ones it exceeds the window of 14" in capsys.readouterr().err


def test_a_window_longer_than_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("One day", "--window", "513") == 0
    assert capsys.readouterr().err == "note: the window of 513 tokens is longer than the model's own 512\n"
    assert generate("One day", "--window", str(10**12), "--max-new-tokens", str(10**11)) == 2
    # Keys and values of 6 layers with 4 heads of 32 numbers, of 4 bytes each.
    needed = 2 * 6 * 4 * 32 * 4 * 10**12 / 2**30
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: a window of {10**12} tokens needs a key-value cache of {needed:,.1f} GiB a device;"
    )
    assert error.count("\n") == 1 and "is the most" in error


@pytest.mark.parametrize("arguments", [(), ("-",), ("--chat",)])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text(
    arguments: tuple[str, ...], errors: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff b\n"), "utf-8", errors))
    assert generate(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not valid UTF-8" in error


def test_a_file_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"a \xff b\n")
    assert generate("--file", str(path)) == 2
    assert capsys.readouterr().err == f"error: --file {path} is not valid UTF-8: invalid start byte at byte 2\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "the prompt is empty"),
        (("a", ""), "the prompt is empty"),
        ((), "no prompt: give it as PROMPT, with --file, or on standard input"),
        (("a", "--max-new-tokens", "0"), "--max-new-tokens 0: a positive number is needed"),
        (("a", "--temperature", "-1"), "temperature is -1.0"),
        (("a", "--dtype", "bf16"), "unknown --dtype 'bf16': did you mean 'bfloat16'"),
        (("a", "--cache", "int4"), "unknown --cache 'int4'"),
        (("a", "--stop", ""), "--stop is empty"),
        (("a", "--seed", "-1"), "seeds: -1 is out of range"),
        (("a", "--tensor", "64"), "--tensor 64: 8 devices are available"),
        (("a", "--template", "vicuna"), "--template is for conversations: add --chat"),
        (("a", "b", "--chat"), "--chat holds one conversation"),
        (("a", "--truncate", "right"), "invalid choice: 'right'"),
        (("--chat", "--template", "vicunna"), "unknown chat template 'vicunna'"),
        (("--file", "nowhere.txt"), "nowhere.txt: No such file"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal())
    assert generate(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "nowhere: no such directory"),
        (f"{TINY}@yarn", "expected a scheme such as {type: yarn, factor: 4}, or {window: 512}, after @, not 'yarn'"),
        (f"{TINY}@{{type: yarm}}", "unknown rotary scheme 'yarm': did you mean 'yarn'"),
    ],
)
def test_models_that_are_not_there(model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a", model=model) == 2
    assert message in capsys.readouterr().err


def test_another_scheme_and_an_int8_cache(capsys: pytest.CaptureFixture[str]) -> None:
    scheme = "{type: dynamic_ntk, factor: 1, pretrained_window: 8}"
    texts = []
    for extra in ([], ["--rope-length", "2000"], ["--cache", "int8"]):
        assert generate("The history of the", *extra, model=f"{TINY}@{scheme}") == 0
        texts.append(capsys.readouterr().out)
    assert all(len(text) > 5 for text in texts) and texts[0] != texts[1]


def test_heads_over_two_devices(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for tensor in ("1", "2"):
        assert generate("The history of", "--tensor", tensor) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
