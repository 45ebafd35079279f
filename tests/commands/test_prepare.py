"""`eabf prepare`, from the command line to table and file."""

import json
from pathlib import Path

import pytest

from eabf_jax import cli
from eabf_jax.data.dataset import METADATA_FILE, tokenizer_digest
from eabf_jax.interop.tokenizer import load_tokenizer


@pytest.fixture
def source(tmp_path):
    entries = [
        {
            "id": f"c{number}_0",
            "conversations": [
                {"from": "human", "value": f"one two three {number}"},
                {"from": "gpt", "value": f"four five six {number}"},
            ],
        }
        for number in range(60)
    ]
    path = tmp_path / "many.json"
    path.write_text(json.dumps(entries))
    return path


def prepare(source, *arguments, tokenizer="assets/tiny"):
    target = source.parent / "set"
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["prepare", "--src", str(source), "--dst", str(target), "--tokenizer", tokenizer, *map(str, arguments)]
        )
    return stop.value.code


SETTINGS = ("--template", "vicuna", "--min-tokens", "1", "--max-tokens", "500", "--language", "any")


def test_help_has_the_papers_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for default in (
        "with fewer tokens (default: 10000)",
        "turn borders (default: 16384)",
        "{% generation %} (default: llama-2)",
    ):
        assert default in shown


def test_the_counts_are_printed_and_written(source, tmp_path, capsys):
    counts = tmp_path / "counts.json"
    assert prepare(source, *SETTINGS, "--num-conversations", 70, "--portion", "0.0:1.0", "--json", counts) == 0
    printed = capsys.readouterr()
    assert "conversations, parts joined" in printed.out
    assert "note: train: 60 records found, 70 requested" in printed.out
    assert printed.out.endswith(f"counts: {counts}\n")
    assert "reading" in printed.err
    found = json.loads(counts.read_text())
    assert (found["entries"], found["splits"]["train"]["records"]) == (60, 60)


def test_adapters_of_peft_have_the_tokenizer_of_their_base(source, tmp_path):
    (tmp_path / "peft").mkdir()
    options = {"peft_type": "LORA", "base_model_name_or_path": str(Path("assets/tiny").absolute())}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(options))
    assert prepare(source, *SETTINGS, tokenizer=str(tmp_path / "peft")) == 0
    found = json.loads((source.parent / "set" / METADATA_FILE).read_text())
    assert found["tokenizer"] == tokenizer_digest(load_tokenizer("assets/tiny"))


def test_wrong_options_are_refused_before_any_work(source, tmp_path, capsys):
    assert prepare(source, *SETTINGS, "--json", tmp_path / "none" / "counts.json") == 2
    assert "there is no directory" in capsys.readouterr().err
    assert prepare(source, "--min-tokens", 0, tokenizer="nowhere") == 2
    assert "--min-tokens 0" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("portion", ["half", "0.1", "0.5:x"])
def test_a_portion_is_two_numbers(source, portion, capsys):
    assert prepare(source, "--portion", portion) == 2
    assert "START:END" in capsys.readouterr().err
