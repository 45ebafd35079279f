"""`eabf suggest`: the rotary scheme for a model and a target window, with the evidence, and the YAML that trains it."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eabf_jax.analysis.suggest import (
    Candidate,
    Suggestion,
    far_start,
    least_base,
    own_base,
    parts_of,
    rope_config,
    suggest,
)
from eabf_jax.commands.evaluate import measured_on
from eabf_jax.commands.options import check_positive, write_figures
from eabf_jax.console import Grid, progress_bar, show, track
from eabf_jax.destination import whole
from eabf_jax.errors import InputError
from eabf_jax.evaluation.documents import read_documents
from eabf_jax.evaluation.intervals import Mean, finite
from eabf_jax.model.config import LlamaConfig
from eabf_jax.parallel.mesh import gpu_defaults, use_every_core
from eabf_jax.rope import Scheme
from eabf_jax.rope.named import ABF_BASE
from eabf_jax.training.recipe import TrainConfig, dump_config, load_config
from eabf_jax.training.trainer import base_config, settle

# Rows of the table, more if more candidates were trained.
_ROWS = 16

EPILOG = """\
The configuration, or --model.path, --window, --data.directory and --output, names model, target window, data and run;
the scheme in it plays no part. Candidates are scored on the last --documents of the split --split. `eabf train --help`
lists the keys of the configuration.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's own options; its other arguments are configuration keys."""
    parser.usage = "%(prog)s [--config_path FILE] --write FILE [--documents N] [--dotted.key VALUE ...]"
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    parser.set_defaults(configuration_keys=[])
    add = parser.add_argument
    add("--config_path", metavar="FILE", help="the run's configuration")
    add("--write", metavar="FILE", required=True, help="write the configuration with the suggested scheme here (.yaml)")
    add("--documents", type=int, default=8, help="held-out documents to score on, the last ones (default: %(default)s)")
    add("--split", default="held_out", help="their split of the dataset (default: %(default)s)")
    add("--bases", help="bases to try, e.g. 50000,100000 (default: multiples of the model's own, and the lower bound)")
    add("--batch-size", type=int, default=1, help="documents that each device reads at a time (default: 1)")
    add("--json", metavar="FILE", help="also write the evidence to this file")
    add("--figure", metavar="FILE", help="draw the losses by base here (.png, .svg or .pdf)")


def run(arguments: argparse.Namespace) -> None:
    """Searches; prints the evidence and the suggestion, and writes the configuration."""
    check_positive(arguments, ("documents", "batch_size"))
    target = Path(arguments.write)
    if target.suffix not in (".yaml", ".yml") or not target.parent.is_dir() or target.exists():
        raise InputError(f"--write {target}: the name of a new .yaml file in a directory that exists is needed")
    bases = _bases(arguments.bases)
    given = ["--config_path", arguments.config_path] if arguments.config_path else ["--rope.type", "abf"]
    config = load_config([*given, *arguments.configuration_keys])
    if arguments.split == config.data.split:
        raise InputError(f"--split {arguments.split} is the split that the run trains on; another one is needed")
    if config.model.path is None:
        raise InputError("model.path is not set; the scheme is chosen for a pretrained model")
    use_every_core(config.recipe.batch_size)
    gpu_defaults()
    base = base_config(config)
    own_base(base.rope)
    settle(config)  # refuses what training would refuse, before the search
    documents = read_documents(config.data.directory, arguments.split, config.window, None, skip_shorter=True)
    if not 2 <= arguments.documents <= len(documents):
        raise InputError(
            f"--documents {arguments.documents}: at least 2 are needed, and split {arguments.split!r} of "
            f"{config.data.directory} has {len(documents)} documents of at least {config.window} tokens"
        )
    documents = documents[-arguments.documents :]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".suggest-") as scratch, progress_bar() as progress:

        def stage(name: str, total: float) -> Callable[[float], None]:
            return track(progress, name, total)

        found = suggest(config, documents, Path(scratch), bases=bases, batch_size=arguments.batch_size, progress=stage)
    show(table(found, config.window, len(documents)))
    lines = advice(found, config, base)
    print("\n".join(lines))
    write(found.candidates[0].scheme, config, lines, target)
    print(f"configuration: {target}; python train.py --config_path {target} trains it")
    write_figures(arguments, as_json(found, config, base, len(documents)), "evidence")
    if arguments.figure:
        from eabf_jax.analysis.figures import loss_by_base

        loss_by_base(found, Path(arguments.figure), own=own_base(base.rope))
        print(f"picture: {arguments.figure}")


