"""The report of a study, made from the files of its finished cells: tables, pictures, tests and claims."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eabf_jax.analysis.figures import means_by
from eabf_jax.analysis.measures import QUANTITIES, Column
from eabf_jax.analysis.study import (
    CELLS,
    Cell,
    Claim,
    Side,
    Study,
    configurations,
    grid,
    measured_cells,
    sides,
    tuning_cells,
)
from eabf_jax.analysis.study_run import tuning_loss
from eabf_jax.console import Grid
from eabf_jax.destination import whole
from eabf_jax.errors import InputError
from eabf_jax.evaluation import longbench
from eabf_jax.evaluation.crossed import Estimate, crossed, holm, needed
from eabf_jax.evaluation.intervals import CONFIDENCE, finite
from eabf_jax.interop.directory import read_json_object
from eabf_jax.training.recipe import configure, lasting_values

REPORT = "report.md"
_LEVEL = 1 - CONFIDENCE


class Table(NamedTuple):
    """A table; figures may contain Rich's markup for bold."""

    title: str
    names: Sequence[str]  # headers of the columns that name a row
    figures: Sequence[str]  # headers of the others
    rows: list[tuple[list[str], list[str]]]

    def grid(self) -> Grid:
        """Returns the table for the terminal."""
        shown = Grid(self.names, self.figures, title=self.title)
        for names, figures in self.rows:
            shown.add(names, figures)
        return shown

    def markdown(self) -> str:
        """Returns the table as Markdown, under its title."""
        lines = [[*self.names, *self.figures], ["---"] * (len(self.names) + len(self.figures))]
        lines += [[*names, *figures] for names, figures in self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n" + text.replace("[bold]", "**").replace("[/bold]", "**") + "\n"


class Results(NamedTuple):
    """What the files of a study hold."""

    study: Study
    # by method and data, seed (None without training) and column: float64 [units]
    values: Mapping[tuple[str, str], Mapping[int | None, Mapping[Column, np.ndarray]]]
    units: Mapping[str, Sequence[str]]  # by quantity
    records: Sequence[Mapping[str, Any]]  # of finished cells
    tuning: Mapping[str, Sequence[Mapping[str, Any]]]  # finished tuning cells by method
    failed: Mapping[str, str]  # reasons by label
    cells: int  # of the study, without tuning


def read_results(study: Study) -> Results:
    """Reads the files of a study's cells; needs neither model nor data.

    Raises:
      InputError: cells were measured on different documents or with different settings of the measures.
    """
    directory, measured = study.directory, measured_cells(study)
    records = [found for cell in measured if (found := _read(directory / f"{cell.name}.json")) is not None]
    for record in records:
        _check_settings(study, record)
        for key in ("documents", "windows", "measures"):
            if record["settings"][key] != records[0]["settings"][key]:
                raise InputError(
                    f"cells in {directory / CELLS} differ in {key}: {records[0]['method']}, {records[0]['data']} has "
                    f"{records[0]['settings'][key]}, {record['method']}, {record['data']} has "
                    f"{record['settings'][key]}; start the study with --replace"
                )
    values: dict[tuple[str, str], dict[int | None, dict[Column, np.ndarray]]] = {}
    for record in records:
        columns = {_column(part): np.array(part["values"], np.float64) for part in record["values"]}
        missing = [column for column in study.columns if column not in columns]
        if missing:
            raise InputError(
                f"{record['method']}, {record['data']} in {directory / CELLS} was not measured for "
                f"{missing[0].quantity} at window {missing[0].window}; start the study with --replace"
            )
        values.setdefault((record["method"], record["data"]), {})[record["seed"]] = columns
    tuning: dict[str, list[Mapping[str, Any]]] = {}
    failed = {}
    for cell in (*tuning_cells(study), *measured):
        found = _read(directory / f"{cell.name}.json")
        if found is None and (reason := _read(directory / f"{cell.name}.failed.json")) is not None:
            failed[cell.label] = str(reason["reason"])
        if cell.tried is not None and found is not None:
            tuning.setdefault(cell.method, []).append(found)
    return Results(study, values, records[0]["units"] if records else {}, records, tuning, failed, len(measured))


def _check_settings(study: Study, record: Mapping[str, Any]) -> None:
    """Refuses a finished cell whose configuration is not that of the study's file."""
    method, data = record["method"], record["data"]
    cell = Cell(method, data, study.seeds[0] if record["seed"] is None else record["seed"])
    now = configurations(study, cell, record["tuned"])
    for config, written in zip(now, record["config"], strict=False):
        before, after = lasting_values(configure(None, written)), lasting_values(config)
        for key in dict.fromkeys([*before, *after]):
            if key != "output" and before.get(key) != after.get(key):
                raise InputError(
                    f"{cell.label} was made with {key} {before.get(key)}, which is now {after.get(key)}: start the "
                    "study with --replace"
                )


def _read(path: Path) -> dict[str, Any] | None:
    return read_json_object(path) if path.is_file() else None


def _column(part: Mapping[str, Any]) -> Column:
    band = part["band"]
    return Column(part["quantity"], part["window"], None if band is None else (band[0], band[1]))


def estimate(results: Results, side: Side) -> Estimate | None:
    """Returns the mean of a method's values in a column, with its interval; None if there are none."""
    by_seed = results.values.get((side.method, side.data))
    if by_seed is None:
        return None
    quantity = QUANTITIES[side.column.quantity]
    return crossed(np.stack([columns[side.column] for columns in by_seed.values()]), quantity.bounds)


def improvement(results: Results, better: Side, worse: Side) -> Estimate | None:
    """Returns by how much one side is better than another, paired by document and by seed; None without values.

    Values of an untrained model, which has no seed, are compared with every seed of the other side.
    """
    first, second = (results.values.get((side.method, side.data)) for side in (better, worse))
    if first is None or second is None:
        return None
    seeds = [seed for seed in first if seed in second or None in second]
    seeds = [seed for seed in second if seed is not None] if None in first and None not in second else seeds
    if not seeds:
        return None
    quantity = QUANTITIES[better.column.quantity]
    differences = np.stack(
        [
            first.get(seed, first.get(None, {}))[better.column] - second.get(seed, second.get(None, {}))[worse.column]
            for seed in seeds
        ]
    )
    reach = None if quantity.bounds is None else quantity.bounds[1] - quantity.bounds[0]
    return crossed(
        differences if quantity.higher_is_better else -differences, None if reach is None else (-reach, reach)
    )


def _told(found: Estimate | None, column: Column, *, sign: bool = False) -> str:
    """Formats an estimate; shares as percentages."""
    if found is None:
        return ""
    scale, digits = (100, 1) if QUANTITIES[column.quantity].bounds else (1, 3)
    mean = f"{scale * found.mean:{'+' if sign else ''}.{digits}f}"
    return mean if math.isnan(found.half_width) else f"{mean} ± {scale * found.half_width:.{digits}f}"


def _unit(quantity: str) -> str:
    return "percent answered" if QUANTITIES[quantity].bounds else QUANTITIES[quantity].unit


def _table(
    results: Results,
    title: str,
    names: Sequence[str],
    figures: Sequence[str],
    rows: Sequence[tuple[list[str], Sequence[Side]]],
) -> Table:
    """Lays out one estimate for each row and column, without rows that have none; the best of each column is bold."""
    study = results.study
    found = [(row, [(estimate(results, side), side) for side in parts]) for row, parts in rows]
    found = [(row, cells) for row, cells in found if any(cell is not None for cell, _ in cells)]
    best = []
    for cells in zip(*(cells for _, cells in found), strict=True):
        means = [cell.mean for cell, _ in cells if cell is not None]
        higher = QUANTITIES[cells[0][1].column.quantity].higher_is_better
        best.append((max if higher else min)(means, default=math.nan))

    def text(cell: Estimate | None, side: Side, best: float) -> str:
        mean, space, rest = _told(cell, side.column).partition(" ")
        if cell is not None and cell.mean == best != 0:
            mean = f"[bold]{mean}[/bold]"
        if cell is not None and study.data[side.data] and cell.seeds < len(study.seeds):
            rest += f" ({cell.seeds} of {len(study.seeds)} seeds)"
        return mean + space + rest

    lines = [
        (row, [text(cell, side, top) for (cell, side), top in zip(cells, best, strict=True)]) for row, cells in found
    ]
    return Table(title, names, figures, lines)


def _head(column: Column) -> str:
    name = column.quantity.replace("_", " ")
    return name if column.band is None else f"{name} {column.band[0]:,}–{column.band[1]:,}"


def main_window(study: Study) -> int:
    """Returns the trained window, or the largest measured one below it."""
    windows = study.evaluate.windows
    return max([window for window in windows if window <= study.trained_window], default=windows[0])


def _sizes(results: Results, quantity: str | None = None) -> str:
    """Describes what intervals are over."""
    seeds = len({record["seed"] for record in results.records if record["seed"] is not None})
    names = {quantity} if quantity else {column.quantity for column in results.study.columns}
    counts = {len(units) for name, units in results.units.items() if name in names}
    units = f"{min(counts)} documents or prompts" if len(counts) == 1 else "documents or prompts"
    return f"mean ± 95 % interval over {units} and {seeds or 1} seed{'s' if seeds > 1 else ''}"


def tables(results: Results) -> dict[str, list[Table]]:
    """Lays out the results in the form of the paper's tables, by kind."""
    study = results.study
    main, quantities = study.main_data, list(dict.fromkeys(column.quantity for column in study.columns))
    found: dict[str, list[Table]] = {
        "methods": [],
        "data efficiency": [],
        "robustness": [],
        "curricula": [],
        "tests": [],
    }
    if not results.records:
        return found
    window = main_window(study)
    columns = [column for column in study.columns if column.window == window]
    shown_as = {method: _shown_as(study, method) for method in study.methods}
    rows = [([name], [Side(method, data, c) for c in columns]) for method, (data, name) in shown_as.items()]
    title = f"methods, data {main}, window {window:,}: {_sizes(results)}"
    found["methods"].append(_table(results, title, ["method"], [_head(column) for column in columns], rows))
    for name in quantities:
        windows = _windows(study, name)
        # Data efficiency in the trained window, and in the longest one.
        for at in dict.fromkeys(w for w in (window, windows[-1]) if w in windows and len(study.amounts) > 1):
            column = study.column_of(name, at)
            rows = [([method], [Side(method, label, column) for label in study.amounts]) for method in study.methods]
            title = f"data efficiency, {_head(column)}, window {at:,}, {_unit(name)}: {_sizes(results, name)}"
            found["data efficiency"].append(_table(results, title, ["method"], study.amounts, rows))
        if len(windows) > 1:
            ends = [study.column_of(name, w) for w in windows]
            rows = [([row], [Side(method, data, c) for c in ends]) for method, (data, row) in shown_as.items()]
            heads = [f"{c.window:,}" if c.band is None else f"{c.window:,} ({c.band[0]:,}–{c.band[1]:,})" for c in ends]
            title = f"robustness, {name.replace('_', ' ')} at the end of each window, data {main}, {_unit(name)}"
            title = f"{title}: {_sizes(results, name)}"
            found["robustness"].append(_table(results, title, ["method"], heads, rows))
        if len(study.methods) > 1:
            found["tests"].append(_tests(results, name, windows))
    staged = [label for label, stages in study.data.items() if len(stages) > 1]
    if staged:
        shown = [study.column_of(n, w) for n in quantities if not n.endswith("_loss") for w in _windows(study, n)]
        trained = dict.fromkeys(method for label in staged for method in study.only.get(label, study.methods))
        rows = [
            ([method, label], [Side(method, label, column) for column in shown])
            for method in trained
            for label in study.data
        ]
        heads = [f"{_head(column)}, window {column.window:,}" for column in shown]
        title = f"curricula: {_sizes(results)}"
        found["curricula"].append(_table(results, title, ["method", "data"], heads, rows))
    return found


def _shown_as(study: Study, method: str) -> tuple[str, str]:
    """Returns the data that a method is shown with, the main one if it has that, and the name of its row."""
    has = [label for label in study.amounts if method in study.only.get(label, study.methods)]
    data = study.main_data if study.main_data in has or not has else has[-1]
    return data, method if data == study.main_data else f"{method} (data {data})"


def _windows(study: Study, quantity: str) -> list[int]:
    return [w for w in study.evaluate.windows if any(column[:2] == (quantity, w) for column in study.columns)]


def _tests(results: Results, quantity: str, windows: Sequence[int]) -> Table:
    """Lays out how much better the reference is than each other method, with p-values corrected over the table."""
    study = results.study
    reference = study.reference_method
    data, shown = _shown_as(study, reference)
    columns = [study.column_of(quantity, window) for window in windows]
    found = {}
    for method in study.methods:
        other, name = _shown_as(study, method)
        if method != reference:
            pairs = [(Side(reference, data, column), Side(method, other, column)) for column in columns]
            found[name] = [improvement(results, *pair) for pair in pairs]
    flat = [cell for cells in found.values() for cell in cells]
    adjusted = iter(holm([math.nan if cell is None else cell.p for cell in flat]))
    rows = []
    for method, cells in found.items():
        texts = []
        for cell, column in zip(cells, columns, strict=True):
            p = next(adjusted)
            text = _told(cell, column, sign=True) + ("" if math.isnan(p) else f", p {_probability(p)}")
            texts.append(f"[bold]{text}[/bold]" if p < _LEVEL else text)
        if any(texts):
            rows.append(([method], texts))
    title = (
        f"{shown} against each, {quantity.replace('_', ' ')} at the end of each window, data {study.main_data}, "
        f"{_unit(quantity)}: by how much {shown} is better, paired by document and seed; p-values are Holm's for "
        f"{sum(cell is not None for cell in flat)} tests"
    )
    return Table(title, ["against"], [f"{window:,}" for window in windows], rows)


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def paper_tables() -> list[Table]:
    """Returns the paper's own figures, which are never mixed with a study's."""
    title = "paper, LLaMA-2-7B-Chat, LongBench macro average"
    found = []
    for about, rows in (
        ("3,500 samples at 16k, by window at evaluation", longbench.PAPER),
        ("by number of samples, window 16,384", longbench.PAPER_BY_SAMPLES),
    ):
        heads = list(dict.fromkeys(key for row in rows.values() for key in row))
        lines = [([method], [str(row.get(key, "")) for key in heads]) for method, row in rows.items()]
        found.append(Table(f"{title}, {about}", ["method"], [f"{key:,}" for key in heads], lines))
    curricula = longbench.PAPER_CURRICULA
    heads_text = list(next(iter(curricula.values())))
    lines = [([label], [str(row[key]) for key in heads_text]) for label, row in curricula.items()]
    about = "paper, LLaMA-2-7B-Chat with EABF, curricula: GovReport and LongChat's line retrieval"
    return [*found, Table(about, ["training"], heads_text, lines)]


class Verdict(NamedTuple):
    """What the results say about a claim."""

    claim: Claim
    verdict: str  # holds, does not hold, undecided or not finished
    found: Estimate | None  # by how much the better side is better
    p: float  # of its difference from the margin, corrected for the number of claims
    decide: str  # what would decide an undecided claim


def verdicts(results: Results) -> list[Verdict]:
    """Judges every claim of the study.

    A claim holds if the improvement exceeds the margin with a p-value below 0.05 after Holm's correction over all
    claims; it does not hold if the improvement is below the margin in the same sense. There is no verdict before the
    cells of both sides are finished, but such claims count in the correction.
    """
    claims = results.study.claims
    found = [improvement(results, *sides(results.study, claim)) for claim in claims]
    beyond = [
        None if part is None else part._replace(mean=part.mean - claim.margin)
        for part, claim in zip(found, claims, strict=True)
    ]
    adjusted = holm([1.0 if part is None or math.isnan(part.p) else part.p for part in beyond])
    judged = []
    for claim, part, rest, p in zip(claims, found, beyond, adjusted, strict=True):
        missing = [side for side in sides(results.study, claim) if not _is_finished(results, side)]
        if part is None or rest is None or missing:
            told = " and ".join(dict.fromkeys(f"{side.method}, {side.data}" for side in missing))
            judged.append(Verdict(claim, "not finished", part, math.nan, f"all cells of {told}"))
        elif p < _LEVEL:
            judged.append(Verdict(claim, "holds" if rest.mean > 0 else "does not hold", part, p, ""))
        else:
            judged.append(Verdict(claim, "undecided", part, p, _deciding(rest, _LEVEL / len(claims))))
    return judged


def _is_finished(results: Results, side: Side) -> bool:
    study = results.study
    needed = study.seeds if study.data[side.data] else [None]
    return set(needed) <= set(results.values.get((side.method, side.data), {}))


def _deciding(rest: Estimate, level: float) -> str:
    if math.isnan(rest.half_width):
        return "more than one document"
    documents, seeds = needed(rest, level)
    told = [f"about {documents:,} documents ({rest.seeds} seed{'s' if rest.seeds > 1 else ''})"] if documents else []
    told += [f"about {seeds} seeds ({rest.units} documents)"] if seeds else []
    return " or ".join(told) or "more documents and more seeds; the difference is small beside its uncertainty"


def claims_table(judged: Sequence[Verdict]) -> Table:
    """Lays out the verdicts."""
    rows = []
    for verdict in judged:
        column = Column(verdict.claim.measure, 0)
        p = "" if math.isnan(verdict.p) else _probability(verdict.p)
        margin = f"{verdict.claim.margin * (100 if QUANTITIES[column.quantity].bounds else 1):g}"
        cells = [f"[bold]{verdict.verdict}[/bold]", _told(verdict.found, column, sign=True), margin, p, verdict.decide]
        rows.append(([verdict.claim.text], cells))
    title = "claims: by how much the better side is better (95 % interval), paired by document and seed"
    return Table(title, ["claim"], ["verdict", "better by", "needed", "p (Holm)", "what would decide"], rows)


def tuning_table(results: Results) -> Table | None:
    """Lays out what each method's tuning chose; None for a study without tuning."""
    study = results.study
    if study.tune is None:
        return None
    keys = list(study.tune.values)
    rows = []
    for method, records in results.tuning.items():
        tried = grid(study, method)
        if len(records) < len(tried):
            rows.append(([method], [*("" for _ in keys), f"{len(records)} of {len(tried)} runs are finished"]))
            continue
        losses = [tuning_loss(record) for record in records]
        best = records[int(np.argmin(losses))]["tuned"]
        cells = []
        for key in keys:
            values = sorted({dict(values)[key] for values in tried if key in dict(values)})
            at_edge = len(values) > 1 and best.get(key) in (values[0], values[-1])
            cells.append(
                "" if key not in best else f"{best[key]:g}" + (" (at the edge of those tried)" if at_edge else "")
            )
        diverged = sum(math.isinf(loss) for loss in losses)
        note = f"{min(losses):.4f}" + (f" ({diverged} of {len(losses)} runs diverged)" if diverged else "")
        rows.append(([method], [*cells, note]))
    documents = study.tune.documents
    title = (
        f"settings chosen by the lowest loss on split {documents.split} of {documents.directory}, whose documents are "
        f"not among those measured; data {study.tune.data}, seed {study.tune.seed}"
    )
    return Table(title, ["method"], [*keys, "loss, nats per token"], rows)


def draw(results: Results) -> list[tuple[str, str]]:
    """Draws the pictures into the study's directory; returns the name and the title of each."""
    study = results.study
    main, window = study.main_data, main_window(study)
    drawn = []
    for name in dict.fromkeys(column.quantity for column in study.columns):
        windows = _windows(study, name)
        plans = [("by_window", {f"{w:,}": (main, study.column_of(name, w)) for w in windows}, f"data {main}")]
        if window in windows:
            column = study.column_of(name, window)
            plans.append(("by_data", {label: (label, column) for label in study.amounts}, f"window {window:,}"))
        for kind, points, about in plans:
            rows = {}
            for method in study.methods:
                found = {at: estimate(results, Side(method, *where)) for at, where in points.items()}
                shown = {at: (part.mean, part.half_width) for at, part in found.items() if part is not None}
                if shown:
                    rows[method] = shown
            if len(points) > 1 and rows:
                title = f"{name.replace('_', ' ')} {kind.replace('_', ' ')}, {about}, 95 % intervals"
                file = f"{name}_{kind}.png"
                label = "window (tokens)" if kind == "by_window" else "data"
                means_by(rows, list(points), study.directory / file, label=label, unit=_unit(name), title=title)
                drawn.append((file, title))
    return drawn


def as_json(results: Results) -> dict[str, Any]:
    """Returns tables, verdicts and the origin of the cells as JSON values."""
    own = (
        {name: [_plain(table) for table in found] for name, found in tables(results).items()} if results.records else {}
    )
    chosen = tuning_table(results)
    return {
        "study": Path(results.study.output).name,
        "cells": results.cells,
        "finished": len(results.records),
        "failed": dict(results.failed),
        "measured_on": _origins(results),
        "tables": own,
        "tuning": None if chosen is None else _plain(chosen),
        "claims": [
            {
                "text": verdict.claim.text,
                "verdict": verdict.verdict,
                "better_by": None
                if verdict.found is None
                else finite({**verdict.found._asdict(), "half_width": verdict.found.half_width}),
                "p": None if math.isnan(verdict.p) else verdict.p,
                "what_would_decide": verdict.decide,
            }
            for verdict in verdicts(results)
        ],
        "paper": [_plain(table) for table in paper_tables()],
    }


def _plain(table: Table) -> dict[str, Any]:
    return table.grid().plain()


def _origins(results: Results) -> list[dict[str, Any]]:
    """Returns the devices, versions, commits and dates that the cells come from, each combination once."""
    found: dict[str, dict[str, Any]] = {}
    for record in results.records:
        about = {key: record.get(key) for key in ("device", "devices", "commit", "versions")}
        entry = found.setdefault(str(about), {**about, "cells": 0, "first": record["date"], "last": record["date"]})
        entry["cells"] += 1
        entry["first"], entry["last"] = min(entry["first"], record["date"]), max(entry["last"], record["date"])
    return list(found.values())


def write_report(results: Results) -> Path:
    """Writes the page and its pictures into the study's directory; returns the page's path."""
    path = results.study.directory / REPORT
    text = "\n".join(_page(results, draw(results)))
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def _page(results: Results, pictures: Sequence[tuple[str, str]]) -> Iterator[str]:
    study = results.study
    yield f"# Study {Path(study.output).name}\n"
    failed = f", {len(results.failed)} failed" if results.failed else ""
    finished = f"{len(results.records)} of {results.cells} cells are finished{failed}."
    yield f"{finished} `eabf study FILE --report-only` makes this page again."
    for origin in _origins(results):
        versions = ", ".join(f"{name} {version}" for name, version in (origin["versions"] or {}).items())
        yield (
            f"{origin['cells']} cells: {origin['devices']} x {origin['device']}, commit {origin['commit']}, "
            f"{origin['first']} to {origin['last']}, {versions}."
        )
    yield ""
    if study.claims:
        yield "## Claims\n"
        yield claims_table(verdicts(results)).markdown()
        yield (
            "A claim holds if the improvement exceeds what is needed with p < 0.05, and does not hold if it falls "
            "short of it with p < 0.05; p is corrected for the number of claims.\n"
        )
    for kind, listed in tables(results).items():
        if listed:
            yield f"## {kind.capitalize()}\n"
        for table in listed:
            yield table.markdown()
    if pictures:
        yield "## Pictures\n"
        for file, title in pictures:
            yield f"![{title}]({file})\n"
    yield "## The paper's figures\n"
    yield "They are of another model and other tasks, and are not comparable with the tables above.\n"
    for table in paper_tables():
        yield table.markdown()
    yield "## Settings\n"
    documents = study.evaluate.documents
    yield (
        f"Every cell starts from `{study.config}`, with {_listed(study.settings) or 'no change'}. Seeds: "
        f"{', '.join(map(str, study.seeds))}. Measured on split {documents.split} of {documents.directory}.\n"
    )
    rows = [([method], [_listed(keys)]) for method, keys in study.methods.items()]
    yield Table("methods", ["method"], ["keys"], rows).markdown()
    stages = [
        ([label], ["; then ".join(_listed(stage) for stage in parts) or "none"]) for label, parts in study.data.items()
    ]
    yield Table("data", ["data"], ["training"], stages).markdown()
    chosen = tuning_table(results)
    if chosen is not None:
        yield chosen.markdown()
    if results.failed:
        yield "## Failed cells\n"
        yield from (f"- {label}: {reason}" for label, reason in results.failed.items())
        yield ""


def _listed(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}: {_value(value)}`" for key, value in keys.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(part)}" for key, part in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)
