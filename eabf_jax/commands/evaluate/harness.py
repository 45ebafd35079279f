"""`eabf evaluate harness`: tasks of lm-evaluation-harness for models and windows side by side.

The harness is an optional dependency, so it is imported only when the command runs.
"""

import argparse
import contextlib
import difflib
import functools
import importlib
import json
import logging
import math
import numbers
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from eabf_jax.commands import evaluate as common
from eabf_jax.console import Grid, show
from eabf_jax.data.dataset import tokenizer_digest
from eabf_jax.errors import InputError
from eabf_jax.evaluation import longbench, ruler
from eabf_jax.evaluation.intervals import finite, student
from eabf_jax.inference.text import TRUNCATIONS
from eabf_jax.interop.directory import new_directory
from eabf_jax.interop.loading import Entry
from eabf_jax.interop.tokenizer import load_tokenizer

# Bootstrap resamples for the standard error of metrics without a formula for it, such as perplexity.
_RESAMPLES = 1000
# Number of similar names suggested for an unknown one.
_NEAREST = 5


# What decides how many tokens a text has: digest of the tokenizer, and chat template.
_Reader = tuple[str, str | None]
# By task and metric, the figure of each document, which its task, number and hash identify.
_Values = dict[tuple[str, str], dict[tuple[str, int, str], float]]


class Score(NamedTuple):
    """The value of one metric."""

    model: str  # its label
    window: int
    task: str
    metric: str
    value: float
    standard_error: float | None  # over documents; None if the harness gives none
    documents: int | None  # None for a group of tasks


class Difference(NamedTuple):
    """How much more a model scores than the first one, paired by document, at the window in the same place."""

    model: str  # its label
    window: int
    task: str
    metric: str
    mean: float
    half_width: float  # of the 95 % confidence interval over documents; NaN for one document
    documents: int


class Report(NamedTuple):
    """The scores of all models and windows."""

    scores: list[Score]
    macro_averages: list[
        Score
    ]  # of LongBench's twelve tasks and RULER's thirteen, 0 to 100, where all of them were run
    beside_first: list[Difference]  # of metrics that are means over documents; empty for a single model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    common.add_arguments(parser)
    add = parser.add_argument
    add(
        "--tasks",
        required=True,
        metavar="NAME,...",
        help=f"tasks, groups or tags of lm-evaluation-harness, with wildcards; {longbench.GROUP} stands for the "
        f"paper's twelve LongBench tasks, and {ruler.GROUPS[0]} for RULER's thirteen",
    )
    add(
        "--windows",
        help="maximum tokens of a prompt and its answer, e.g. 4096,8192,16384,32768: every task runs at each, and "
        "RULER's prompts are made as long as each (default: the model's own)",
    )
    add(
        "--truncate",
        choices=TRUNCATIONS,
        default="middle",
        help="shorten longer prompts in their middle (default, as the paper does) or at their left end",
    )
    add("--include-path", metavar="DIR", help="further task files (YAML), which take precedence over the harness's")
    add(
        "--data",
        metavar="DIR",
        help="LongBench's own files (narrativeqa.jsonl, ...) and RULER's (squad.json, ...), for use without a network",
    )
    add(
        "--limit",
        type=int,
        help=f"number of documents to use of each task, from the first (default: all, and {ruler.SAMPLES} in RULER)",
    )
    add("--num-fewshot", type=int, help="examples before each question (default: the task's)")
    add(
        "--apply-chat-template",
        action="store_true",
        help="put prompts into the model's chat template, except LongBench's TREC, TriviaQA and SAMSum, as "
        "LongBench does",
    )
    add("--output", metavar="DIR", help="write every request and answer to model/window/task.jsonl in DIR")


def run(arguments: argparse.Namespace) -> None:
    """Runs every task with every model at every window; prints and writes the figures."""
    entries = common.begin(arguments, ("limit",))
    windows = _check(arguments, entries)
    _import_harness()
    tasks = load_tasks(arguments.tasks.split(","), arguments.include_path, arguments.data)
    with contextlib.nullcontext() if arguments.output is None else new_directory(arguments.output) as directory:
        report = _measure(arguments, entries, windows, tasks, directory)
    common.report(arguments, table(report), as_json(report, arguments))
    if report.beside_first:
        show(difference_table(report))


