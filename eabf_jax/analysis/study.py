"""The file of a study: methods x data x seeds, and what is measured on each."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from eabf_jax.analysis.measures import MEASURES, Column
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.fields import build, typed
from eabf_jax.reading import parse_yaml, read_text, reading
from eabf_jax.training.recipe import TrainConfig, configure

# Folders in a study's directory.
CELLS, TUNING, SCRATCH = "cells", "tuning", "scratch"
# Keys of a training stage that stand for longer ones.
_STAGE_KEYS = {"directory": "data.directory", "split": "data.split", "samples": "data.samples"}
# Sections whose value is one thing; others are given key by key.
_WHOLE_SECTIONS = ("rope", "lora", "mesh", "model.shape")
# Keys that the study itself sets.
_OWN_KEYS = ("output", "recipe.seed", "overwrite", "distributed", "checkpoint.every_steps")


@dataclass(frozen=True)
class Documents:
    """Documents of a prepared dataset."""

    directory: str
    split: str = "held_out"
    first: int = 0  # number of the first one, counted without those that training or tuning has seen
    count: int | None = None  # null: all from the first


@dataclass(frozen=True)
class Evaluate:
    """What every cell is measured on."""

    documents: Documents
    windows: tuple[int, ...]  # tokens, ascending
    measures: dict[str, Any]  # settings by name in `measures.MEASURES`
    batch_size: int = 1  # rows that each device reads at a time


@dataclass(frozen=True)
class Tune:
    """How each method's settings are chosen: the lowest mean loss over the trained window."""

    values: dict[str, Any]  # values to try by dotted key: a list, or {methods: [...], values: [...]}
    data: str  # a label of `data`
    documents: Documents
    seed: int = 0


@dataclass(frozen=True)
class Claim:
    """A statement that one side is better than the other."""

    text: str
    better: Any  # a method, or a mapping of some of method, data, window and band
    worse: Any  # likewise
    measure: str  # a quantity, such as loss
    data: str | None = None  # null: the largest amount
    window: int | None = None  # tokens; null: the trained window
    band: tuple[int, ...] | None = None  # positions; null: the window's last band
    margin: float = 0.0  # how much better; negative: how much worse still counts as no worse


@dataclass(frozen=True)
class Study:
    """The file of a study."""

    output: str  # directory
    config: str  # configuration that every cell starts from
    methods: dict[str, Any]  # by label, dotted keys of the configuration that differ
    data: dict[str, Any]  # by label, a list of training stages; none: no training
    evaluate: Evaluate
    seeds: tuple[int, ...] = (0,)
    settings: dict[str, Any] = field(default_factory=dict)  # dotted keys of the configuration for all cells
    only: dict[str, Any] = field(default_factory=dict)  # by data label, the methods to train on it; others: all
    tune: Tune | None = None
    reference: str | None = None  # the method that others are tested against; null: the last one
    claims: tuple[Claim, ...] = ()
    keep_runs: bool = False  # keep the trained models

    @property
    def directory(self) -> Path:
        """The study's directory."""
        return Path(self.output)

    @property
    def measures(self) -> dict[str, Any]:
        """The settings of each measure, by name."""
        return {
            name: build(MEASURES[name].settings, values or {}, "study key", f"evaluate.measures.{name}.")
            for name, values in self.evaluate.measures.items()
        }

    @property
    def columns(self) -> list[Column]:
        """Every column that a cell has, measure by measure."""
        return [
            column
            for name, settings in self.measures.items()
            for column in MEASURES[name].columns(settings, self.evaluate.windows)
        ]

    @property
    def amounts(self) -> list[str]:
        """The labels of data without training, or with one stage of it."""
        return [label for label, stages in self.data.items() if len(stages) < 2]

    @property
    def main_data(self) -> str:
        """The last amount of data with training; without any, the first label."""
        trained = [label for label in self.amounts if self.data[label]]
        return trained[-1] if trained else next(iter(self.data))

    @property
    def reference_method(self) -> str:
        """The method that others are tested against."""
        return self.reference or list(self.methods)[-1]

    @property
    def trained_window(self) -> int:
        """The window that every method is trained for, in tokens."""
        return configure(self.config, {**self.settings, **next(iter(self.methods.values()))}).window

    def column_of(self, quantity: str, window: int, band: Sequence[int] | None = None) -> Column:
        """Finds a column; without a band, the one that stands for the window.

        Raises:
          InputError: there is none.
        """
        found = [column for column in self.columns if column[:2] == (quantity, window)]
        if band is not None:
            found = [column for column in found if column.band == tuple(band)]
        if not found:
            told = "" if band is None else f" and band {list(band)}"
            known = sorted({str(c.window) if c.band is None else f"{c.window} {list(c.band)}" for c in self.columns})
            raise InputError(f"{quantity} has no column with window {window}{told}; there are {', '.join(known)}")
        return found[-1]


