"""Chooses base and learning rate for an experiment's configurations, from the same choices for every scheme.

    eabf prepare --src SHAREGPT --dst data/sharegpt_32k_select --tokenizer models/smollm2-135m --template chatml \
        --min-tokens 10000 --max-tokens 32768 --num-conversations 100 --held-out 8
    python benchmarks/recipe_search.py --config 'configs/smollm2_135m_{}_32k.yaml' \
        --schemes pi,yarn,abf,eabf,ntk_by_parts_entropy --bases 250000,500000,1000000,2000000 \
        --learning-rates 1e-4,2e-4,4e-4,8e-4 --data data/sharegpt_32k_select --json OUT.json --time-limit 540 \
        --recipe.batch_size 8 --recipe.steps 6

Each scheme's configuration is trained on the dataset's training split with every learning rate and, for `abf` and
`eabf`, with every base; other schemes keep the base of their configuration. The run with the lowest loss over all
positions of the validation documents is chosen. These are the held-out documents without the first --skip, which an
evaluation may report. Further options with a dot go to train.py, the same for all schemes.

The file is written after each training run. When the time is up, the exit status is 3, and the same command resumes.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenance import commit

from eabf_jax import load
from eabf_jax.cli import ArgumentParser, run
from eabf_jax.commands.evaluate import measured_on
from eabf_jax.commands.evaluate.perplexity import default_edges
from eabf_jax.data.dataset import Records
from eabf_jax.errors import InputError
from eabf_jax.evaluation.documents import read_documents
from eabf_jax.evaluation.perplexity import band_losses, position_losses
from eabf_jax.interop.directory import read_json_object, write_json
from eabf_jax.parallel.mesh import gpu_defaults, use_every_core
from eabf_jax.training.recipe import TrainConfig, load_config
from eabf_jax.training.trainer import train

UNFINISHED = 3
# Schemes whose base is a choice; the others interpolate the pretrained frequencies.
ADJUSTED_BASE = ("abf", "eabf")


def values(option: str, text: str) -> list[float]:
    """Reads a list of positive numbers.

    Args:
      option: the option's name on the command line.
      text: comma-separated numbers.

    Returns:
      The numbers.
    Raises:
      InputError: the text is something else.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise InputError(f"{option} {text}: positive numbers such as 1e-4,2e-4 are needed")
    return found


def configuration(
    arguments: argparse.Namespace, cell: dict[str, Any], output: str, overrides: list[str]
) -> TrainConfig:
    """Builds the configuration of one training run.

    Args:
      arguments: the command line.
      cell: `scheme`, `learning_rate` and `base`; None keeps the configuration's value.
      output: the run's directory.
      overrides: further options for train.py.

    Returns:
      The configuration.
    """
    chosen = [f"--{key}={cell[name]}" for key, name in KEYS.items() if cell[name] is not None]
    path = arguments.config.format(cell["scheme"])
    own = [f"--data.directory={arguments.data}", f"--output={output}", "--checkpoint.every_steps=null"]
    return load_config([f"--config_path={path}", *own, *overrides, *chosen])


KEYS = {"recipe.learning_rate": "learning_rate", "rope.base": "base"}


def choices(arguments: argparse.Namespace, overrides: list[str]) -> list[dict[str, Any]]:
    """Lists all training runs: each scheme with the same learning rates and, if it adjusts the base, the same bases."""
    cells = []
    for scheme in arguments.schemes.split(","):
        plain = {"scheme": scheme, "learning_rate": None, "base": None}
        kind = configuration(arguments, plain, "unused", overrides).scheme.to_dict()["type"]
        bases: Sequence[float | None] = values("--bases", arguments.bases) if kind in ADJUSTED_BASE else [None]
        rates = values("--learning-rates", arguments.learning_rates)
        cells += [{**plain, "learning_rate": rate, "base": base} for base in bases for rate in rates]
    return cells


