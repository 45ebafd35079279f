"""RULER as lm-evaluation-harness has it, with samples for one of our tokenizers and windows.

The harness's own modules make the samples. They are given our tokenizer, the number of samples and local files.
"""

import contextlib
import functools
import importlib
import inspect
import json
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from eabf_jax.errors import InputError

# Name in lm-evaluation-harness -> the function of its ruler package that makes the samples. The order is the group's.
TASKS = {
    "niah_single_1": "niah_utils.niah_single_1",
    "niah_single_2": "niah_utils.niah_single_2",
    "niah_single_3": "niah_utils.niah_single_3",
    "niah_multikey_1": "niah_utils.niah_multikey_1",
    "niah_multikey_2": "niah_utils.niah_multikey_2",
    "niah_multikey_3": "niah_utils.niah_multikey_3",
    "niah_multiquery": "niah_utils.niah_multiquery",
    "niah_multivalue": "niah_utils.niah_multivalue",
    "ruler_vt": "vt_utils.get_vt_dataset",
    "ruler_cwe": "cwe_utils.get_cw_dataset",
    "ruler_fwe": "fwe_utils.fwe_download",
    "ruler_qa_squad": "qa_utils.get_squad",
    "ruler_qa_hotpot": "qa_utils.get_hotpotqa",
}
# Names of all thirteen: the group, and a tag that only they have.
GROUPS = ("ruler", "longcxt")
METRIC = "score"  # share of an answer's parts that are found, from 0 to 1
SAMPLES = 500  # per task and length, as in the paper
SEED = 42

# Files in the form in which RULER's own scripts store them.
ESSAYS = "PaulGrahamEssays.json"
FILES = {
    **dict.fromkeys(
        ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue"), ESSAYS
    ),
    "ruler_qa_squad": "squad.json",
    "ruler_qa_hotpot": "hotpotqa.json",
}
# NLTK's model that finds the ends of the essays' sentences, at its place below a folder of NLTK's data.
SENTENCES = "tokenizers/punkt_tab"

# The function of each module that makes a given number of samples.
_MAKERS = {
    "niah_utils": "generate_samples",
    "vt_utils": "sys_vartrack_w_noise_random",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
    "qa_utils": "generate_samples",
}


def make_samples(
    name: str, model: Any, window: int, count: int, data: str | None, manager: Any, *, chat_template: bool
) -> Any:
    """Makes a task's samples, the longest that fit a window with their answers.

    The same arguments give the same samples, whatever has been drawn or made before.

    Args:
      name: one of `TASKS`.
      model: an EabfLM, of which only the tokenizer is used.
      window: maximum tokens of a prompt and its answer.
      count: number of samples; there are fewer if the task's file has fewer questions, or some fit no window.
      data: directory with `FILES`; None lets the harness download them.
      manager: the harness's TaskManager.
      chat_template: whether the model reads prompts in its chat template.

    Returns:
      A dataset for `load_task`.
    Raises:
      InputError: the window is too short, a package or a file is missing, or a file is invalid.
    """
    _check_files(name, data)
    reserve = 0
    # The harness counts neither the words that open the answer nor a chat template, and in ruler_fwe not the answer.
    while True:
        samples = _made(name, model, window, window - reserve, count, data)
        task = load_task(name, samples, manager)
        answer = task.config.generation_kwargs["max_gen_toks"]
        longest = answer + max(len(model.tok_encode(_prompt(task, sample, model, chat_template))) for sample in samples)
        if longest <= window:
            break
        reserve += longest - window
    if longest < window / 2:
        raise InputError(
            f"task {name}: the longest sample for a window of {window} tokens has {longest}, less than half of it; use "
            "larger --windows"
        )
    return samples


def load_task(name: str, samples: Any, manager: Any) -> Any:
    """Returns the harness's task on these samples, with one metric for every length."""
    module = _imported(name)
    score = module.process_results_part if name.startswith("ruler_qa") else module.process_results
    changed = {
        "task": name,
        "custom_dataset": lambda **_: {"test": samples},
        "process_results": functools.partial(_scored, score),
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }
    with _quiet():
        # The harness takes changed settings only for members of a group.
        loaded = manager.load([{"group": f"{name} of our samples", "task": [changed]}])
    return loaded["tasks"][name]