def load_study(path: str) -> Study:
    """Reads a study's file and checks what needs neither model nor data.

    Raises:
      InputError: unreadable file; unknown or missing key, method, data or measure; wrong type; an empty list.
    """
    values = _numbers(parse_yaml(read_text(Path(path)), path))
    with reading(path, "not a study"):
        return _study(values)


def _study(values: Any) -> Study:
    study = build(Study, values, "study key")
    study = replace(
        study,
        methods=_by_label("methods", study.methods, _keys_of),
        data=_by_label("data", study.data, _stages_of),
        only=_by_label("only", study.only, lambda key, value: typed(tuple[str, ...], value, "study key", key)),
        settings=_keys_of("settings", study.settings),
    )
    _check_study(study)
    return study


def _numbers(value: Any) -> Any:
    """Reads numbers such as 1e-4, which YAML 1.1 takes for text."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_number else value


def _by_label(key: str, values: Mapping[Any, Any], read: Callable[[str, Any], Any]) -> dict[str, Any]:
    found = {str(label): read(f"{key}.{label}", value) for label, value in values.items()}
    names: dict[str, str] = {}
    for label in found:
        other = names.setdefault(file_name(label), label)
        if other != label:
            raise InputError(f"study key '{key}' has {other!r} and {label!r}, whose files would have the same name")
    return found


def _keys_of(key: str, values: Any) -> dict[str, Any]:
    """Checks a mapping of dotted keys of the configuration."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InputError(f"study key '{key}' is {values!r:.80}; a mapping of configuration keys is needed")
    for name, value in values.items():
        if name in _OWN_KEYS:
            raise InputError(f"study key '{key}' has {name}, which the study sets itself: leave it out")
        if isinstance(value, Mapping) and name not in _WHOLE_SECTIONS:
            raise InputError(f"study key '{key}' has a mapping for {name}; write its keys as {name}.KEY: VALUE")
    return {str(name): value for name, value in values.items()}


def _stages_of(key: str, values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list):
        raise InputError(f"study key '{key}' is {values!r:.80}; a list of training stages is needed, [] for none")
    stages = []
    for number, stage in enumerate(values):
        if not isinstance(stage, Mapping) or not {"directory", "data.directory"} & stage.keys():
            raise InputError(f"study key '{key}' has the stage {stage!r:.80}; a mapping with a directory is needed")
        stages.append(_keys_of(f"{key}.{number}", {_STAGE_KEYS.get(name, name): item for name, item in stage.items()}))
    return stages


def _check_study(study: Study) -> None:
    for key in ("methods", "data", "seeds"):
        if not getattr(study, key):
            raise InputError(f"study key '{key}' is empty; at least one is needed")
    evaluate = study.evaluate
    if len(set(study.seeds)) < len(study.seeds) or not 0 <= min(study.seeds) <= max(study.seeds) < 2**32:
        raise InputError(f"study key 'seeds' is {list(study.seeds)}; different numbers from 0, below 2^32, are needed")
    windows = evaluate.windows
    if not windows or list(windows) != sorted(set(windows)) or windows[0] < 2:
        raise InputError(f"study key 'evaluate.windows' is {list(windows)}; ascending numbers of tokens are needed")
    if not evaluate.measures or evaluate.batch_size < 1:
        raise InputError("study key 'evaluate' needs at least one of measures, and a positive batch_size")
    for name in evaluate.measures:
        if name not in MEASURES:
            raise unknown_name("study key", f"evaluate.measures.{name}", [f"evaluate.measures.{n}" for n in MEASURES])
    _ = study.columns  # checks the measures' settings
    for label, methods in study.only.items():
        _known("only", label, study.data)
        for method in methods:
            _known(f"only.{label}", method, study.methods)
    if study.reference is not None:
        _known("reference", study.reference, study.methods)
    parts = [("evaluate.documents", evaluate.documents)]
    if study.tune is not None:
        parts.append(("tune.documents", study.tune.documents))
        _known("tune.data", study.tune.data, study.data)
        if len(study.data[study.tune.data]) != 1:
            raise InputError(f"study key 'tune.data' is {study.tune.data!r}; data with one stage of training is needed")
        if not study.tune.values:
            raise InputError("study key 'tune.values' is empty; values to try by dotted key are needed")
        for method in study.methods:
            grid(study, method)
    for key, documents in parts:
        if documents.first < 0 or (documents.count is not None and documents.count < 1):
            raise InputError(
                f"study key '{key}' has first {documents.first}, count {documents.count}; at least 0 and 1"
            )
    names: dict[str, str] = {}
    for cell in (*tuning_cells(study), *measured_cells(study)):
        other = names.setdefault(cell.name, cell.label)
        if other != cell.label:
            raise InputError(
                f"the cells {other!r} and {cell.label!r} would have the same file: rename a method or data"
            )
    configure(study.config, {})  # so that a fault in it is not taken for a claim's
    for claim in study.claims:
        try:
            sides(study, claim)
        except InputError as error:
            raise InputError(f"claim {claim.text!r}: {error}") from error


def _known(key: str, name: Any, known: Mapping[str, Any]) -> None:
    if name not in known:
        raise unknown_name(f"name in study key '{key}'", str(name), known)


