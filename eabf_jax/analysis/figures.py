"""Pictures, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from eabf_jax.evaluation.intervals import Share, student
from eabf_jax.evaluation.perplexity import WindowPerplexity
from eabf_jax.evaluation.retrieval import Cell


def loss_by_position(
    losses: Mapping[str, Float[np.ndarray, "documents T_minus_1"]],
    path: Path,
    *,
    pretrained_window: int | None = None,
    title: str = "",
    bins: int = 32,
) -> None:
    """Draws the mean loss over documents against the position, one line a model, the last one emphasised.

    Around each line, the 95 % confidence interval over documents.

    Args:
      losses: from `evaluation.perplexity.position_losses`, by label.
      path: the picture; its suffix (.png, .svg, .pdf) says which kind.
      pretrained_window: position to mark, in tokens.
      title: above the axes.
      bins: points of each line; the tokens in between are averaged.
    """
    figure, axes = _axes("position (tokens)", "loss (nats per token)", title)
    for number, (label, table) in enumerate(losses.items(), start=1):
        found = [student(part.mean(axis=1)) for part in np.array_split(table.astype(np.float64), bins, axis=1)]
        centres = [part.mean() for part in np.array_split(np.arange(1, table.shape[1] + 1), bins)]
        _line(
            axes,
            centres,
            [(mean, mean - half_width, mean + half_width) for mean, half_width in found],
            label=label,
            **_style(number, len(losses)),
        )
    _mark(axes, pretrained_window)
    axes.set_xlim(left=0)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


def perplexity_by_window(windows: Mapping[str, Sequence[WindowPerplexity]], path: Path, *, title: str = "") -> None:
    """Draws sliding-window perplexity against the window, one line a model with its 95 % confidence interval.

    Args:
      windows: by label.
      path: the picture; its suffix (.png, .svg, .pdf) says which kind.
      title: above the axes.
    """
    figure, axes = _axes("window (tokens)", "perplexity", title)
    for number, (label, row) in enumerate(windows.items(), start=1):
        points = [(w.perplexity, w.low, w.high) for w in row]
        _line(axes, [w.window for w in row], points, label=label, marker="o", **_style(number, len(windows)))
    # A model that falls apart would flatten the others.
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    length_axis(axes, sorted({w.window for row in windows.values() for w in row}))
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


def share_by_length(
    shares: Mapping[str, Mapping[int, Share]], path: Path, *, pretrained_window: int | None = None, title: str = ""
) -> None:
    """Draws the share of prompts answered against their length, one line a model with its 95 % confidence interval.

    Args:
      shares: by label and length in tokens.
      path: the picture; its suffix (.png, .svg, .pdf) says which kind.
      pretrained_window: length to mark, in tokens.
      title: above the axes.
    """
    figure, axes = _axes("length (tokens)", "answered (percent)", title)
    for number, (label, row) in enumerate(shares.items(), start=1):
        points = [(100 * s.hits / s.total, 100 * s.low, 100 * s.high) for s in row.values()]
        _line(axes, list(row), points, label=label, marker="o", **_style(number, len(shares)))
    length_axis(axes, sorted({length for row in shares.values() for length in row}))
    axes.set_ylim(-3, 103)
    _mark(axes, pretrained_window)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


def heat_maps(
    cells: Mapping[str, Sequence[Cell]], path: Path, *, pretrained_window: int | None = None, title: str = ""
) -> None:
    """Draws the share of prompts answered at every length and depth, one map a model, side by side.

    Args:
      cells: by label, on one grid of lengths and depths.
      path: the picture; its suffix (.png, .svg, .pdf) says which kind.
      pretrained_window: the line behind the last length within it is marked, in tokens.
      title: above all.
    """
    across = min(len(cells), 5)
    down = -(-len(cells) // across)
    figure = Figure(figsize=(1.2 + 2.4 * across, 0.8 + 2.6 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(cells) :]:
        panel.set_axis_off()
    image = None
    for panel, (label, row) in zip(panels.flat, cells.items(), strict=False):
        lengths = sorted({cell.length for cell in row})
        depths = sorted({cell.depth for cell in row if cell.depth is not None})
        shares = np.full((len(depths), len(lengths)), np.nan)
        for cell in row:
            shares[depths.index(cell.depth or 0), lengths.index(cell.length)] = 100 * cell.hits / cell.total
        image = panel.imshow(shares, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        for (y, x), share in np.ndenumerate(shares):
            panel.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=7)
        panel.set_title(label, fontsize=9)
        panel.set_xticks(range(len(lengths)), [_thousands(length) for length in lengths], fontsize=7)
        panel.set_yticks(range(len(depths)), [str(depth) for depth in depths], fontsize=7)
        within = sum(length <= (pretrained_window or 0) for length in lengths)
        if 0 < within < len(lengths):
            panel.axvline(within - 0.5, color="black", linestyle="--", linewidth=1)
    figure.supxlabel("length (tokens)", fontsize=9)
    figure.supylabel("depth (percent)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=panels, label="answered (percent)", shrink=0.8)
    save(figure, path)


def _axes(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _style(number: int, count: int) -> dict[str, Any]:
    if number == count > 1:
        return {"linewidth": 3, "color": "black"}
    # There are ten colours: the eleventh model is dashed rather than drawn like the first.
    return {"linewidth": 1.5, "linestyle": "-" if number <= 10 else "--"}


def _line(axes: Axes, x: Sequence[float], points: Sequence[tuple[float, float, float]], **style: Any) -> None:
    """A line through the first of each three numbers, and a band between the others."""
    (drawn,) = axes.plot(x, [point[0] for point in points], **style)
    low, high = [point[1] for point in points], [point[2] for point in points]
    axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.08, linewidth=0)


def _mark(axes: Axes, pretrained_window: int | None) -> None:
    if pretrained_window is not None:
        axes.axvline(pretrained_window, color="grey", linestyle="--", linewidth=1)
        top = (pretrained_window, axes.get_ylim()[1])
        axes.annotate("pretrained window", top, (4, -12), textcoords="offset points", color="grey", fontsize=8)


def length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """Makes the x axis one of lengths, each twice the one before as far from it.

    Args:
      axes: what is drawn there has its x in tokens.
      lengths: tokens, where to put a label.
    """
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_thousands(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())


def _thousands(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def save(figure: Figure, path: Path) -> None:
    """Writes a picture beside its place, then under its name: a failed write leaves nothing that looks whole.

    Args:
      figure: the picture.
      path: its file; the ending names the format.
    """
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=150)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