def _scored(score: Callable[..., dict[str, float]], sample: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Gives the metric a fixed name; the harness's is the length of the sample."""
    return {METRIC: score(sample, answers)[str(sample["max_length"])]}


def _prompt(task: Any, sample: dict[str, Any], model: Any, chat_template: bool) -> str:
    """Returns the text that the model reads."""
    return task.fewshot_context(
        sample,
        0,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
        chat_template=model.apply_chat_template if chat_template else None,
        gen_prefix=task.doc_to_prefix(sample),
    )


def _made(name: str, model: Any, window: int, length: int, count: int, data: str | None) -> Any:
    """Calls the harness's function for samples of `length`, as it counts."""
    from datasets.exceptions import DatasetsError

    file, function = TASKS[name].split(".")
    module = vars(_imported(name, file))
    maker = _MAKERS[file]
    changed = {
        "get_tokenizer": lambda *_: lambda text: SimpleNamespace(input_ids=model.tok_encode(text)),
        maker: functools.partial(_make, module[maker], name, window, count),
    }
    if "RNG" in module:
        changed["RNG"] = random.Random(SEED)  # the module's own has advanced
    if data is not None and name in FILES:
        path = Path(data) / FILES[name]
        if FILES[name] == ESSAYS:
            changed["get_haystack"] = lambda **_: _words(path)
        else:
            reader = "read_squad" if name == "ruler_qa_squad" else "read_hotpotqa"
            changed |= {reader: functools.partial(_questions, module[reader], path), "download_json": _read}
    with _quiet(), _replaced(module, changed):
        random.seed(SEED)
        np.random.seed(SEED)
        try:
            return module[function](max_seq_lengths=[length])["test"]
        except InputError:  # which is a ValueError too
            raise
        except (DatasetsError, OSError) as error:
            raise InputError(
                f"task {name}: its texts cannot be downloaded ({str(error)[:120]}): put {FILES.get(name)} into a "
                "directory and name it with --data"
            ) from error
        except ValueError as error:
            raise InputError(
                f"task {name}: no sample fits a window of {window} tokens; use larger --windows"
            ) from error


def _make(maker: Callable[..., list[Any]], name: str, window: int, count: int, *args: Any, **options: Any) -> list[Any]:
    """Makes at most `count` samples; refuses a length at which the harness would search without end."""
    count = min(count, options.get("num_samples", SAMPLES), len(options.get("qas", range(count))))
    module = inspect.unwrap(maker).__globals__
    length, needed = options["max_seq_length"], 0
    if name == "ruler_fwe":
        needed = len(options["tokenizer"](module["TEMPLATE"]).input_ids)
    elif name in ("ruler_vt", "ruler_cwe"):
        measured = []

        def recorded(text: str) -> Any:
            found = options["tokenizer"](text)
            measured.append(len(found.input_ids))
            return found

        # Without samples, the harness only looks for the amount of text that fits, and begins with the least.
        with _same_draws(random, *(module[draws] for draws in ("RNG",) if draws in module)):
            maker(*args, **{**options, "tokenizer": recorded, "num_samples": 0})
        # If there is an example to put before each sample, it is measured first.
        needed = sum(measured[: 2 if options.get("icl_example") else 1])
        needed += inspect.signature(maker).parameters["tokens_to_generate"].default
    if needed >= length:
        raise InputError(
            f"task {name}: its shortest sample takes {needed} tokens, too many for a window of {window}; use larger "
            "--windows"
        )
    return maker(*args, **{**options, "num_samples": count})


@functools.lru_cache(maxsize=1)
def _words(path: Path) -> list[str]:
    """Reads the essays as the harness does: all words, between single spaces."""
    text = _read(path)
    text = text.get("text") if isinstance(text, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{path} is not an object with a "text", as RULER\'s script writes the essays')
    return text.split()


def _questions(reader: Callable[[Path], Any], path: Path) -> Any:
    try:
        return reader(path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not in the form of the original file ({type(error).__name__}: {error})") from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file: {error}") from error


def _check_files(name: str, data: str | None) -> None:
    """Refuses a directory without the files that the task needs; looks there for NLTK's data too."""
    if name not in FILES:
        return
    if data is not None and not (path := Path(data) / FILES[name]).is_file():
        raise InputError(f"{path} does not exist, and {name} needs it; docs/harness.md says where it comes from")
    if FILES[name] != ESSAYS:
        return
    _imported(name)
    import nltk

    if data is not None and data not in nltk.data.path:
        nltk.data.path.insert(0, data)
    place = Path(data or "DIR") / SENTENCES
    try:
        with warnings.catch_warnings(action="ignore"):
            nltk.data.find(f"{SENTENCES}/english/")
    except LookupError as error:
        if data is None and nltk.download(place.name, quiet=True):
            return
        if place.is_dir():
            raise InputError(f"NLTK does not read {place}, which others may change: chmod -R go-w {data}") from error
        raise InputError(
            f"{place} does not exist, and {name} needs it to find the essays' sentences; put NLTK's punkt_tab there"
            + (" and give --data DIR" if data is None else "")
        ) from error


def _imported(name: str, file: str = "common_utils") -> Any:
    """Returns a module of the harness's RULER, once all that the task imports is there."""
    try:
        with _quiet():
            # Every task's settings include those of a needle task, and so its module.
            for other in ("niah_utils", TASKS[name].partition(".")[0]):
                importlib.import_module(f"lm_eval.tasks.ruler.{other}")
            return importlib.import_module(f"lm_eval.tasks.ruler.{file}")
    except ImportError as error:
        raise InputError(f"task {name}: {error}; pip install 'eabf-jax[harness]' adds what RULER needs") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness's modules from printing, and from downloading NLTK's data when they are imported."""
    import nltk

    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        _replaced(vars(nltk), {"download": lambda *_, **__: False}),
    ):
        yield


@contextlib.contextmanager
def _replaced(module: dict[str, Any], values: dict[str, Any]) -> Iterator[None]:
    """Replaces attributes of a module for a while."""
    before = {name: module[name] for name in values}
    module.update(values)
    try:
        yield
    finally:
        module.update(before)


@contextlib.contextmanager
def _same_draws(*generators: Any) -> Iterator[None]:
    """Restores Python's generators and NumPy's afterwards, as if nothing had been drawn."""
    states, numpy_state = [generator.getstate() for generator in generators], np.random.get_state()
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.setstate(state)
        np.random.set_state(numpy_state)
