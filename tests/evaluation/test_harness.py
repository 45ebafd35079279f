"""Requests, answers and scores against the harness' own Hugging Face backend.

The model is assets/tiny, or its first layers where its text does not matter. The tasks are LongBench's as the harness
defines them, on our own documents, and local tasks of the kinds that LongBench lacks. benchmarks/harness_parity.py does
the same on SmolLM2.
"""

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import lm_eval.tasks
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from eabf_jax import cli, load
from eabf_jax.commands.evaluate import harness as command
from eabf_jax.commands.evaluate.harness import load_tasks
from eabf_jax.errors import InputError
from eabf_jax.evaluation import harness, longbench, scorer
from eabf_jax.evaluation.harness import EabfLM
from eabf_jax.interop.tokenizer import load_tokenizer
from eabf_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "assets/tiny")
TASKS = "tests/evaluation/harness_tasks"
DATA = "tests/evaluation/longbench"
LOCAL = ("local_choice", "local_last_word", "local_rolling")
WINDOW = 192
ANSWER = 32  # tokens; benchmarks/harness_parity.py has the tasks' own lengths, up to 512
# Float32 sums over about a hundred tokens, in different orders.
TOLERANCE: dict[str, Any] = {"rel": 2e-5, "abs": 2e-5}


@pytest.fixture(scope="module", autouse=True)
def two_devices() -> Iterator[None]:
    """Limits meshes to two rows of devices, because all devices wait for each other after each token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "make_mesh", lambda mesh, _: make_mesh(mesh, jax.devices()[: 2 * mesh.tensor]))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_tasks() -> Iterator[None]:
    """Reads only the folders of the harness that are used here, because all its task files take half a minute."""
    folders = [Path(lm_eval.tasks.__file__).parent / name for name in ("longbench", "mmlu/default")]

    def manager(include_path: str | None = None, include_defaults: bool = True, **options: Any) -> TaskManager:
        own = [] if include_path is None else [include_path]
        return TaskManager(
            include_path=[*folders, *own] if include_defaults else own, include_defaults=False, **options
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.tasks.TaskManager", manager)
        command._task_manager.cache_clear()
        yield
    command._task_manager.cache_clear()


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes to the root directory, to which the paths in the task files are relative."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Writes the first two layers of assets/tiny; all six take three times as long to compile."""
    directory = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(TINY, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    weights = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not re.search(r"layers\.[2-5]\.", name)}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def hf_backend(directory: str) -> HFLM:
    return HFLM(pretrained=directory, device="cpu", dtype="float32", batch_size=3, max_length=WINDOW)


@pytest.fixture(scope="module")
def hf(small: str) -> HFLM:
    return hf_backend(small)