def _check(arguments: argparse.Namespace, entries: Sequence[Entry]) -> list[list[int]]:
    """Checks the options before hours of work; returns the windows of each model."""
    if arguments.num_fewshot is not None and arguments.num_fewshot < 0:
        raise InputError(f"--num-fewshot {arguments.num_fewshot}: 0 or a positive number is needed")
    for option in ("include_path", "data"):
        value = getattr(arguments, option)
        if value is not None and not Path(value).is_dir():
            raise InputError(f"--{option.replace('_', '-')} {value}: no such directory")
    own = []
    for entry in entries:
        own.append(entry.config.max_position_embeddings)
        if arguments.apply_chat_template and load_tokenizer(entry.directory).chat_template is None:
            raise InputError(f"{entry.directory} has no chat template; leave --apply-chat-template out")
    if arguments.windows is None:
        return [[window] for window in own]
    windows = common.numbers("--windows", arguments.windows, "numbers of tokens such as 4096,8192")
    if min(windows) < 2:
        raise InputError(f"--windows {arguments.windows}: numbers of tokens from 2 are needed")
    return [windows] * len(entries)


def _import_harness() -> None:
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise InputError(
            "lm-evaluation-harness is not installed: pip install 'eabf-jax[harness]', or pip install -e '.[harness]' "
            "in a clone"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about settings that this command makes
    os.environ["DISABLE_MULTIPROC"] = "1"  # otherwise it forks a process that runs JAX


def load_tasks(names: Sequence[str], include_path: str | None, data: str | None) -> dict[str, list[Any]]:
    """Loads tasks with their datasets.

    Args:
      names: tasks, groups or tags, or patterns of them, or `longbench.GROUP`.
      include_path: directory of further task files, or None.
      data: directory of LongBench's jsonl files to read in place of the tasks' datasets, or None.

    Returns:
      The harness's tasks and groups, by the name that selects them. The lists of RULER's tasks are empty, because their
      samples depend on the tokenizer and the window.
    Raises:
      InputError: an unknown task, a missing package, or a dataset that cannot be loaded.
    """
    manager = _task_manager(include_path)
    found: dict[str, list[Any]] = {}
    for name in names:
        members = list(longbench.TASKS) if name == longbench.GROUP else manager.match_tasks([name])
        if not members:
            near = difflib.get_close_matches(name, [*manager.all_tasks, longbench.GROUP], n=_NEAREST)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise InputError(f"unknown task {name!r}: {hint}`lm-eval ls tasks` lists all, --include-path adds more")
        for member in members:
            if member in ruler.GROUPS:
                found |= {task: [] for task in ruler.TASKS}
            else:
                found[member] = [] if member in ruler.TASKS else _load_task(manager, member, data)
    return found


@functools.cache
def _task_manager(include_path: str | None) -> Any:
    # It reads thousands of files, which takes seconds.
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _load_task(manager: Any, name: str, data: str | None) -> list[Any]:
    """Loads the tasks, or the group, that a name stands for."""
    from datasets.exceptions import DatasetsError

    spec: Any = name
    if data is not None and name in longbench.TASKS:
        path = Path(data) / f"{longbench.TASKS[name]}.jsonl"
        if not path.is_file():
            raise InputError(f"{path} does not exist, and {name} needs it; it is in LongBench's data.zip")
        # The harness takes changed settings only for members of a group.
        local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(path)}}}
        spec = {"group": f"{name} of {data}", "task": [{"task": name, **local, "process_docs": _named_as_on_the_hub}]}
    try:
        loaded = manager.load([spec])
    except ImportError as error:
        raise InputError(f"task {name}: {error}; pip install 'eabf-jax[harness]' adds what LongBench needs") from error
    except (DatasetsError, OSError) as error:
        first = "put LongBench's jsonl files into a directory and name it with --data, or "
        entry = manager.task_index[name].cfg or {}
        source = " ".join(str(entry[key]) for key in ("dataset_path", "dataset_name") if entry.get(key))
        raise InputError(
            f"task {name}: its dataset {source or 'of one of its tasks'} cannot be loaded ({str(error)[:120]}): "
            f"{first if name in longbench.TASKS else ''}put a "
            "task file with dataset_path: json and dataset_kwargs: {data_files: {test: FILE}} into a directory for "
            "--include-path"
        ) from error
    return list(loaded["tasks"].values()) if isinstance(spec, dict) else _top(loaded)