class Side(NamedTuple):
    """What one side of a claim names."""

    method: str
    data: str
    column: Column


def sides(study: Study, claim: Claim) -> tuple[Side, Side]:
    """Returns what a claim compares: the better side and the worse one.

    Raises:
      InputError: an unknown measure, method, data, window or band.
    """
    if claim.measure not in {column.quantity for column in study.columns}:
        raise unknown_name("measure of this study", claim.measure, {column.quantity for column in study.columns})

    def side(told: Any) -> Side:
        values = told if isinstance(told, Mapping) else {"method": told}
        for key in values:
            if key not in ("method", "data", "window", "band"):
                raise unknown_name("key", key, ("method", "data", "window", "band"))
        method = typed(str, values.get("method"), "key", "method")
        data = str(values.get("data", claim.data or study.main_data))
        _known("claims", method, study.methods)
        _known("claims", data, study.data)
        if method not in study.only.get(data, study.methods):
            raise InputError(f"{method} is not trained on {data!r}, because of study key 'only.{data}'")
        window = typed(int, values.get("window", claim.window or study.trained_window), "key", "window")
        band = values.get("band", claim.band)
        if isinstance(values.get("band"), Mapping | Sequence | int):
            band = typed(tuple[int, ...], values["band"], "key", "band")
        column = study.column_of(claim.measure, window, band)
        return Side(str(method), data, column)

    return side(claim.better), side(claim.worse)


def file_name(label: str) -> str:
    """Returns a label as part of a file's name."""
    return re.sub(r"[^\w.+=-]+", "_", label)


@dataclass(frozen=True)
class Cell:
    """A model to train and measure."""

    method: str
    data: str
    seed: int
    tried: tuple[tuple[str, Any], ...] | None = None  # values to try, for a cell that tunes a method

    @property
    def label(self) -> str:
        """The name for people."""
        if self.tried is None:
            return f"{self.method}, {self.data}, seed {self.seed}"
        return ", ".join([f"tuning {self.method}", *(f"{key} {value!r}" for key, value in self.tried)])

    @property
    def name(self) -> str:
        """The path of its file in the study's directory, without a suffix."""
        if self.tried is None:
            return f"{CELLS}/{file_name(self.method)}__{file_name(self.data)}__{self.seed}"
        return f"{TUNING}/" + "__".join([file_name(self.method), *(f"{key}={value!r}" for key, value in self.tried)])


def grid(study: Study, method: str) -> list[tuple[tuple[str, Any], ...]]:
    """Lists the settings to try for a method: every combination of the values of each key.

    Raises:
      InputError: a key without a list of numbers, or an unknown method.
    """
    axes = []
    for key, told in study.tune.values.items() if study.tune else ():
        values, methods = told, tuple(study.methods)
        if isinstance(told, Mapping):
            values = told.get("values")
            methods = typed(tuple[str, ...], told.get("methods"), "study key", f"tune.values.{key}.methods")
        for name in methods:
            _known(f"tune.values.{key}.methods", name, study.methods)
        values = typed(tuple[float, ...], values, "study key", f"tune.values.{key}")
        if not values or key in _OWN_KEYS:
            raise InputError(f"study key 'tune.values.{key}' is {list(values)}; a list of numbers to try is needed")
        if method in methods:
            axes.append([(key, value) for value in values])
    return list(itertools.product(*axes))


def tuning_cells(study: Study) -> list[Cell]:
    """Lists the cells that choose each method's settings; none for a method with nothing to choose."""
    if study.tune is None:
        return []
    return [
        Cell(method, study.tune.data, study.tune.seed, tried)
        for method in study.methods
        for tried in grid(study, method)
        if tried
    ]


def measured_cells(study: Study) -> list[Cell]:
    """Lists the cells that are measured, every method with the first seed before any with the next.

    Without training, seeds make no difference, so there is one cell.
    """
    return [
        Cell(method, label, seed)
        for number, seed in enumerate(study.seeds)
        for label, stages in study.data.items()
        if stages or number == 0
        for method in study.only.get(label, study.methods)
    ]


def configurations(study: Study, cell: Cell, tuned: Mapping[str, Any]) -> list[TrainConfig]:
    """Builds the configuration of each training stage; a cell without training has one as well, for its model.

    Args:
      tuned: values chosen for the method, by dotted key.

    Raises:
      InputError: as for `recipe.configure`.
    """
    own = {
        "output": str(study.directory / SCRATCH / "0"),
        "recipe.seed": cell.seed,
        "overwrite": False,
        "distributed": False,
        "checkpoint.every_steps": None,
    }
    try:
        return [
            configure(
                study.config,
                {**study.settings, **study.methods[cell.method], **tuned, **stage, **own}
                | {"output": str(study.directory / SCRATCH / str(number))},
            )
            for number, stage in enumerate(study.data[cell.data] or [{}])
        ]
    except InputError as error:
        raise InputError(f"{cell.label}: {error}") from error
