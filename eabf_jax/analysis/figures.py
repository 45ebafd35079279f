"""Pictures, drawn without a display."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure


def loss_by_position(
    losses: Mapping[str, Float[np.ndarray, "documents T_minus_1"]],
    path: Path,
    *,
    pretrained_window: int | None = None,
    title: str = "",
    bins: int = 32,
) -> None:
    """Draws the mean loss over documents against the position, one line a model, the last one emphasised.

    Args:
      losses: from `evaluation.perplexity.position_losses`, by label.
      path: the picture; its suffix (.png, .svg, .pdf) says which kind.
      pretrained_window: position to mark, in tokens.
      title: above the axes.
      bins: points of each line; the tokens in between are averaged.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (label, table) in enumerate(losses.items(), start=1):
        means = [part.mean() for part in np.array_split(table.mean(axis=0), bins)]
        centres = [part.mean() for part in np.array_split(np.arange(1, table.shape[1] + 1), bins)]
        # There are ten colours: the eleventh model is dashed rather than drawn like the first.
        style: dict[str, Any] = {"linewidth": 1.5, "linestyle": "-" if number <= 10 else "--"}
        if number == len(losses) > 1:
            style = {"linewidth": 3, "color": "black"}
        axes.plot(centres, means, label=label, **style)
    if pretrained_window is not None:
        axes.axvline(pretrained_window, color="grey", linestyle="--", linewidth=1)
        top = (pretrained_window, axes.get_ylim()[1])
        axes.annotate("pretrained window", top, (4, -12), textcoords="offset points", color="grey", fontsize=8)
    axes.set(xlabel="position (tokens)", ylabel="loss (nats per token)", title=title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


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
