"""RULER's samples against the harness's own with transformers' tokenizer; its scores against known answers."""

import contextlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import nltk
import numpy as np
import pytest
import transformers
import wonderwords
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from eabf_jax import cli
from eabf_jax.commands.evaluate import harness as command
from eabf_jax.errors import InputError
from eabf_jax.evaluation import ruler
from eabf_jax.evaluation.harness import EabfLM

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = str(Path(__file__).parents[2] / "assets/tiny")
NO_DOWNLOAD = ("ruler_vt", "ruler_cwe", "ruler_fwe", "niah_single_1", "niah_multikey_2", "niah_multikey_3")


@pytest.fixture(scope="module", autouse=True)
def quick_and_offline() -> Iterator[None]:
    """Shortens the lists of words, of which the harness sorts all six million pairs at its import; bans the network."""

    class FewWords(wonderwords.RandomWord):
        def __init__(self) -> None:
            super().__init__()
            self._categories = {name: list(words)[:300] for name, words in self._categories.items()}

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wonderwords, "RandomWord", FewWords)
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(nltk.data, "path", [])
        yield


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(Path(lm_eval.tasks.__file__).parent / "ruler"), include_defaults=False)


@pytest.fixture
def on_the_command_line(manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the command read only RULER's tasks, because all task files take half a minute."""
    monkeypatch.setattr(command, "_task_manager", lambda _: manager)


@pytest.fixture(scope="module")
def model() -> EabfLM:
    return EabfLM(TINY)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes essays, questions and NLTK's files, small but in the form of the original ones."""
    directory = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    words = ["river", "meadow", "lantern", "copper", "violin", "harbour"]
    sentences = [" ".join(draw.choices(words, k=9)).capitalize() + "." for _ in range(600)]
    (directory / ruler.ESSAYS).write_text(json.dumps({"text": "\n".join(sentences)}))
    model = directory / ruler.SENTENCES / "english"
    model.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (model / name).write_text("")
    texts = [f"Paragraph {i}. " + " ".join(draw.choices(words, k=40)) for i in range(60)]
    paragraphs = [
        {"context": text, "qas": [{"question": "What?", "is_impossible": i > 2, "answers": [{"text": f"answer {i}"}]}]}
        for i, text in enumerate(texts)
    ]
    (directory / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    hotpot = [
        {"question": f"Which {i}?", "answer": f"answer {i}", "context": [[f"Title {i}", [text, " More."]]]}
        for i, text in enumerate(texts)
    ]
    (directory / "hotpotqa.json").write_text(json.dumps(hotpot))
    return directory


def make(name: str, model: EabfLM, window: int, manager: TaskManager, **options: Any) -> Any:
    settings = {"count": 3, "data": None, "chat_template": False, **options}
    return ruler.make_samples(name, model, window, manager=manager, **settings)


@pytest.mark.parametrize("name", NO_DOWNLOAD)
def test_samples_are_those_that_the_harness_makes_with_transformers(
    name: str, model: EabfLM, manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference stops after three samples instead of 500."""
    random.seed(7)  # draws before do not matter
    ours = make(name, model, 1100, manager)
    module, function = ruler.TASKS[name].split(".")
    theirs = importlib.import_module(f"lm_eval.tasks.ruler.{module}")
    loop = importlib.import_module("lm_eval.tasks.ruler.prepare_niah") if module == "niah_utils" else theirs
    monkeypatch.setattr(loop, "tqdm", lambda numbers, **_: itertools.islice(numbers, 3))
    if module == "cwe_utils":
        monkeypatch.setattr(theirs, "RNG", random.Random(ruler.SEED))
    random.seed(ruler.SEED)
    np.random.seed(ruler.SEED)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        expected = getattr(theirs, function)(tokenizer=TINY, max_seq_lengths=[ours[0]["max_length"]])["test"]
    assert len(ours) == 3 and list(ours) == list(expected)
    assert len({sample["input"] for sample in ours}) == 3


@pytest.mark.parametrize("chat_template", [False, True])
def test_prompts_and_answers_fill_the_window(
    chat_template: bool, model: EabfLM, manager: TaskManager, tokenizer: Any, data: Path
) -> None:
    for name in ruler.TASKS:
        window = 2400 if name in ruler.FILES else 1100
        samples = make(name, model, window, manager, data=str(data), chat_template=chat_template)
        task = ruler.load_task(name, samples, manager)
        task.build_all_requests(
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            chat_template=model.apply_chat_template if chat_template else None,
        )
        assert len(task.instances) == 3
        for instance, sample in zip(task.instances, samples, strict=True):
            text, settings = instance.args
            assert text.startswith("<s>") == chat_template
            tokens = len(tokenizer(text, add_special_tokens=not chat_template).input_ids) + settings["max_gen_toks"]
            assert window / 2 < tokens <= window, name
            if not name.startswith("ruler_qa"):
                assert all(answer in sample["input"] for answer in sample["outputs"]), name


def test_essays_and_questions_come_from_the_directory(model: EabfLM, manager: TaskManager, data: Path) -> None:
    for name in ("niah_single_2", "niah_multiquery"):
        samples = make(name, model, 2400, manager, data=str(data))
        for sample in samples:
            assert sample["input"].count("violin") > 20
            assert len(sample["outputs"]) == (4 if name == "niah_multiquery" else 1)
    squad = make("ruler_qa_squad", model, 2400, manager, data=str(data), count=5)
    assert [sample["outputs"] for sample in squad] == [["answer 0"], ["answer 1"], ["answer 2"]]  # all that have one
    hotpot = make("ruler_qa_hotpot", model, 2400, manager, data=str(data), count=5)
    for number, sample in enumerate(hotpot):
        assert sample["outputs"] == [f"answer {number}"]
        assert f"Title {number}\nParagraph {number}." in sample["input"]


class Knows(LM):
    """Answers every second question, and half of the others if they have several answers."""

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [request.doc["outputs"] for request in requests]
        return [
            ", ".join(answer if number % 2 == 0 else answer[: len(answer) // 2])
            for number, answer in enumerate(answers)
        ]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test_scores_of_known_answers(model: EabfLM, manager: TaskManager, on_the_command_line: None) -> None:
    arguments = SimpleNamespace(apply_chat_template=False, num_fewshot=None, limit=None, include_path=None)
    for window in (1100, 4096):  # the harness has a metric for the latter only
        names = ("ruler_cwe", "niah_single_1")
        tasks = {name: [ruler.load_task(name, make(name, model, window, manager, count=4), manager)] for name in names}
        (result,) = command.evaluate(Knows(), tasks, arguments)
        scores = {score.task: score for score in command._scores("knows", window, result)}
        assert {score.metric for score in scores.values()} == {"score"}
        assert scores["ruler_cwe"].value == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)
        assert scores["niah_single_1"].value == pytest.approx((1 + 0 + 1 + 0) / 4)
        assert scores["niah_single_1"].documents == 4
        # The standard error of 1, 0, 1, 0 by the textbook.
        assert scores["niah_single_1"].standard_error == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)


def evaluate(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "harness", "--model", f"tiny={TINY}", *arguments])
    return stop.value.code


def test_every_window_has_samples_of_its_own(
    on_the_command_line: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(self: EabfLM, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        # The first model finds what is in a prompt that its window holds, and the second one never does.
        found = self.window == 700 and self._rope is None
        return [" ".join(request.doc["outputs"]) if found else "" for request in requests]

    monkeypatch.setattr(EabfLM, "generate_until", answers)
    report, output = tmp_path / "report.json", tmp_path / "samples"
    assert not evaluate(
        *("--model", f"pi={TINY}@{{type: pi, factor: 2}}", "--tasks", "ruler_fwe,niah_single_1", "--limit", "2"),
        *("--windows", "500,700", "--json", str(report), "--output", str(output)),
    )
    figures = json.loads(report.read_text())
    scores = {(score["model"], score["window"], score["task"]): score for score in figures["scores"]}
    assert len(scores) == 8 and {score["documents"] for score in scores.values()} == {2}
    for (label, window, _), score in scores.items():
        assert score["value"] == (1.0 if (label, window) == ("tiny", 700) else 0.0)
    lengths = {}
    for window in (500, 700):
        lines = (output / "tiny" / str(window) / "ruler_fwe.jsonl").read_text().splitlines()
        assert lines == (output / "pi" / str(window) / "ruler_fwe.jsonl").read_text().splitlines() or window == 700
        lengths[window] = [json.loads(line)["doc"]["length"] for line in lines]
    assert max(lengths[500]) < min(lengths[700])
    # Both models are asked the same, so the differences are paired: 0 - 1 for each of two documents.
    differences = {(found["window"], found["task"]): found for found in figures["beside_first"]}
    assert differences[700, "ruler_fwe"] == {
        "model": "pi", "window": 700, "task": "ruler_fwe", "metric": "score", "mean": -1.0, "half_width": 0.0,
        "documents": 2,
    }  # fmt: skip
    assert differences[500, "niah_single_1"]["mean"] == 0.0
    assert figures["versions"]["wonderwords"]
    shown = " ".join(capsys.readouterr().out.split())
    assert "beside tiny: difference by document" in shown and "-100.0 ± 0.0" in shown


def test_average_of_all_thirteen_tasks() -> None:
    """Its weights are equal, as in the paper's table of results by length."""
    scores = [
        command.Score("own", 4096, name, ruler.METRIC, number / 100, None, 5) for number, name in enumerate(ruler.TASKS)
    ]
    assert dict(command._macro_averages(scores)) == {"ruler": pytest.approx(6.0)}  # (0 + 1 + ... + 12) / 13
    assert dict(command._macro_averages(scores[1:])) == {}
    average = command.Score("own", 4096, "ruler", "macro average", 6.0, None, None)
    rows = command.table(command.Report(scores, [average], [])).plain()["rows"]
    assert rows[1] == ["niah_single_2", "score", "1.0"] and rows[-1] == ["ruler", "macro average", "6.0"]


def test_groups_stand_for_all_tasks(on_the_command_line: None) -> None:
    assert list(command.load_tasks(["ruler"], None, None)) == list(ruler.TASKS)
    assert set(command.load_tasks(["longcxt"], None, None)) == set(ruler.TASKS)
    assert list(command.load_tasks(["ruler_qa*"], None, None)) == ["ruler_qa_hotpot", "ruler_qa_squad"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "ruler_vt", "--windows", "512"), "task ruler_vt: its shortest sample takes"),
        (("--tasks", "ruler_cwe", "--windows", "512"), "task ruler_cwe: its shortest sample takes"),
        (("--tasks", "ruler_fwe", "--windows", "64"), "task ruler_fwe: its shortest sample takes"),
        (("--tasks", "niah_single_1", "--windows", "64"), "task niah_single_1: no sample fits a window of 64"),
        (("--tasks", "niah_single_2", "--windows", "1024", "--data", "DATA"), "less than half of it"),
        (("--tasks", "ruler_qa_squad", "--windows", "64", "--data", "DATA"), "no sample fits a window of 64"),
        (("--tasks", "ruler_vt", "--num-fewshot", "2"), "--num-fewshot 2: ruler_vt has no examples"),
        (("--tasks", "niah_single_2"), "NLTK's punkt_tab there and give --data DIR"),
        (("--tasks", "ruler_qa_squad"), "ruler_qa_squad: its texts cannot be downloaded"),
        (("--tasks", "niah_single_3", "--data", "."), f"{ruler.ESSAYS} does not exist, and niah_single_3 needs it"),
        (("--tasks", "ruler_qa_hotpot", "--data", "."), "hotpotqa.json does not exist, and ruler_qa_hotpot needs it"),
        (("--tasks", "niah_single_2", "--data", "BROKEN"), "tokenizers/punkt_tab does not exist, and niah_single_2"),
        (("--tasks", "ruler_qa_squad", "--data", "BROKEN"), "squad.json is not a JSON file"),
        (("--tasks", "ruler_qa_hotpot", "--data", "BROKEN"), "hotpotqa.json is not in the form of the original file"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    on_the_command_line: None,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr("lm_eval.tasks.ruler.prepare_niah.datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / ruler.ESSAYS).write_text('{"text": "a"}')
    (tmp_path / "squad.json").write_text("{")
    (tmp_path / "hotpotqa.json").write_text('[{"question": "a"}]')
    places = {"DATA": str(data), "BROKEN": str(tmp_path)}
    assert evaluate("--limit", "2", *(places.get(part, part) for part in arguments)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0]


def test_essays_in_another_form_and_missing_packages(
    model: EabfLM, manager: TaskManager, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ruler.ESSAYS).write_text("[]")
    (tmp_path / "tokenizers").symlink_to(data / "tokenizers")
    with pytest.raises(InputError, match='is not an object with a "text"'):
        make("niah_single_2", model, 2400, manager, data=str(tmp_path))
    if importlib.util.find_spec("nltk.pathsec"):  # releases that refuse such a directory
        (tmp_path / "tokenizers").unlink()
        shutil.copytree(data / "tokenizers", tmp_path / "tokenizers")
        (tmp_path / ruler.SENTENCES / "english").chmod(0o777)
        monkeypatch.setattr(nltk.data, "path", [])
        with pytest.raises(InputError, match=f"others may change: chmod -R go-w {tmp_path}"):
            make("niah_single_2", model, 2400, manager, data=str(tmp_path))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ruler.vt_utils", None)
    with pytest.raises(InputError, match=r"task ruler_vt: .*pip install 'eabf-jax\[harness\]' adds what RULER needs"):
        make("ruler_vt", model, 1100, manager)