def measure(config: TrainConfig, documents: Any, batch_size: int) -> dict[str, Any]:
    """Trains a model and measures it.

    Args:
      config: the run's configuration.
      documents: int32 [documents, length], for validation.
      batch_size: documents that each device reads at a time.

    Returns:
      `loss`, the mean over all positions, and `bands`, the mean in each band of positions; nats per token.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        train(config)
    model, _ = load(config.output, dtype=config.compute.dtype)
    losses = position_losses(model, documents, batch_size=batch_size)
    bands = [band.mean for band in band_losses(losses, default_edges(documents.shape[1]))]
    return {"loss": float(losses.mean(dtype="float64")), "bands": bands}


def chosen(cells: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Finds the best cell of each scheme.

    Args:
      cells: with `loss`.

    Returns:
      By scheme: base, learning rate and loss, and whether base and rate are the smallest or largest of several tried,
      so that the best value may lie beyond.
    """
    found: dict[str, dict[str, Any]] = {}
    for scheme in dict.fromkeys(cell["scheme"] for cell in cells):
        rows = [cell for cell in cells if cell["scheme"] == scheme]
        best = min(rows, key=lambda cell: cell["loss"])
        found[scheme] = {name: best[name] for name in ("base", "learning_rate", "loss")}
        for name in ("base", "learning_rate"):
            tried = sorted({cell[name] for cell in rows if cell[name] is not None})
            found[scheme][f"{name}_at_the_edge"] = len(tried) > 1 and best[name] in (tried[0], tried[-1])
    return found


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configurations, {} standing for the scheme")
    parser.add_argument("--schemes", required=True, help="what stands for it, e.g. pi,yarn,abf,eabf")
    parser.add_argument("--data", required=True, help="a dataset with a held-out split")
    parser.add_argument("--learning-rates", default="1e-4,2e-4,4e-4", help="to try (default: %(default)s)")
    parser.add_argument("--bases", required=True, help="to try where the scheme adjusts the base")
    parser.add_argument("--skip", type=int, default=0, help="held-out documents left to others (default: %(default)s)")
    parser.add_argument("--documents", type=int, help="held-out documents behind those to validate on (default: all)")
    parser.add_argument("--batch-size", type=int, default=1, help="of the validation (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, required=True, help="write the figures here; a file with some of them is completed"
    )
    parser.add_argument(
        "--time-limit", type=float, help="seconds after which to stop and be given again (default: none)"
    )
    arguments, overrides = parser.parse_known_args()
    begun, longest = time.monotonic(), 0.0
    cells = choices(arguments, overrides)
    use_every_core(configuration(arguments, cells[0], "unused", overrides).recipe.batch_size)
    gpu_defaults()
    part = slice(arguments.skip, None if arguments.documents is None else arguments.skip + arguments.documents)
    documents = read_documents(arguments.data, "held_out", None, None)[part]
    if not len(documents):
        raise InputError(f"--skip {arguments.skip} leaves no held-out document of {arguments.data} to validate on")
    names = {split: Records(arguments.data, split) for split in ("train", "held_out")}
    settings = {
        "config": arguments.config,
        "training": overrides,
        "training_documents": [names["train"][number]["id"] for number in range(len(names["train"]))],
        "validation_documents": [names["held_out"][number]["id"] for number in range(len(names["held_out"]))[part]],
        "validation_tokens": documents.shape[1],
        "edges": default_edges(documents.shape[1]),
        "unit": "nats per token; the lowest loss over all positions of the validation documents is chosen",
    }
    origin = {**measured_on(), "commit": commit()}
    report: dict[str, Any] = {**origin, **settings, "cells": []}
    if arguments.json.is_file():
        report = read_json_object(arguments.json)
        if {name: report.get(name) for name in settings} != settings:
            raise InputError(f"{arguments.json} was made with other settings or documents; name another file")
        report["continued"] = [*report.get("continued", []), origin]
    done: list[dict[str, Any]] = report["cells"]
    for cell in cells:
        if any(cell.items() <= other.items() for other in done):
            continue
        now = time.monotonic()
        if arguments.time_limit is not None and now + longest > begun + arguments.time_limit:
            print(f"time is up with {len(done)} of {len(cells)} runs; run the same command to continue", flush=True)
            sys.exit(UNFINISHED)
        with tempfile.TemporaryDirectory() as scratch:
            config = configuration(arguments, cell, f"{scratch}/run", overrides)
            found = measure(config, documents, arguments.batch_size)
        longest = max(longest, time.monotonic() - now)
        done.append({**cell, **found, "seconds": time.monotonic() - now})
        print(done[-1], flush=True)
        write_json(arguments.json, {**report, "chosen": chosen(done)})


if __name__ == "__main__":
    run(main)
