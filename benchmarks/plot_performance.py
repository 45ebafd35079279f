"""Draws docs/performance/*.png, and writes the tables of docs/performance.md and the speed tables of README.md.

    python benchmarks/plot_performance.py

Every figure comes from a file in benchmarks/results that a benchmark wrote. The page names that file, and marks figures
whose code has changed since.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pages import write_part
from provenance import changed

from eabf_jax.analysis.figures import length_axis, line_style, save
from eabf_jax.cli import run
from eabf_jax.errors import InputError

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- begin: {}, written by benchmarks/plot_performance.py -->"

STACKS = {"ours": "eabf-jax", "peer": "strongest peer", "masters": "peer, float32 state"}
# By stack of the peer: an entry's keys for the setting and the ratio, and the last word of its settings' names.
PEERS = {
    "peer": ("strongest_peer", "ratio_to_strongest_peer", "bfloat16"),
    "masters": ("strongest_float32_peer", "ratio_to_strongest_float32_peer", "autocast"),
}
Group = tuple[str, str, int]  # configuration, device, number of devices


def all_results(directory: Path) -> list[dict[str, Any]]:
    """Reads the reports in a directory, and adds `file` to each."""
    paths = sorted(directory.glob("*.json"))
    return [{**json.loads(path.read_text(encoding="utf-8")), "file": path.name} for path in paths]


def read_results(directory: Path) -> list[dict[str, Any]]:
    """Reads the reports of train_step.py.

    Args:
      directory: directory of the results; files of other benchmarks are skipped.

    Returns:
      The reports, oldest first. The peers of each measurement on one device are those of all runs (`with_every_peer`).
    Raises:
      InputError: there are none.
    """
    found = [
        report for report in all_results(directory) if report.get("benchmark") in ("train_step", "torchtitan_step")
    ]
    reports = [report for report in found if report["benchmark"] == "train_step"]
    if not reports:
        raise InputError(f"{directory} holds no result of train_step.py; run that first")
    return [with_every_peer(report, found) for report in sorted(reports, key=lambda report: report["date"])]


def entries_of(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a report's measurements, one per length, with its `file`."""
    return [{**entry, "file": report["file"]} for entry in report.get("lengths", [report])]


