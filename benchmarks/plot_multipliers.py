"""Draws docs/multipliers.png: the multipliers of the attention logits against the position.

python benchmarks/plot_multipliers.py
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from eabf_jax.analysis.figures import length_axis, line_style, save
from eabf_jax.cli import run
from eabf_jax.rope import Scheme, compose, scheme

WINDOW, FACTOR = 4096, 32
LAYER = 2  # the first one that EABF scales
PICTURE = Path(__file__).parents[1] / "docs/multipliers.png"
_LISTS = {"short_factor": [1.0] * 64, "long_factor": [1.0] * 64}  # the factor on cos and sin does not depend on them


def schemes() -> dict[str, Scheme]:
    """Returns the scheme of each line by its label."""

    def multiplier(kind: str, **parameters: float) -> Scheme:
        return compose({"type": "default"}, {"type": kind, **parameters})

    extension = {"factor": FACTOR, "pretrained_window": WINDOW}
    return {
        f"YaRN, factor {FACTOR}": scheme("yarn", **extension),
        "dynamic YaRN, at the end of a text": scheme("dynamic_yarn", pretrained_window=WINDOW),
        f"LongRoPE, factor {FACTOR}": scheme("longrope", **extension, **_LISTS),
        "llama4_temperature, beta 0.1 (Llama 4, Ministral 3)": multiplier(
            "llama4_temperature", pretrained_window=WINDOW, beta=0.1
        ),
        "smooth_temperature, beta 0.1": multiplier("smooth_temperature", pretrained_window=WINDOW, beta=0.1),
        "ssmax, scaling 1 / ln c": multiplier("ssmax", scaling=1 / math.log(WINDOW)),
        "eabf_stair": scheme("eabf_stair", pretrained_window=WINDOW),
        "EABF, logn": scheme("eabf", pretrained_window=WINDOW),
    }


def curves(positions: np.ndarray) -> dict[str, np.ndarray]:
    """Computes what multiplies the logits of the query at each position, by label.

    Args:
      positions: 1-based. A scheme that follows the length gets texts that end there.

    Returns:
      The scheme's multiplier times the square of its factor on cos and sin.
    """
    found = {}
    for label, s in schemes().items():
        scales = [float(s.rotation_scale(int(at))) for at in positions]
        found[label] = np.asarray(s.logit_scale(jnp.asarray(positions - 1), LAYER)) * np.square(scales)
    return found


def draw(lines: Mapping[str, np.ndarray], positions: np.ndarray, path: Path) -> None:
    """Draws one line for each multiplier."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="position (tokens)", ylabel="multiplier of the attention logits")
    axes.grid(alpha=0.3)
    for number, (label, values) in enumerate(lines.items()):
        style = line_style(number, len(lines))
        # Each line has its markers at other places, because some lines lie on each other.
        axes.plot(positions, values, label=label, markevery=(5 * number, len(positions) // 6), **style)
    axes.axvline(WINDOW, color="grey", linestyle="--", linewidth=1)
    axes.annotate("pretrained window c", (WINDOW, 0), (4, 6), xycoords=("data", "axes fraction"),
                  textcoords="offset points", color="grey", fontsize=8)  # fmt: skip
    length_axis(axes, [WINDOW // 4 * 2**power for power in range(8)])
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, handlelength=4)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/multipliers.png.")
    parser.add_argument(
        "--out", type=Path, default=PICTURE, help="the picture to write (default: docs/multipliers.png)"
    )
    path = parser.parse_args().out
    positions = np.unique(np.geomspace(WINDOW / 4, FACTOR * WINDOW, 481).round().astype(int))
    draw(curves(positions), positions, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