def _bases(text: str | None) -> list[float]:
    try:
        found = [] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if any(not 1 < base < float("inf") for base in found):
        raise InputError(f"--bases {text}: numbers above 1 such as 50000,100000 are needed")
    return found


def table(found: Suggestion, window: int, documents: int) -> Grid:
    """Lays out the candidates, the best first, with the losses after each round and the distance to the best."""
    heads = ["untrained", *(f"{steps} step{'s' * (steps > 1)}" for steps in found.rounds[1:])]
    title = (
        f"loss at {far_start(window):,}-{window:,}, nats per token, {documents} documents of {window:,} tokens "
        "(last columns: minus the best one's, paired, and the loss inside the pretrained window)"
    )
    grid = Grid(["frequencies", "multiplier"], [*heads, "behind", "inside"], title=title)
    best = found.candidates[0]
    rows = [one for number, one in enumerate(found.candidates) if one.steps or number < _ROWS]
    if len(rows) < len(found.candidates):
        grid.caption = f"and {len(found.candidates) - len(rows)} more that were worse before training (see --json)"
    for candidate in rows:
        losses = [f"{candidate.far(steps).mean:.3f}" if steps in candidate.losses else "" for steps in found.rounds]
        steps = candidate.steps
        behind = "" if candidate is best else _shown(candidate.behind(best, steps))
        style = "bold" if candidate is best else None
        grid.add(parts_of(candidate.scheme), [*losses, behind, f"{candidate.near(steps).mean:.3f}"], style=style)
    return grid


def _shown(mean: Mean) -> str:
    return f"{mean.mean:+.3f} ± {mean.half_width:.3f}"


def advice(found: Suggestion, config: TrainConfig, base: LlamaConfig) -> list[str]:
    """Returns the suggestion in a few lines."""
    own, bound, window = own_base(base.rope), least_base(config.window), config.window
    best = found.candidates[0]
    frequencies, multiplier = parts_of(best.scheme)
    chosen = own_base(best.scheme)
    if chosen != own:
        frequencies += f" ({chosen / own:g} times the model's {own:,.0f})"
    lines = [
        f"suggested for {config.model.path}, {base.max_position_embeddings:,} to {window:,} tokens:",
        f"  frequencies  {frequencies}",
        f"  multiplier   {multiplier}",
        f"  bound        a window of {window:,} tokens needs a base of about {bound:,.0f} (arXiv 2405.14591)"
        + ("; the paper's 500,000 is below it" if bound > ABF_BASE else ""),
    ]
    others = [candidate for candidate in found.candidates[1:] if candidate.steps == best.steps]
    for other in others:
        behind = other.behind(best, best.steps)
        if behind.mean - behind.half_width <= 0:
            lines.append(f"  undecided    {', '.join(parts_of(other.scheme))} is behind by {_shown(behind)}")
    return lines


def write(scheme: Scheme, config: TrainConfig, lines: list[str], target: Path) -> None:
    """Writes the configuration that trains a scheme, with the advice as comments."""
    config.rope = rope_config(scheme)
    with whole(target) as partial:
        partial.write_text("".join(f"# {line}\n" for line in lines) + dump_config(config), encoding="utf-8")


def as_json(found: Suggestion, config: TrainConfig, base: LlamaConfig, documents: int) -> dict[str, Any]:
    """Returns the evidence as JSON values."""

    def values(candidate: Candidate) -> dict[str, Any]:
        best = found.candidates[0]
        return {
            "scheme": candidate.scheme.to_dict(),
            "rounds": [
                {
                    "steps": steps,
                    "far": finite(candidate.far(steps)._asdict()),
                    "inside": finite(candidate.near(steps)._asdict()),
                    "behind_best": finite(candidate.behind(best, steps)._asdict()),
                    "by_document": losses.tolist(),
                }
                for steps, losses in sorted(candidate.losses.items())
            ],
        }

    return {
        **measured_on(),
        "model": config.model.path,
        "window": config.window,
        "pretrained_window": base.max_position_embeddings,
        "documents": documents,
        "far_band": [far_start(config.window), config.window],
        "unit": "nats per token; half_width: of the 95 % confidence interval over documents (Student's t)",
        "own_base": own_base(base.rope),
        "least_base": least_base(config.window),
        "suggestion": found.candidates[0].scheme.to_dict(),
        "candidates": [values(candidate) for candidate in found.candidates],
        "entropies": [
            {"frequencies": scheme.to_dict(), "betas": fit.betas.tolist(), "growth_inside": fit.growth.tolist()}
            for scheme, fit in found.entropies.items()
        ],
    }