@pytest.fixture(scope="module")
def ours(small: str) -> EabfLM:
    return EabfLM(small, dtype="float32", window=WINDOW, batch_size=4)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def evaluate(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "harness", "--dtype", "float32", *arguments])
    return stop.value.code


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert evaluate(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def with_short_answers(*arguments: Any, tokens: int = ANSWER) -> dict[str, list[Any]]:
    tasks = load_tasks(*arguments)
    for task in (tasks[name][0] for name in tasks if name in longbench.TASKS):
        task.set_config("generation_kwargs", {"max_gen_toks": tokens}, update=True)
    return tasks


def test_every_kind_of_task_scores_as_with_the_hf_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_tasks", with_short_answers)
    report, output = tmp_path / "figures.json", tmp_path / "samples"
    names = [longbench.GROUP, *LOCAL]
    assert not evaluate(
        *("--model", f"tiny={TINY}", "--tasks", ",".join(names), "--include-path", TASKS, "--data", DATA),
        *(
            "--windows",
            str(WINDOW),
            "--batch-size",
            "4",
            "--truncate",
            "left",
            "--json",
            str(report),
            "--output",
            str(output),
        ),
    )
    figures = json.loads(report.read_text())
    found = {(score["task"], score["metric"]): score for score in figures["scores"]}
    tasks = with_short_answers(names, TASKS, DATA)
    expected = simple_evaluate(
        model=hf_backend(TINY),
        tasks=[task for members in tasks.values() for task in members],
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
    )
    assert set(expected["results"]) == {*longbench.TASKS, *LOCAL}
    for task, metrics in expected["results"].items():
        for key, value in metrics.items():
            metric = key.removesuffix(",none")
            if (task, metric) not in found:
                assert key in ("alias", "name", "sample_len") or "stderr" in key or task in longbench.TASKS
            elif "perplexity" in metric or metric == "bits_per_byte":
                # TOLERANCE of the mean log-likelihood, a few nats, in the exponent.
                assert found[task, metric]["value"] == pytest.approx(value, rel=1e-4)
            else:
                assert found[task, metric]["value"] == value
    assert {task for task, _ in found} == {*longbench.TASKS, *LOCAL}
    for task, samples in expected["samples"].items():
        lines = (output / "tiny" / str(WINDOW) / f"{task}.jsonl").read_text().splitlines()
        written = [json.loads(line) for line in lines]
        assert len(written) == len(samples) == found[next(key for key in found if key[0] == task)]["documents"]
        for mine, theirs in zip(written, samples, strict=True):
            assert mine["arguments"] == json.loads(json.dumps(theirs["arguments"]))
            if task in longbench.TASKS:
                assert mine["resps"] == theirs["resps"]  # the text, character by character
            for (answer,), (reference,) in zip(mine["resps"], theirs["resps"], strict=True):
                if task in ("local_choice", "local_last_word"):
                    assert answer[1] == reference[1]
                    assert answer[0] == pytest.approx(reference[0], **TOLERANCE)
                elif task == "local_rolling":
                    assert answer == pytest.approx(reference, **TOLERANCE)
    # Some scores are not zero, so the comparison can tell texts apart.
    assert sum(found[task, "score"]["value"] > 0 for task in longbench.TASKS) >= 3
    mean = sum(expected["results"][task]["score,none"] for task in longbench.TASKS) / 12
    (average,) = figures["macro_averages"]
    assert average["value"] == pytest.approx(100 * mean) and average["window"] == WINDOW
    assert figures["dtype"] == "float32" and figures["versions"]["lm-eval"] and figures["device"]


def test_differences_to_the_first_model_are_paired_by_document(small: str, tmp_path: Path) -> None:
    """The reference is scipy's paired t interval over the samples that the command writes."""
    report, output = tmp_path / "figures.json", tmp_path / "samples"
    assert not evaluate(
        *("--model", f"first={TINY}", "--model", f"fewer layers={small}"),
        *("--tasks", "local_pooled", "--include-path", TASKS, "--batch-size", "4"),
        *("--json", str(report), "--output", str(output)),
    )
    figures = json.loads(report.read_text())
    found = {(part["task"], part["metric"]): part for part in figures["beside_first"]}
    assert {part["model"] for part in found.values()} == {"fewer layers"}
    samples = {
        (label, task): [
            json.loads(line) for line in (output / label / "512" / f"{task}.jsonl").read_text().splitlines()
        ]
        for label in ("first", "fewer_layers")
        for task in ("local_choice", "local_last_word")
    }
    scores = {(score["model"], score["task"], score["metric"]): score["value"] for score in figures["scores"]}
    for label in ("first", "fewer_layers"):  # a group whose score is the mean over all documents
        samples[label, "local_pooled"] = samples[label, "local_choice"] + samples[label, "local_last_word"]
    for task in ("local_choice", "local_last_word", "local_pooled"):
        pairs = zip(samples["fewer_layers", task], samples["first", task], strict=True)
        differences = [mine["acc"] - theirs["acc"] for mine, theirs in pairs]
        expected = scipy.stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        part = found[task, "acc"]
        assert part["documents"] == len(differences) > 1
        assert part["mean"] == pytest.approx(np.mean(differences))
        assert part["mean"] == pytest.approx(scores["fewer layers", task, "acc"] - scores["first", task, "acc"])
        if len(set(differences)) > 1:
            assert part["mean"] + part["half_width"] == pytest.approx(expected.high)
    assert any(part["half_width"] for part in found.values())
    # A perplexity is no mean over documents.
    assert ("first", "local_last_word", "perplexity") in scores and ("local_last_word", "perplexity") not in found


TEXTS = (
    "What is a library?",
    "Thank you for the additional",
    "Dear customer, we are sorry to " * 12,
    "a",
    "naïve 日本 <s>",
)


def test_requests_of_all_lengths_as_the_hf_backend_answers_them(
    hf: HFLM, ours: EabfLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Covers texts longer than the window, no context, special tokens in a text, and several stop strings."""
    monkeypatch.setattr(hf, "_max_length", 64)
    monkeypatch.setattr(ours, "window", 64)
    for text in (*TEXTS, "<s> USER: Hi", ""):
        assert ours.tok_encode(text) == hf.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == hf.tok_encode(text, add_special_tokens=False)
    pairs = [request("loglikelihood", text, end) for text in ("", *TEXTS) for end in ("the", " in two more words")]
    pairs = [pair for pair in pairs if pair.args != ("", " in two more words")]  # begins with a space: docs/harness.md
    for mine, theirs in zip(ours.loglikelihood(pairs), hf.loglikelihood(pairs), strict=True):
        assert mine[1] == theirs[1] and mine[0] == pytest.approx(theirs[0], **TOLERANCE)
    whole = [request("loglikelihood_rolling", text) for text in TEXTS]
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(whole), hf.loglikelihood_rolling(whole), rtol=TOLERANCE["rel"]
    )
    settings = ({"until": [], "max_gen_toks": 20, "do_sample": False}, {"until": ["e", "\n"], "max_new_tokens": 9})
    prompts = [request("generate_until", text, chosen) for text in TEXTS for chosen in settings]
    assert ours.generate_until(prompts) == hf.generate_until(prompts)


def test_prompts_cut_in_the_middle(ours: EabfLM, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with transformers on equal parts of the beginning and the end of the prompt."""
    monkeypatch.setattr(ours, "window", 61)
    monkeypatch.setattr(ours, "_truncate", "middle")
    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    text = "One day a storm closed the harbour, and nobody went to the library. " * 6
    tokens = tokenizer.encode(text)
    kept = [*tokens[:25], *tokens[-26:]]  # 61 - 10 = 51
    made = model.generate(torch.tensor([kept]), max_new_tokens=10, do_sample=False)[0, 51:]
    settings = {"until": [], "max_gen_toks": 10}
    assert ours.generate_until([request("generate_until", text, settings)]) == [tokenizer.decode(made)]
    continuation = tokenizer.encode("and so on", add_special_tokens=False)
    room = 62 - len(continuation)
    row = [*tokens[: room // 2], *tokens[-(room - room // 2) :], *continuation]
    with torch.no_grad():
        log_probs = model(torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
    expected = sum(log_probs[len(row) - 1 - len(continuation) + i, token] for i, token in enumerate(continuation))
    ((found, _),) = ours._loglikelihood_tokens([(None, tokens, continuation)])
    assert found == pytest.approx(float(expected), **TOLERANCE)


def test_chat_templates(hf: HFLM, ours: EabfLM, tmp_path: Path) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And?"},
    ]
    assert ours.apply_chat_template(history) == hf.apply_chat_template(history)
    for answer in ("The answer is ", "The answer is"):
        opened = [*history, {"role": "assistant", "content": answer}]
        assert ours.apply_chat_template(opened, False) == hf.apply_chat_template(opened, False)
    assert ours.chat_template(True) == hf.chat_template(True)
    assert ours.tokenizer_name == hf.tokenizer_name
    # A template that refuses system prompts gets the conversation without one.
    other = tmp_path / "model"
    shutil.copytree(TINY, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    assert EabfLM(str(other)).apply_chat_template(history) == "[user]Hi[assistant]Hello[user]And?[assistant]"


def test_windows_and_chat_templates_on_the_command_line(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few-shot prompts do not get the chat template."""
    monkeypatch.setattr(command, "load_tasks", functools.partial(with_short_answers, tokens=8))
    report, output = tmp_path / "figures.json", tmp_path / "samples"
    assert not evaluate(
        *("--model", f"t i={small}@{{type: eabf, base: 100000, pretrained_window: 64}}", "--windows", "90,96"),
        *("--tasks", "longbench_2wikimqa,longbench_trec,local_group", "--data", DATA, "--include-path", TASKS),
        *("--limit", "1", "--batch-size", "4", "--apply-chat-template", "--json", str(report), "--output", str(output)),
    )
    figures = json.loads(report.read_text())
    assert {score["window"] for score in figures["scores"]} == {90, 96} and figures["macro_averages"] == []
    assert {score["task"] for score in figures["scores"]} == {
        "longbench_2wikimqa", "longbench_trec", "local_group", "local_choice", "local_last_word",
    }  # fmt: skip
    for task, opening in (("2wikimqa", "<s> A chat between"), ("trec", "Please determine")):
        (sample,) = map(json.loads, (output / "t_i" / "90" / f"longbench_{task}.jsonl").read_text().splitlines())
        assert sample["arguments"][0][0].startswith(opening)
    shown = capsys.readouterr().out
    assert "local_last_word" in shown and "trec" in shown and "macro" not in shown


@pytest.mark.parametrize("splits_model", [False, True])
def test_rows_of_a_scheme_that_follows_the_length(
    small: str, splits_model: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding does not lengthen a row: each has the score of a full forward pass on it alone, on one device."""
    if splits_model:
        monkeypatch.setattr(scorer, "device_at_hand", lambda: SimpleNamespace(memory=1))
    rope = {"type": "dynamic_ntk", "factor": 4, "pretrained_window": 8}
    lm = EabfLM(small, dtype="float32", rope=yaml.safe_dump(rope), batch_size=2, tensor=4)
    rows = [list(range(5, 5 + length)) for length in (40, 23, 6)]
    model, _ = load(small, rope=rope, dtype="float32")
    forward = jax.jit(lambda tokens: model(tokens))
    found = lm._loglikelihood_tokens([(None, row[:3], row[3:]) for row in rows])
    for row, (total, _) in zip(rows, found, strict=True):
        logits = np.asarray(forward(np.array([row[:-1]])), np.float64)[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = sum(log_probs[place - 1, row[place]] for place in range(3, len(row)))
        assert total == pytest.approx(expected, **TOLERANCE)


def test_the_weights_are_held_once(ours: EabfLM) -> None:
    score = [request("loglikelihood", "a", "b")]
    first = ours.loglikelihood(score)
    assert ours._generator is None
    ours.generate_until([request("generate_until", "a", {"max_gen_toks": 1})])
    assert ours._scorer is None
    assert ours.loglikelihood(score) == first


def test_draws_follow_the_seed(small: str) -> None:
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 50, "max_gen_toks": 12}
    asked = [request("generate_until", "Thank you for", settings)] * 2
    texts = [EabfLM(small, dtype="float32", seed=seed).generate_until(asked) for seed in (3, 3, 9)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_special_tokens_are_left_out_of_text() -> None:
    ids = [1, *load_tokenizer(TINY).encode("Hello there"), 2, 2, 1, 500, 0]
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    assert load_tokenizer(TINY).decode(ids, special=False) == theirs.decode(ids, skip_special_tokens=True)


def test_lm_evals_own_command_line(small: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """Uses the model type `eabf` with a scheme given as JSON."""
    monkeypatch.setattr(harness, "use_every_core", lambda: None)  # JAX has already started
    model = {"pretrained": small, "dtype": "float32", "rope": {"type": "pi", "factor": 4}}
    line = ["lm_eval", "--model", "eabf", "--model_args", json.dumps(model), "--tasks", "local_last_word"]
    monkeypatch.setattr("sys.argv", [*line, "--include_path", TASKS, "--output_path", str(tmp_path)])
    harness.main()
    assert "local_last_word" in capsys.readouterr().out
    (path,) = tmp_path.rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["local_last_word"]["perplexity,none"]
    lm = EabfLM(f"{small}@{{type: pi, factor: 4}}", dtype="float32")
    texts = [json.loads(line)["text"] for line in (ROOT / TASKS / "last_word.jsonl").read_text().splitlines()]
    pairs = [request("loglikelihood", *(text[: text.rindex(" ")], text[text.rindex(" ") :])) for text in texts]
    assert found == pytest.approx(np.exp(-np.mean([total for total, _ in lm.loglikelihood(pairs)])))
    monkeypatch.setattr("sys.argv", [*line[:4], '{"pretrained": "nowhere"}', *line[5:], "--include_path", TASKS])
    with pytest.raises(SystemExit) as stop:
        harness.main()
    assert stop.value.code == 2 and "no tokenizer in nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size is 'auto'; a positive number"),
        ({"window": 0}, "window is 0"),
        ({"truncate": "right"}, "unknown truncate 'right'"),
        ({"tensor": 3}, "tensor is 3, which does not divide the 8 devices"),
        ({"tensor": 8}, "does not divide the model's 4 key-value heads"),
        ({"rope": "{type: ["}, "a scheme such as {type: yarn, factor: 4} is needed"),
        ({"rope": "{type: yarm}"}, "did you mean 'yarn'"),
    ],
)
def test_bad_arguments_of_the_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("{", r"\{")):
        EabfLM(TINY, **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams; expected 1"),
        ({"top_q": 1}, "unknown generation setting 'top_q': did you mean 'top_p'"),
        ({"max_gen_toks": WINDOW - 1}, f"{WINDOW - 1} new tokens, as the task sets them, leave no room"),
    ],
)
def test_what_a_task_may_not_ask_for(ours: EabfLM, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ours.generate_until([request("generate_until", "a", settings)])
    with pytest.raises(InputError, match="continuation of 1101 tokens exceeds the window"):
        ours._loglikelihood_tokens([(None, [1], [5] * 1101)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "longbench_qaspr"), "unknown task 'longbench_qaspr': did you mean 'longbench_qasper'"),
        (("--tasks", "local_choice,xqzw"), "unknown task 'xqzw': `lm-eval ls tasks` lists all"),
        (("--tasks", "longbench_lcc"), "task longbench_lcc: its dataset Xnhyacinth/LongBench lcc cannot be loaded"),
        (("--tasks", "longbench_qasper"), "put LongBench's jsonl files into a directory and name it with --data, or"),
        (("--tasks", "mmlu_anatomy"), "its dataset cais/mmlu anatomy cannot be loaded"),
        (("--tasks", "longbench12", "--data", TASKS), "narrativeqa.jsonl does not exist, and longbench_narrativeqa"),
        (("--tasks", "a", "--windows", "4k"), "--windows '4k' is not a list of numbers of tokens"),
        (("--tasks", "a", "--limit", "0"), "--limit 0: a positive number"),
        (("--tasks", "a", "--num-fewshot", "-1"), "--num-fewshot -1: 0 or a positive number"),
        (("--tasks", "a", "--dtype", "int8"), "unknown --dtype 'int8'"),
        (("--tasks", "a", "--data", "nowhere"), "--data nowhere: no such directory"),
        (("--tasks", "a", "--model", TINY), "is used twice"),
        (("--tasks", "a", "--model", "x=nowhere"), "nowhere: no such directory"),
        (("--tasks", "a", "--model", f"x={TINY}@{{type: eabff}}"), "did you mean 'eabf'"),
        (("--tasks", "a", "--json", "no/x.json"), "no directory no"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in complaint(capsys, "--model", TINY, "--include-path", TASKS, *arguments)


def test_models_and_packages_that_lack_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(TINY, bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="has no chat template"):
        EabfLM(str(bare)).apply_chat_template([{"role": "user", "content": "Hi"}])
    chat = ("--model", str(bare), "--tasks", "local_choice", "--apply-chat-template")
    assert "has no chat template; leave --apply-chat-template out" in complaint(capsys, *chat)

    class Broken:
        def load(self, _: Any) -> None:
            raise ImportError("install rouge")

    with pytest.raises(InputError, match="task a: install rouge; pip install"):
        command._load_task(Broken(), "a", None)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert "pip install 'eabf-jax[harness]'" in complaint(capsys, "--model", TINY, "--tasks", "local_choice")