def _top(loaded: Any) -> list[Any]:
    """Returns the groups that are in no other group; the tasks if there are none."""
    inner = {child for children in loaded["group_map"].values() for child in children}
    outer = [group for name, group in loaded["groups"].items() if name not in inner]
    return outer or list(loaded["tasks"].values())


def _named_as_on_the_hub(documents: Any) -> Any:
    """Renames "input" in LongBench's files to "question", which the harness's tasks expect from a copy on the hub."""
    return documents if "question" in documents.column_names else documents.rename_column("input", "question")


def _measure(
    arguments: argparse.Namespace,
    entries: Sequence[Entry],
    windows: Sequence[Sequence[int]],
    tasks: dict[str, list[Any]],
    output: Path | None,
) -> Report:
    from eabf_jax.evaluation.harness import EabfLM

    options = {name: getattr(arguments, name) for name in ("dtype", "batch_size", "truncate", "tensor")}
    models = [EabfLM(directory, rope=rope, **options) for _, directory, rope, _ in entries]
    samples = _ruler_samples(arguments, models, windows, [name for name in tasks if name in ruler.TASKS])
    manager = _task_manager(arguments.include_path)
    report = Report([], [], [])
    first: list[_Values] = []  # of the first model, by place of the window
    for (label, *_), lengths in zip(entries, windows, strict=True):
        model = models.pop(0)  # frees the one before
        for place, window in enumerate(lengths):
            model.window = window
            print(f"{label}, window {window:,}", file=sys.stderr)
            made = samples[_reader(model, arguments), window]
            own = {name: [ruler.load_task(name, dataset, manager)] for name, dataset in made.items()}
            results = evaluate(model, tasks | own, arguments)
            scores = [score for result in results for score in _scores(label, window, result)]
            report.scores.extend(scores)
            for group, mean in _macro_averages(scores):
                report.macro_averages.append(Score(label, window, group, "macro average", mean, None, None))
            values = _values(results)
            if label == entries[0].label:
                first.append(values)
            else:
                report.beside_first.extend(_differences(scores, values, first[place]))
            if output is not None:
                _write_samples(output / _file_name(label) / str(window), results)
    return report


def _ruler_samples(
    arguments: argparse.Namespace, models: Sequence[Any], windows: Sequence[Sequence[int]], names: Sequence[str]
) -> dict[tuple[_Reader, int], dict[str, Any]]:
    """Makes the samples of RULER's tasks for every window, once for models that read the same text."""
    if names and arguments.num_fewshot:
        raise InputError(
            f"--num-fewshot {arguments.num_fewshot}: {names[0]} has no examples to choose from; leave it out"
        )
    manager = _task_manager(arguments.include_path)
    made: dict[tuple[_Reader, int], dict[str, Any]] = {}
    for model, lengths in zip(models, windows, strict=True):
        for window in lengths:
            parts = made.setdefault((_reader(model, arguments), window), {})
            for name in names:
                if name not in parts:
                    print(f"making the samples of {name}, window {window:,}", file=sys.stderr)
                    parts[name] = ruler.make_samples(
                        name,
                        model,
                        window,
                        arguments.limit or ruler.SAMPLES,
                        arguments.data,
                        manager,
                        chat_template=arguments.apply_chat_template,
                    )
    return made


def _reader(model: Any, arguments: argparse.Namespace) -> _Reader:
    """Returns what decides how many tokens a text has for a model: its tokenizer, and its template if it is applied."""
    tokenizer = model.tokenizer
    return tokenizer_digest(tokenizer), tokenizer.chat_template if arguments.apply_chat_template else None


