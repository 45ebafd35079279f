"""Draws pictures without a display; the suffix of a picture's path (.png, .svg, .pdf) sets its format.

Colours remain distinct for colour-blind readers and in print: lines use the palette of Okabe and Ito, each with its own
marker, and heat maps use cividis.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator, NullLocator

from eabf_jax.analysis.attention_entropy import Entropies
from eabf_jax.analysis.suggest import Suggestion, families, own_base, parts_of
from eabf_jax.destination import whole
from eabf_jax.evaluation.intervals import Share
from eabf_jax.evaluation.perplexity import BandLoss, WindowPerplexity
from eabf_jax.evaluation.retrieval import Cell

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_LINES = ("-", "--", "-.", ":")
_MARKERS = "os^DvPX<>p*h"


def loss_by_position(
    curves: Mapping[str, Sequence[BandLoss]], path: Path, *, pretrained_window: int | None = None, title: str = ""
) -> None:
    """Draws the mean loss over documents in bands of positions, one line per model, the last one emphasised.

    The band around each line is the 95 % confidence interval over documents.

    Args:
      curves: by label, from `evaluation.perplexity.band_losses`.
      pretrained_window: position to mark, in tokens.
    """
    figure, axes = _axes("position (tokens)", "loss (nats per token)", title)
    for number, (label, row) in enumerate(curves.items()):
        # The mean of a band is drawn as long as the band. Each line has its marker at a different place.
        share = (number + 1) / (len(curves) + 1)
        places = [at for band in row for at in (band.start, (1 - share) * band.start + share * band.end, band.end)]
        points = [
            (band.mean, band.mean - band.half_width, band.mean + band.half_width) for band in row for _ in range(3)
        ]
        markers = (1, 3 * max(1, len(row) // 8))
        _line(axes, places, points, label=label, markevery=markers, **line_style(number, len(curves)))
    axes.set_xlim(left=0)
    # On a linear axis, a model that fails would flatten the others.
    _log_axis(axes)
    _mark(axes, pretrained_window)
    _legend(figure, axes)
    save(figure, path)


def perplexity_by_window(windows: Mapping[str, Sequence[WindowPerplexity]], path: Path, *, title: str = "") -> None:
    """Draws sliding-window perplexity against the window, one line per model with its 95 % confidence interval."""
    figure, axes = _axes("window (tokens)", "perplexity", title)
    for number, (label, row) in enumerate(windows.items()):
        points = [(w.perplexity, w.low, w.high) for w in row]
        _line(axes, [w.window for w in row], points, label=label, **line_style(number, len(windows)))
    _log_axis(axes)
    length_axis(axes, sorted({w.window for row in windows.values() for w in row}))
    _legend(figure, axes)
    save(figure, path)


def share_by_length(
    shares: Mapping[str, Mapping[int, Share]], path: Path, *, pretrained_window: int | None = None, title: str = ""
) -> None:
    """Draws the share of prompts answered against their length, one line per model with its 95 % confidence intervals.

    Args:
      shares: by label and length in tokens.
      pretrained_window: length to mark, in tokens.
    """
    figure, axes = _axes("length (tokens)", "answered (percent)", title)
    for number, (label, row) in enumerate(shares.items()):
        # Many models answer all prompts or none; a horizontal offset keeps them from hiding each other.
        beside = 2 ** (0.04 * (number - (len(shares) - 1) / 2))
        found = 100 * np.array([(s.hits / s.total, s.low, s.high) for s in row.values()])
        reach = np.maximum(np.abs(found[:, 1:] - found[:, :1]).T, 0)
        style = line_style(number, len(shares))
        axes.errorbar([beside * length for length in row], found[:, 0], reach, label=label, elinewidth=1, **style)
    length_axis(axes, sorted({length for row in shares.values() for length in row}))
    axes.set_ylim(-3, 103)
    _mark(axes, pretrained_window)
    _legend(figure, axes)
    save(figure, path)


def means_by(
    rows: Mapping[str, Mapping[str, tuple[float, float]]],
    places: Sequence[str],
    path: Path,
    *,
    label: str,
    unit: str,
    title: str = "",
) -> None:
    """Draws means with their intervals at named places, such as windows or amounts of data, one line per method.

    Args:
      rows: by method and place: the mean, and half the width of its interval (NaN for none).
      places: the places in their order.
      label, unit: of the two axes.
    """
    figure, axes = _axes(label, unit, title)
    for number, (method, row) in enumerate(rows.items()):
        # A horizontal offset keeps intervals from hiding each other.
        beside = 0.03 * (number - (len(rows) - 1) / 2)
        found = np.array([row[place] for place in places if place in row])
        reach = np.nan_to_num(found[:, 1])
        at = [places.index(place) + beside for place in places if place in row]
        axes.errorbar(at, found[:, 0], reach, label=method, elinewidth=1, **line_style(number, len(rows)))
    axes.set_xticks(range(len(places)), list(places))
    if all(mean > 0 for row in rows.values() for mean, _ in row.values()) and unit.startswith("nats"):
        _log_axis(axes)
    _legend(figure, axes)
    save(figure, path)


def heat_maps(
    cells: Mapping[str, Sequence[Cell]], path: Path, *, pretrained_window: int | None = None, title: str = ""
) -> None:
    """Draws the share of prompts answered at every length and depth, one map per model, side by side.

    Args:
      cells: by label, on one grid of lengths and depths.
      pretrained_window: in tokens; a line is drawn after the last length within it.
    """
    across = min(len(cells), 5)
    down = -(-len(cells) // across)
    figure = Figure(figsize=(1.2 + 2.4 * across, 0.8 + 2.6 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(cells) :]:
        panel.set_axis_off()
    colours = matplotlib.colormaps["cividis"]
    for number, (panel, (label, row)) in enumerate(zip(panels.flat, cells.items(), strict=False)):
        lengths = sorted({cell.length for cell in row})
        depths = sorted({cell.depth for cell in row if cell.depth is not None})
        shares = np.full((len(depths), len(lengths)), np.nan)
        for cell in row:
            shares[depths.index(cell.depth or 0), lengths.index(cell.length)] = 100 * cell.hits / cell.total
        panel.imshow(shares, vmin=0, vmax=100, cmap=colours, aspect="auto")
        for (y, x), share in np.ndenumerate(shares):
            if not np.isnan(share):
                ink = ink_on(colours(share / 100)[:3])
                panel.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=8, color=ink)
        panel.set_title(label, fontsize=9)
        panel.set_xticks(range(len(lengths)), [_thousands(length) for length in lengths], fontsize=8)
        panel.set_yticks(range(len(depths)), [str(depth) for depth in depths], fontsize=8)
        # The last panel of a column has the lengths below it, even if the next row of panels is shorter.
        panel.tick_params(labelbottom=number + across >= len(cells))
        within = sum(length <= (pretrained_window or 0) for length in lengths)
        if 0 < within < len(lengths):
            # Alternating black and white is visible on any colour.
            panel.axvline(within - 0.5, color="black", linewidth=2)
            panel.axvline(within - 0.5, color="white", linestyle="--", linewidth=2)
    marked = f" (dashed: the pretrained window, {pretrained_window:,})" if pretrained_window else ""
    figure.supxlabel(f"length (tokens){marked}", fontsize=9)
    figure.supylabel("depth (percent)", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(panels.flat[0].images[0], ax=panels, label="answered (percent)", shrink=0.8)
    save(figure, path)


def entropy_maps(
    found: Mapping[str, Entropies], path: Path, *, pretrained_window: int | None = None, title: str = ""
) -> None:
    """Draws attention entropies, one row per model: curves by layer, a map of layer and position, and all heads.

    Curves and map are means over heads. On the logarithmic axis of positions, even attention (ln n) is a straight line.

    Args:
      found: by label, from `attention_entropy.entropies`, on one list of bands.
      pretrained_window: position to mark, in tokens.
    """
    figure = Figure(figsize=(15, 0.8 + 3.4 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 3, squeeze=False, sharex="col", sharey="col", width_ratios=(5, 5, 4))
    top = max(float(entropy.means.mean((0, 2)).max()) for entropy in found.values())
    colours = matplotlib.colormaps["cividis"]
    depth = max(entropy.means.shape[1] for entropy in found.values())
    for (curves, heat, heads), (label, entropy) in zip(panels, found.items(), strict=True):
        edges, means = np.maximum(entropy.edges, 1), entropy.means.mean(0)  # [layers, heads, bands]
        centres = np.sqrt(edges[:-1] * edges[1:])
        for layer, row in enumerate(means.mean(1)):
            curves.plot(centres, row, color=colours(layer / max(depth - 1, 1)), linewidth=1)
        curves.plot(centres, entropy.uniform, color="black", linestyle="--", linewidth=1, label="even attention, ln n")
        curves.set(title=f"{label}: mean over heads", ylabel="entropy (nats)")
        curves.grid(alpha=0.3)
        curves.legend(fontsize=8, loc="upper left")
        drawn = heat.pcolormesh(edges, np.arange(len(means) + 1) - 0.5, means.mean(1), vmin=0, vmax=top, cmap=colours)
        heat.set(title="mean over heads", ylabel="layer")
        heat.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(drawn, ax=heat, label="entropy (nats)")
        layers = np.repeat(np.arange(means.shape[0]), means.shape[1])
        heads.plot(layers, means[..., -1].ravel(), "o", markersize=3, alpha=0.6, color=_COLOURS[0])
        heads.set(title=f"each head, positions {edges[-2]:,}-{edges[-1]:,}", ylabel="entropy (nats)")
        heads.xaxis.set_major_locator(MaxNLocator(integer=True))
        heads.grid(alpha=0.3)
        for panel in (curves, heat):
            length_axis(panel, [4**step for step in range(10) if edges[0] <= 4**step <= edges[-1]])
        _mark(curves, pretrained_window)
        if pretrained_window is not None and pretrained_window < edges[-1]:
            heat.axvline(pretrained_window, color="white", linestyle="--", linewidth=1)
    for panel, name in zip(panels[-1], ("position (tokens)", "position (tokens)", "layer"), strict=True):
        panel.set_xlabel(name)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, depth - 1), colours)
    figure.colorbar(scale, ax=panels[:, 0], label="layer of the curve", location="left", shrink=0.6)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def loss_by_base(found: Suggestion, path: Path, *, own: float) -> None:
    """Draws the far band's loss against the base: a line for each multiplier tried with several, and points for others.

    Args:
      own: the model's base, to mark.
    """
    figure, axes = _axes("base of the frequencies", "loss in the far band (nats per token)", "")
    groups: dict[str, dict[float, float]] = {}
    for candidate in families(found.candidates)[0]:
        base, (_, multiplier) = own_base(candidate.scheme), parts_of(candidate.scheme)
        for steps in candidate.losses:
            after = f"after {steps} steps" if steps else "untrained"
            groups.setdefault(f"{multiplier}; {after}", {})[base] = candidate.far(steps).mean
    # Of the multipliers that were tried with one base only, those that were trained.
    shown = {label: row for label, row in groups.items() if len(row) > 1 or not label.endswith("untrained")}
    for number, (label, row) in enumerate(sorted(shown.items())):
        axes.plot(sorted(row), [row[base] for base in sorted(row)], label=label, **line_style(number, len(shown) + 1))
    axes.axvline(own, color="grey", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    _log_axis(axes)
    _legend(figure, axes)
    save(figure, path)


def ink_on(colour: Sequence[float]) -> str:
    """Returns "black" or "white", whichever is easier to read on a colour.

    Args:
      colour: sRGB, from 0 to 1.

    Source: contrast ratio and relative luminance of WCAG 2.1.
    """
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def line_style(number: int, count: int) -> dict[str, Any]:
    """Returns the style of one of several lines: up to a dozen differ in colour or dashes, and in the marker.

    Args:
      number: index of the line, from 0.
      count: number of lines; the last of several is emphasised, and is drawn below the others so as not to hide them.

    Returns:
      Keyword arguments for `Axes.plot`.
    """
    marker = _MARKERS[number % len(_MARKERS)]
    if number == count - 1 > 0:
        return {"marker": marker, "markersize": 8, "linewidth": 3, "color": "black", "zorder": 2}
    return {
        "marker": marker,
        "markersize": 6,
        "markerfacecolor": "none",  # two markers in one place are both visible
        "linewidth": 1.5,
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)],
        "zorder": 3,
    }


def _axes(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _line(axes: Axes, x: Sequence[float], points: Sequence[tuple[float, float, float]], **style: Any) -> None:
    """Draws a line through the first number of each triple, and a band between the other two."""
    (drawn,) = axes.plot(x, [point[0] for point in points], **style)
    low, high = [point[1] for point in points], [point[2] for point in points]
    axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.08, linewidth=0)


def _legend(figure: Figure, axes: Axes) -> None:
    """Adds a legend, in the order of the lines' right ends from top to bottom."""
    handles, labels = axes.get_legend_handles_labels()
    ends = [np.asarray(getattr(handle, "lines", [handle])[0].get_ydata())[-1] for handle in handles]
    order = sorted(range(len(labels)), key=lambda number: -ends[number])
    shown = [handles[number] for number in order], [labels[number] for number in order]
    figure.legend(*shown, loc="outside right upper", fontsize=8, handlelength=4)


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # If the axis spans less than one power of ten, there are labels between powers of ten.
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 1)))
    axes.grid(which="minor", alpha=0.3)


def _mark(axes: Axes, pretrained_window: int | None) -> None:
    """Marks the pretrained window if it is within the limits of the axes, which are already set."""
    left, right = axes.get_xlim()
    if pretrained_window is None or not left < pretrained_window < right:
        return
    axes.axvline(pretrained_window, color="grey", linestyle="--", linewidth=1)
    # The label is on the side of the line that has more room.
    x = axes.transAxes.inverted().transform(axes.transData.transform((pretrained_window, axes.get_ylim()[1])))[0]
    side, offset = ("left", 4) if x < 0.5 else ("right", -4)
    axes.annotate(
        "pretrained window", (x, 1), (offset, -12), xycoords="axes fraction", textcoords="offset points",
        ha=side, color="grey", fontsize=8,
    )  # fmt: skip
    axes.set_xlim(left, right)


def length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """Makes the x axis logarithmic with base 2, with labels at the given lengths in tokens."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [_thousands(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())


def _thousands(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def save(figure: Figure, path: Path) -> None:
    """Writes a picture to a temporary file and renames it, so that a failed write leaves no incomplete picture."""
    with whole(path) as partial:
        figure.savefig(partial, dpi=150)