def with_every_peer(report: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds to a report the peers that other runs measured on the same kind of device at the same length.

    Args:
      report: of train_step.py.
      found: all reports, those of torchtitan_step.py included.

    Returns:
      The report. In each measurement that was compared with a peer, `peers` also has the other runs' strongest settings
      and torchtitan's modes, with their report as `report`; the strongest peers and the ratios take them into account.
    """
    alone = [other for other in found if report.get("devices", 1) == 1 == other.get("devices", 1)]

    def added(entry: Mapping[str, Any]) -> dict[str, Any]:
        if not entry.get("peers") or "strongest_peer" not in entry:
            return dict(entry)
        others = {
            setting: {**figures, "report": other}
            for other in alone
            if other.get("name") == report["name"]
            for setting, figures in rivals(other, report.get("device"), entry["length"]).items()
        }
        changes: dict[str, Any] = {"peers": {**others, **entry["peers"]}}
        for key, ratio, precision in PEERS.values():
            names = [entry[key], *(name for name in others if name not in entry["peers"])]
            best = max(
                (name for name in names if name and name.endswith(precision)),
                key=lambda name: _rate(changes["peers"][name]),
                default=None,
            )
            if best and _rate(changes["peers"][best]):
                changes[key] = best
                changes[ratio] = _rate(entry) / _rate(changes["peers"][best]) or None
        return {**entry, **changes}

    if "lengths" in report:
        return {**report, "lengths": [added(entry) for entry in report["lengths"]]}
    return added(report)


def rivals(report: Mapping[str, Any], device: str | None, length: int) -> dict[str, Mapping[str, Any]]:
    """Returns a report's peers on a device at a length, by setting: the strongest ones, or all modes of torchtitan.

    Torchtitan's modes that failed do not name their device.
    """
    if report.get("benchmark") == "torchtitan_step":
        same = report["length"] == length and device in {x.get("device") for x in report["modes"].values()}
        modes = report["modes"] if same else {}
        return {
            f"torchtitan/{mode}/bfloat16": {**figures, "microbatches": report["microbatches"]}
            for mode, figures in modes.items()
        }
    entries = entries_of(report) if report.get("device") == device else []
    return {
        entry[key]: entry["peers"][entry[key]]
        for entry in entries
        if entry.get("length") == length
        for key, *_ in PEERS.values()
        if entry.get(key) in entry.get("peers", ())
    }


def grouped(reports: Sequence[Mapping[str, Any]]) -> dict[Group, list[Mapping[str, Any]]]:
    """Groups reports by configuration, device and number of devices, each group oldest first."""
    groups: dict[Group, list[Mapping[str, Any]]] = {}
    for report in reports:
        group = (report["name"], report.get("device", "unknown device"), report.get("devices", 1))
        groups.setdefault(group, []).append(report)
    return dict(sorted(groups.items()))


def stacks_of(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the figures of each stack at one length: ours, the strongest peer setting, and that with float32 state.

    If no setting ran, `peer` is a setting that failed. Older results, without the peer's switches, have no peer.
    """
    found: dict[str, Mapping[str, Any]] = {"ours": entry}
    peers = entry["peers"] if "strongest_peer" in entry else {}
    for stack, (key, _, precision) in PEERS.items():
        tried = {name: peer for name, peer in peers.items() if name.endswith(precision)}
        if tried:
            name = entry[key] or next(iter(tried))
            found[stack] = {"setting": name, **tried[name]}
    return found


def curves(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Finds the points that the lines of a picture go through.

    Args:
      reports: the group's, oldest first.

    Returns:
      By stack and length, the figures of the fastest report; of the newest report if the stack never ran.
    """
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for entry in (entry for report in reports for entry in entries_of(report)):
        for stack, figures in stacks_of(entry).items():
            points = found.setdefault(stack, {})
            if _rate(figures) >= _rate(points.get(entry["length"], {})):
                points[entry["length"]] = figures
    return found


def _rate(figures: Mapping[str, Any]) -> float:
    return float(figures.get("tokens_per_second") or 0)


def draw(group: Group, reports: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws tokens per second and memory against length: a point per measurement, a cross where memory ran out.

    For each stack, a line goes through the points of `curves`, so the picture has everything that the tables list.

    Args:
      group: for the title.
      reports: the group's, oldest first.
      path: the picture.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = (("tokens_per_second", "tokens per second"), ("peak_gib", "peak device memory (GiB)"))
    found = curves(reports)
    entries = [entry for report in reports for entry in entries_of(report)]
    # Ours comes last, which emphasises it.
    stacks = sorted(found, key=lambda stack: stack == "ours")
    for number, (key, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        for index, stack in enumerate(stacks):
            points = found[stack]
            style = line_style(index, len(stacks) if "ours" in found else len(stacks) + 1)
            ran = sorted(length for length, figures in points.items() if figures.get(key) is not None)
            # Each stack has one label for both panels.
            name = STACKS.get(stack, stack) if number == 1 else None
            axes.plot(ran, [points[length][key] for length in ran], label=name, **style)
            measured = [(entry["length"], stacks_of(entry).get(stack, {}).get(key)) for entry in entries]
            each = [(length, value) for length, value in measured if value is not None]
            unjoined = {**style, "linestyle": "", "markerfacecolor": "none"}
            axes.plot([length for length, _ in each], [value for _, value in each], **unjoined)
            full = sorted(length for length, figures in points.items() if figures.get("out_of_memory"))
            # Just above the axis, with each stack's crosses at a different height.
            at = {"transform": axes.get_xaxis_transform(), "color": style["color"]}
            axes.plot(full, [0.03 * (1 + index)] * len(full), "x", **at)
        length_axis(axes, sorted({length for points in found.values() for length in points}))
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="tokens per row (×: out of memory)", ylabel=label)
        axes.grid(alpha=0.3)
    name, device, devices = group
    figure.suptitle(f"{name}, full fine-tuning step, {devices} × {device}", fontsize=11)
    figure.legend(loc="outside right upper", fontsize=8, handlelength=4)
    save(figure, path)


def picture_name(group: Group) -> str:
    """Returns the file name of a group's picture."""
    name, device, devices = group
    return re.sub(r"[^a-z0-9]+", "_", f"{name} {devices}x {device}".lower()).strip("_") + ".png"


def number(value: float | None, form: str) -> str:
    """Formats a number for a table; None is a dash."""
    return "–" if value is None else format(value, form)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return [*lines, ""]


def speed_table(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the table of a group's measurements: each stack at each length, shortest first."""
    rows = []
    measured = [(report, entry) for report in reports for entry in entries_of(report)]
    for report, entry in sorted(measured, key=lambda pair: pair[1]["length"]):
        for stack, figures in stacks_of(entry).items():
            row = [f"{entry['length']:,}", STACKS[stack]]
            if "tokens_per_second" in figures:
                row += [
                    spread(figures),
                    number(figures["mfu"], ".1%"),
                    peak(figures),
                    number(figures.get("planned_gib"), ".1f"),
                    str(figures["microbatches"]),
                ]
            else:
                row += ["out of memory" if figures.get("out_of_memory") else "failed", *["–"] * 4]
            row += [settings_of(figures)]
            ratio = entry.get(PEERS[stack][1]) if stack in PEERS else None
            row += [f"{ratio:.2f} ×" if ratio else "–"]
            rows.append([*row, source(figures.get("report", report))])
    header = ("length", "stack", "tokens/s (slowest–fastest step)", "MFU", "peak GiB", "planned GiB", "microbatches")
    return table([*header, "settings", "ours / peer", "source"], rows)


def spread(figures: Mapping[str, Any]) -> str:
    """Formats the tokens per second of the median step, and of the slowest and fastest step."""
    rate, seconds = figures["tokens_per_second"], sorted(figures["seconds"])
    tokens = rate * statistics.median(seconds)
    steps = "1 step" if len(seconds) == 1 else f"{len(seconds)} steps"
    return f"{rate:,.0f} ({tokens / seconds[-1]:,.0f}–{tokens / seconds[0]:,.0f}, {steps})"


def peak(figures: Mapping[str, Any]) -> str:
    """Formats the peak memory; says if it equals the allocator's limit, because then it may not be what was needed."""
    told = number(figures["peak_gib"], ".1f")
    return f"{told}, the limit" if figures["peak_gib"] == figures.get("limit_gib") and told != "–" else told


def source(report: Mapping[str, Any]) -> str:
    """Links to a result file with its date and commit, and says whether the measured code has changed."""
    link = f"[{report['file']}](../benchmarks/results/{report['file']})"
    told = " ".join(filter(None, (report.get("date", "")[:10], report.get("commit"))))
    files = changed(report)
    if files is None:
        return f"{link} **stale**: no record of the code measured"
    return f"{link} {told}" + (f" **stale**: {', '.join(map(short, files))} changed since" if files else "")


def short(file: str) -> str:
    """Returns a file's name without its folders."""
    return Path(file).name


def settings_table(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the table of all peer settings tried in a group; empty if there are none."""
    # A setting that several runs count among their peers has one row.
    rows = dict.fromkeys(
        (
            f"{entry['length']:,}",
            name,
            spread(peer) if "tokens_per_second" in peer else "out of memory" if peer.get("out_of_memory") else "failed",
            number(peer.get("peak_gib"), ".1f"),
            str(peer["microbatches"]),
            peer.get("report", report)["file"],
        )
        for report in reports
        for entry in entries_of(report)
        if "strongest_peer" in entry
        for name, peer in sorted(entry["peers"].items(), key=lambda item: -_rate(item[1]))
    )
    header = ("length", "peer setting", "tokens/s (slowest–fastest step)", "peak GiB", "microbatches", "source")
    return table(header, rows) if rows else []


def settings_of(figures: Mapping[str, Any]) -> str:
    """Describes a stack's settings: ours by kept values and place of the optimizer state, a peer's by name."""
    if "compute" in figures:
        return f"keeps {figures['compute']['remat']}, state on {figures['compute']['optimizer_memory']}"
    return str(figures.get("setting", "–"))


def single_figures(
    groups: Mapping[Group, Sequence[Mapping[str, Any]]],
    key: str,
    header: Sequence[str],
    cells: Callable[[Mapping[str, Any]], Sequence[str]],
) -> list[str]:
    """Returns a table, over all groups, of the entries that have an additional kind of figure.

    Args:
      groups: from `grouped`.
      key: the figure's key in an entry.
      header: names of its columns.
      cells: computes its columns from the figure.

    Returns:
      The lines; empty if no entry has the figure.
    """
    rows = [
        [name, f"{devices} × {device}", f"{entry['length']:,}", *cells(entry[key]), source(report)]
        for (name, device, devices), reports in groups.items()
        for report in reports
        for entry in entries_of(report)
        if key in entry
    ]
    return table(["configuration", "device", "length", *header, "source"], rows) if rows else []


def scaling_table(groups: Mapping[Group, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Returns the table of scaling: the rate of N devices over N times the best rate of one, at the same length.

    A result without a record of the code that it measured is left out.
    """
    rows = []
    for (name, device, devices), reports in groups.items():
        alone, together = (fastest(recorded(some)) for some in (groups.get((name, device, 1), []), reports))
        for length in sorted(alone.keys() & together.keys()) if devices > 1 else ():
            share = together[length] / (devices * alone[length])
            cells = (f"{length:,}", f"{together[length]:,.0f}", f"{alone[length]:,.0f}", f"{share:.1%}")
            rows.append([name, f"{devices} × {device}", *cells])
    header = ("configuration", "devices", "length", "tokens/s", "tokens/s of one device", "scaling efficiency")
    return ["### Several devices", "", *table(header, rows)] if rows else []


def recorded(reports: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the reports that record the code they measured."""
    return [report for report in reports if changed(report) is not None]


def fastest(reports: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Returns our highest tokens per second by length."""
    found: dict[int, float] = {}
    for entry in (entry for report in reports for entry in entries_of(report)):
        if "tokens_per_second" in entry:
            found[entry["length"]] = max(entry["tokens_per_second"], found.get(entry["length"], 0.0))
    return found


def whole_run_table(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the table of all measurements of whole_run.py, in seconds; skips other reports."""
    parts = {
        "total": "total_seconds",
        "before the first step": "before_first_step_seconds",
        "of which compiling": "compile_seconds",
        "steps": "steps_seconds",
        "final save": "after_last_step_seconds",
        "export": "export_seconds",
    }
    rows = [
        [
            f"{report['name']}, {report['card'].split(',')[0]}",
            *(f"{report[key]:.0f}" for key in parts.values()),
            f"{report['host_gib']:.1f} ({report['planned_host_gib']:.1f})",
            source(report),
        ]
        for report in reports
        if report.get("benchmark") == "whole_run"
    ]
    header = ("configuration, device", *parts, "host GiB (planned)", "source")
    return ["### From `python train.py` to the exported model (seconds)", "", *table(header, rows)] if rows else []


def numerics_table(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the table of all results of gpu_numerics.py, by computation; skips other reports."""
    rows = []
    for report in (report for report in reports if report.get("benchmark") == "gpu_numerics"):
        for path in dict.fromkeys(x["path"].partition(", token")[0] for x in report["comparisons"]):
            found = [x for x in report["comparisons"] if x["path"].partition(", token")[0] == path]
            worst = max(x["error"] / x["limit"] for x in found)
            beyond = sum(not x["within"] for x in found)
            rows.append([path, report["device"], str(len(found)), f"{worst:.0%}", str(beyond), source(report)])
    header = ("computation", "device", "comparisons", "largest error, % of its limit", "over the limit", "source")
    return ["### Numerics", "", *table(header, rows)] if rows else []


def page(groups: Mapping[Group, Sequence[Mapping[str, Any]]], more: Sequence[str] = ()) -> str:
    """Returns the part of docs/performance.md that is written from results.

    Args:
      groups: from `grouped`.
      more: tables of the other benchmarks.

    Returns:
      Markdown.
    """
    lines = []
    for group, reports in groups.items():
        name, device, devices = group
        lines += [f"### {name}, {devices} × {device}", "", *speed_table(reports)]
        lines += settings_table(reports)
        lines += [f"![{name} on {devices} × {device}](performance/{picture_name(group)})", ""]
    lines += scaling_table(groups)
    runs = single_figures(
        groups,
        "recipe",
        ("steps", "seconds", "without compilation"),
        lambda run: [
            str(run["steps"]),
            f"{run['total_seconds']:.0f}",
            f"{run['total_seconds_without_compile']:.0f}",
        ],
    )
    lines += ["### The paper's whole run", "", *runs] if runs else []
    cost = single_figures(
        groups,
        "multiplier_cost",
        ("pairs of steps", "cost"),
        lambda cost: [str(len(cost["seconds_with"])), f"{cost['ratio']:+.2%}"],
    )
    lines += ["### What the logit multiplier costs", "", *cost] if cost else []
    lines += more
    return "\n".join(lines).rstrip() + "\n"


def generation_reports(reports: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the reports of generate.py, oldest first; the peers of each are those of all runs of the same kind."""
    found = [report for report in reports if {"shape", "cache", "runs"} <= report.keys()]

    def added(report: Mapping[str, Any]) -> dict[str, Any]:
        peers, strongest, ratios = {}, dict(report["strongest_peer"]), dict(report["ratio_to_strongest_peer"])
        for name, own in report["peer"].items():
            peers[name] = dict(own)
            for other in found:
                if _kind(other) == _kind(report) and "strongest_peer" in other:
                    for setting, figures in other["peer"][name].items():
                        if _tokens(figures) > _tokens(peers[name].get(setting, {})):
                            peers[name][setting] = figures
            best = max(peers[name], key=lambda setting: _tokens(peers[name][setting]))
            if name in ratios:
                strongest[name] = best
                ratios[name] = report["runs"][name]["tokens_per_second"] / _tokens(peers[name][best])
        return {**report, "peer": peers, "strongest_peer": strongest, "ratio_to_strongest_peer": ratios}

    ordered = sorted(found, key=lambda report: report.get("date", ""))
    return [added(report) if "strongest_peer" in report else dict(report) for report in ordered]


def _kind(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns what the runs of generate.py that can be compared have in common."""
    return report["shape"], report["device"], report["cache"]


def _tokens(figures: Mapping[str, Any]) -> float:
    return figures.get("tokens_per_second", 0.0)


def generation_table(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the table of all measurements of generate.py.

    Args:
      reports: from `all_results`; those of other benchmarks are skipped.

    Returns:
      The lines; empty without a result.
    """
    rows = []
    for report in generation_reports(reports):
        for name, ours in report["runs"].items():
            # In a file without `strongest_peer`, the peer was slower than necessary, or missing.
            setting = report.get("strongest_peer", {}).get(name)
            theirs = report["peer"][name][setting] if setting else {}
            ratio = report.get("ratio_to_strongest_peer", {}).get(name)
            rows.append(
                [
                    f"{report['shape']}, {report['device']}",
                    "bfloat16" if report["cache"] == "model" else report["cache"],
                    f"{ours['batch']} × {ours['prompt']:,}",
                    number(ours.get("first_token_seconds"), ".3f"),
                    number(report.get("prefill_mfu") if name == "long" else None, ".1%"),
                    decode_rate(ours),
                    number(ours.get("bandwidth_share"), ".1%"),
                    f"{decode_rate(theirs)}: {setting}{left_out(report, name)}" if setting else "–",
                    number(theirs.get("bandwidth_share"), ".1%"),
                    f"{ratio:.2f} ×" if ratio else "–",
                    source(report) + ("" if "spread" in ours or "error" in ours else "; best run only"),
                ]
            )
    header = (
        "shape, device",
        "cache",
        "rows × prompt",
        "first token (s)",
        "prefill MFU",
        "tokens/s (slowest–fastest run)",
    )
    peer = ("fastest setting of transformers' `generate`, tokens/s", "its share", "ours / peer")
    found = table([*header, "share of the memory bandwidth", *peer, "source"], rows)
    return ["### Generation", "", *found] if rows else []


def left_out(report: Mapping[str, Any], name: str) -> str:
    """Says how many settings of `generate` a run tried, if it did not try all of them."""
    settings = report["peer"][name].values()
    tried = sum("left_out" not in figures for figures in settings)
    return "" if tried == len(settings) else f" ({tried} of {len(settings)} settings tried)"


def decode_rate(figures: Mapping[str, Any]) -> str:
    """Formats the tokens per second of the median run, and of the slowest and fastest run if the file has them."""
    if "tokens_per_second" not in figures:
        return "out of memory" if figures.get("out_of_memory") else "failed"
    told = f"{figures['tokens_per_second']:,.1f}"
    if "spread" not in figures:
        return told
    seconds = figures["seconds"]["decode"]
    tokens = figures["tokens_per_second"] * statistics.median(seconds)
    return f"{told} ({tokens / max(seconds):,.1f}–{tokens / min(seconds):,.1f}, {len(seconds)} runs)"


def readme_training(groups: Mapping[Group, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Returns the README's table of optimizer steps: one of our measurements per length, and the strongest peer.

    The measurement is the fastest of today's code, or of older code if there is none of today's. A result without a
    record of the code that it measured is left to the page.
    """
    rows = []
    for (name, device, devices), reports in groups.items():
        measured = [(report, entry) for report in recorded(reports) for entry in entries_of(report)]
        for length in sorted({entry["length"] for _, entry in measured}):
            report, entry = max(
                (pair for pair in measured if pair[1]["length"] == length),
                key=lambda pair: (changed(pair[0]) == [], _rate(pair[1])),
            )
            if "tokens_per_second" not in entry:
                continue
            cells = [
                name,
                f"{devices} × {device}",
                f"{length:,}",
                f"{entry['tokens_per_second']:,.0f}{stale_mark(report)}",
            ]
            cells.append(number(entry["mfu"], ".1%"))
            rows.append([*cells, *(against(entry, stack) for stack in PEERS)])
    header = ("configuration", "devices", "tokens per row", "tokens/s", "MFU", "strongest peer", "with float32 state")
    return table(header, rows)


def against(entry: Mapping[str, Any], stack: str) -> str:
    """Describes a peer at a length: its speed, its setting, and our speed divided by it."""
    figures = stacks_of(entry).get(stack, {})
    if "tokens_per_second" not in figures:
        return "out of memory" if figures.get("out_of_memory") else "–"
    speed, ratio = figures["tokens_per_second"], entry[PEERS[stack][1]]
    return f"{speed:,.0f} with {short_setting(figures['setting'])}: ours is {ratio:.2f} ×"


def short_setting(name: str) -> str:
    """Describes a training peer's setting by what differs from the defaults."""
    if name.startswith("torchtitan/"):
        mode = name.split("/")[1]
        return "torchtitan, " + ("no checkpointing" if mode == "none" else f"{mode} checkpointing")
    attention, layers, kernels, checkpointing, _ = name.split("/")
    told = [
        "compiled layers" if layers == "compiled" else "eager layers",
        {"liger": "Liger kernels"}.get(kernels),
        None if attention == "default" else f"{attention} attention",
        "no checkpointing" if checkpointing == "kept" else None,
    ]
    return ", ".join(filter(None, told))


def readme_generation(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the README's table of generation: tokens per second, share of the memory bandwidth, fastest peer.

    A result without a record of the code that it measured is left to the page.
    """
    rows = []
    newest = {_kind(report): report for report in generation_reports(recorded(reports))}
    for report in newest.values():
        for name, ours in report["runs"].items():
            if "tokens_per_second" not in ours:
                continue
            setting = report.get("strongest_peer", {}).get(name)
            theirs = f"{report['peer'][name][setting]['tokens_per_second']:,.1f} with {setting}" if setting else "–"
            ratio = (
                f"{left_out(report, name)}: ours is {report['ratio_to_strongest_peer'][name]:.2f} ×" if setting else ""
            )
            rows.append(
                [
                    f"{report['shape']}, {report['device']}",
                    "bfloat16" if report["cache"] == "model" else report["cache"],
                    f"{ours['batch']} × {ours['prompt']:,}",
                    f"{ours['tokens_per_second']:,.1f}{stale_mark(report)}",
                    number(ours.get("bandwidth_share"), ".0%"),
                    theirs + ratio,
                ]
            )
    header = (
        "shape, device",
        "cache",
        "rows × prompt",
        "tokens/s",
        "share of the memory bandwidth",
        "fastest `generate`",
    )
    return table(header, rows)


def stale_mark(report: Mapping[str, Any]) -> str:
    """Returns a dagger for a figure whose code has changed since."""
    return "" if changed(report) == [] else " †"


def parts(results: Path) -> dict[str, str]:
    """Builds everything that is written from a directory of results, by part."""
    groups, reports = grouped(read_results(results)), all_results(results)
    tables = (whole_run_table, numerics_table, generation_table)
    more = "\n".join(line for one in tables for line in [*one(reports), ""]).strip().splitlines()
    return {
        "performance": page(groups, more),
        "training": "\n".join(readme_training(groups)),
        "generation": "\n".join(readme_generation(reports)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="directory of the results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/performance.md", help="the page with the markers")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the README with the markers")
    options = parser.parse_args()
    pictures = options.page.parent / "performance"
    pictures.mkdir(exist_ok=True)
    for group, reports in grouped(read_results(options.results)).items():
        draw(group, reports, pictures / picture_name(group))
        print(f"picture: {pictures / picture_name(group)}")
    for part, text in parts(options.results).items():
        path = options.page if part == "performance" else options.readme
        write_part(path, BEGIN.format(part), text)
        print(f"{part}: {path}")


if __name__ == "__main__":
    run(main)