def evaluate(model: Any, tasks: dict[str, list[Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs loaded tasks with one model.

    Args:
      model: any instance of the harness's LM.
      arguments: `apply_chat_template`, `num_fewshot`, `limit` and `include_path` are used.

    Returns:
      Results of the harness's `simple_evaluate`, one for tasks in a chat template and one for the others.
    """
    from lm_eval import simple_evaluate

    templated = [name for name in tasks if arguments.apply_chat_template and name not in longbench.FEW_SHOT]
    plain = [name for name in tasks if name not in templated]
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints its progress
        return [
            simple_evaluate(
                model=model,
                tasks=[task for name in names for task in tasks[name]],
                num_fewshot=arguments.num_fewshot,
                limit=arguments.limit,
                apply_chat_template=names is templated,
                fewshot_as_multiturn=names is templated,
                bootstrap_iters=_RESAMPLES,
                task_manager=_task_manager(arguments.include_path),
            )
            for names in (templated, plain)
            if names
        ]


def _scores(label: str, window: int, result: dict[str, Any]) -> list[Score]:
    """Extracts the scores of tasks and groups from a result of the harness."""
    scores = []
    for task, figures in result["results"].items():
        documents = result["n-samples"].get(task, {}).get("effective")
        for key, value in figures.items():
            name, _, chosen = key.partition(",")
            if not chosen or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            # LongBench tasks give the same figure a second time, under a name of their own.
            if task in longbench.TASKS and name != longbench.METRIC:
                continue
            metric = _metric(name, chosen)
            error = figures.get(f"{name}_stderr,{chosen}")
            error = float(error) if isinstance(error, int | float) else None
            scores.append(Score(label, window, task, metric, float(value), error, documents))
    return scores


def _macro_averages(scores: Sequence[Score]) -> Iterator[tuple[str, float]]:
    """Yields the averages of LongBench and RULER, in percent, if all of their tasks are there."""
    percent = {score.task: 100 * score.value for score in scores if score.metric in (longbench.METRIC, ruler.METRIC)}
    if (mean := longbench.macro_average(percent)) is not None:
        yield longbench.GROUP, mean
    if ruler.TASKS.keys() <= percent.keys():
        yield ruler.GROUPS[0], fmean(percent[task] for task in ruler.TASKS)


def _metric(name: str, chosen: str) -> str:
    """Returns the name of a metric after a filter of the answers, "none" if there is no filter."""
    return name if chosen == "none" else f"{name} ({chosen})"


def _values(results: Sequence[dict[str, Any]]) -> _Values:
    """Extracts the figure of every document from results of the harness; a group has the documents of its tasks."""
    values: _Values = {}
    for result in results:
        for task, samples in result["samples"].items():
            for sample in samples:
                document = (task, sample["doc_id"], sample["doc_hash"])
                for name in sample["metrics"]:
                    if isinstance(sample[name], numbers.Real):
                        key = (task, _metric(name, sample["filter"]))
                        values.setdefault(key, {})[document] = float(sample[name])
        for group in result["group_subtasks"]:
            tasks = set(_leaves(group, result["group_subtasks"]))
            for (task, metric), found in list(values.items()):
                if task in tasks and task != group:
                    values.setdefault((group, metric), {}).update(found)
    return values


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the tasks of a group and of the groups in it."""
    return [leaf for member in members[name] for leaf in _leaves(member, members)] if members.get(name) else [name]


def _differences(scores: Sequence[Score], values: _Values, first: _Values) -> list[Difference]:
    """Compares a model with the first one where both have the same documents and the score is their mean."""
    differences = []
    for score in scores:
        mine, theirs = (side.get((score.task, score.metric), {}) for side in (values, first))
        # Other scores, such as a perplexity, are no means of what the harness gives for each document.
        if mine and mine.keys() == theirs.keys() and math.isclose(fmean(mine.values()), score.value, abs_tol=1e-9):
            mean = student(np.array([mine[document] - theirs[document] for document in mine]))
            differences.append(Difference(score.model, score.window, score.task, score.metric, *mean, len(mine)))
    return differences


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.-]+", "_", label)


def _write_samples(directory: Path, results: Sequence[dict[str, Any]]) -> None:
    from lm_eval.utils import handle_non_serializable

    directory.mkdir(parents=True)
    for result in results:
        for task, samples in result["samples"].items():
            lines = (json.dumps(sample, ensure_ascii=False, default=handle_non_serializable) for sample in samples)
            (directory / f"{_file_name(task)}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(report: Report) -> Grid:
    """Lays out the scores: one row per metric, one column per model and window, and the paper's figures below."""
    columns = list(dict.fromkeys((score.model, score.window) for score in report.scores))
    heads = (f"{label}\n{window:,}" for label, window in columns)
    grid = Grid(["task", "metric"], heads, title="tasks of lm-evaluation-harness")
    rows: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for score in report.scores:
        text = _shown(score.task, score.value)
        if score.standard_error is not None:
            text += f" ± {_shown(score.task, score.standard_error)}"
        rows.setdefault((score.task, score.metric), {})[score.model, score.window] = text
    for (task, metric), cells in rows.items():
        grid.add([longbench.TASKS.get(task, task), metric], [cells.get(column, "") for column in columns])
    for group in dict.fromkeys(score.task for score in report.macro_averages):
        means = {
            (score.model, score.window): f"{score.value:.1f}" for score in report.macro_averages if score.task == group
        }
        grid.add_section()
        grid.add([group, "macro average"], [means.get(column, "") for column in columns], style="bold")
        if group != longbench.GROUP:
            continue
        for method, reported in longbench.PAPER.items():
            given = [str(reported.get(window, "")) for _, window in columns]
            if any(given):
                grid.add([f"paper, {method}", "macro average"], given)
        grid.caption = f"paper: {longbench.SOURCE}"
    return grid


def difference_table(report: Report) -> Grid:
    """Lays out the differences to the first model: one row per metric, in bold where the interval excludes zero."""
    columns = list(dict.fromkeys((found.model, found.window) for found in report.beside_first))
    first = report.scores[0].model
    title = f"beside {first}: difference by document (95 % interval)"
    grid = Grid(["task", "metric"], (f"{label}\n{window:,}" for label, window in columns), title=title)
    rows: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for found in report.beside_first:
        text = _shown(found.task, found.mean, sign="+")
        if not math.isnan(found.half_width):
            text += f" ± {_shown(found.task, found.half_width)}"
        text = f"[bold]{text}[/bold]" if abs(found.mean) > found.half_width > 0 else text
        rows.setdefault((found.task, found.metric), {})[found.model, found.window] = text
    for (task, metric), cells in rows.items():
        grid.add([longbench.TASKS.get(task, task), metric], [cells.get(column, "") for column in columns])
    return grid


def _shown(task: str, value: float, sign: str = "") -> str:
    """Returns a figure as text; those of LongBench and RULER in percent, as their papers do."""
    is_percent = task in longbench.TASKS or task in ruler.TASKS
    return f"{100 * value:{sign}.1f}" if is_percent else f"{value:{sign}.4f}"


def as_json(report: Report, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the scores as JSON values, with the settings of the measurement."""
    options = ("dtype", "truncate", "limit", "num_fewshot", "apply_chat_template")
    measured = common.measured_on()
    packages = ["lm-eval", "datasets"]
    if any(score.task in ruler.TASKS for score in report.scores):
        packages.append("wonderwords")  # RULER draws words from its lists
    measured["versions"] |= {name: version(name) for name in packages}
    return {
        **measured,
        **{name: getattr(arguments, name) for name in options},
        "seeds": "lm-evaluation-harness' own: 0 for Python, 1234 for the others; draws from 0 on",
        "models": list(arguments.model),
        "scores": [score._asdict() for score in report.scores],
        "macro_averages": [score._asdict() for score in report.macro_averages],
        "beside_first": [finite(found._asdict()) for found in report.beside_first],
        "paper": {"source": longbench.SOURCE, "macro_averages": longbench.PAPER},
    }
