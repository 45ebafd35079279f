"""Finds the smallest TPU v4 slice for each model and window by compiling 7B, 13B and 70B train steps.

    python benchmarks/tpu_table.py            # compiles what results/tpu_table.json lacks and writes docs/tpu.md
    python benchmarks/tpu_table.py --afresh   # compiles everything again: about an hour on two cores
    python benchmarks/tpu_table.py --afresh 70b --afresh 131072   # only commands with one of these words

This needs no TPU, only its compiler (pip install libtpu). The planner predicts the smallest slice and its mesh; the
compiler must then accept that slice and refuse the next smaller one. Every compilation is an `eabf compile` command,
which is stored with its figures, the date, and the commit that was compiled.
"""

import argparse
import dataclasses
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pages import write_part

from eabf_jax.cli import ArgumentParser, run
from eabf_jax.hardware import DEVICES, GIB
from eabf_jax.interop.directory import write_json
from eabf_jax.model.config import LlamaConfig
from eabf_jax.parallel.topology import SLICES
from eabf_jax.training.plan import Plan, preferred_meshes
from eabf_jax.training.recipe import load_config

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/tpu_table.json", ROOT / "docs/tpu.md"
BEGIN = "<!-- begin: written by benchmarks/tpu_table.py -->"
MODELS = {
    "7B": "configs/llama2_7b_eabf_16k.yaml",
    "13B": "configs/llama2_13b_eabf_16k.yaml",
    "70B": "configs/llama2_70b_eabf_16k.yaml",
    "7B, LoRA": "configs/llama2_7b_eabf_16k_lora.yaml",
}
WINDOWS = (16_384, 65_536, 131_072)
V4 = [slice_ for name, slice_ in SLICES.items() if name.startswith("v4-")]
# The settings with the least memory: each layer keeps only its input.
SETTINGS = {"compute.remat": "full", "compute.optimizer_memory": "device", "compute.microbatch_size": "1"}
# Slices larger than the smallest that are also compiled.
ALSO = [("7B", 16_384, "v4-16"), ("7B", 16_384, "v4-32"), ("7B", 131_072, "v4-32")]


@cache
def preferred(model: str, window: int, chips: int) -> list[Plan]:
    """Returns the meshes to try, in order; see `preferred_meshes`."""
    overrides = [text for name, value in SETTINGS.items() for text in (f"--{name}", value)]
    config = load_config(["--config_path", str(ROOT / MODELS[model]), "--window", str(window), *overrides])
    shape = LlamaConfig.from_fields(config.model.shape or {})
    shape = dataclasses.replace(shape, max_position_embeddings=window, rope=config.scheme)
    return list(preferred_meshes(config, shape, chips, DEVICES["v4"]))


def command(model: str, window: int, slice_name: str, mesh: Mapping[str, int]) -> list[str]:
    """Returns the command line of one compilation."""
    axes = {f"mesh.{axis}": str(size) for axis, size in mesh.items() if axis != "data"}
    options = {"topology": slice_name, "config_path": MODELS[model], "window": str(window), **axes, **SETTINGS}
    return ["eabf", "compile", *(text for name, value in options.items() for text in (f"--{name}", value))]


class Cells:
    """Compiled results by command; every new cell is written immediately."""

    def __init__(self, path: Path, afresh: Sequence[str] = ()):
        """Reads the known results, except commands that contain one of the texts in `afresh`."""
        self.path = path
        known = json.loads(path.read_text()).get("cells", {}) if path.exists() else {}
        self.cells: dict[str, dict[str, Any]] = {
            line: cell for line, cell in known.items() if not any(text in line for text in afresh)
        }

    def compile(self, arguments: list[str]) -> dict[str, Any]:
        """Returns the figures of a command, or its `error`, from the file if it has them."""
        line = shlex.join(arguments)
        if line not in self.cells:
            print(line, flush=True)
            with tempfile.TemporaryDirectory() as directory:
                out = Path(directory) / "figures.json"
                done = subprocess.run(
                    [sys.executable, "-m", "eabf_jax", *arguments[1:], "--json", str(out)],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode == 0:
                    cell = json.loads(out.read_text())
                elif done.returncode == 2:
                    cell = {"error": done.stderr.strip().splitlines()[-1].removeprefix("error: ")}
                else:
                    raise RuntimeError(f"{line}: {done.stderr[-2000:]}")
            self.cells[line] = {**cell, "date": datetime.date.today().isoformat(), "commit": _commit()}
            print(f"  {cell.get('error') or cell['hbm_gib_per_chip']}", flush=True)
        return self.cells[line]


def _commit() -> str:
    """Returns the commit of the working tree, with "-dirty" if files differ from it."""
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*", "--abbrev=7"]
    return subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def fill(cells: Cells) -> dict[str, Any]:
    """Compiles what is missing.

    Args:
      cells: the known results.

    Returns:
      The table: a row for each model and window.
    """
    rows = []
    for model in MODELS:
        for window in WINDOWS:
            row: dict[str, Any] = {"model": model, "window": window, "planned_gib": {}, "compiled_gib": {}}
            for slice_ in V4:
                found = preferred(model, window, slice_.chips)
                row["planned_gib"][slice_.name] = round(found[0].total / GIB, 2)
            fitting = [slice_ for slice_ in V4 if row["planned_gib"][slice_.name] <= DEVICES["v4"].memory / GIB]
            number = V4.index(fitting[0])
            while number < len(V4) and not _try(cells, row, V4[number].name, V4[number].chips):
                number += 1
            while number and _try(cells, row, V4[number - 1].name, V4[number - 1].chips):
                number -= 1
            row["smallest"] = V4[number].name
            for name in (name for also in ALSO if also[:2] == (model, window) for name in also[2:]):
                _try(cells, row, name, SLICES[name].chips)
            rows.append(row)
            write_json(cells.path, {"benchmark": "tpu_table", "rows": rows, "cells": cells.cells})
    return {"benchmark": "tpu_table", "rows": rows, "cells": cells.cells}


def _try(cells: Cells, row: dict[str, Any], name: str, chips: int) -> bool:
    """Compiles a row's step for a slice, with the preferred meshes; returns whether one fits."""
    for entry in preferred(row["model"], row["window"], chips):
        arguments = command(row["model"], row["window"], name, entry.mesh)
        figures = cells.compile(arguments)
        row["compiled_gib"][name] = {"command": shlex.join(arguments), "gib": figures.get("hbm_gib_per_chip")}
        write_json(cells.path, {"benchmark": "tpu_table", "rows": [], "cells": cells.cells})
        if "error" not in figures:
            return True
        row["compiled_gib"][name]["error"] = figures["error"]
    return False


def tables(results: Mapping[str, Any]) -> str:
    """Returns the page's tables, in Markdown."""
    cells, names = results["cells"], [slice_.name for slice_ in V4]
    columns = (
        *("model", "window", "smallest slice", "mesh", "GiB per chip", "compute", "links", "step time, at least"),
        *("tokens/s, at most", "compiled", "command"),
    )
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for row in results["rows"]:
        told = row["compiled_gib"][row["smallest"]]
        found = cells[told["command"]]
        estimate = found["estimate"]
        shown = (
            row["model"],
            f"{row['window']:,}",
            f"{row['smallest']} ({found['chips']} chips)",
            " × ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1),
            f"{found['hbm_gib_per_chip']:.1f}",
            f"{estimate['compute_seconds']:.0f} s",
            f"{estimate['ici_seconds']:.0f} s",
            f"{estimate['step_seconds_at_least']:.0f} s",
            f"{estimate['tokens_per_second_at_most']:,.0f}",
            f"{found['date']}, {found['commit']}",
            f"`{told['command']}`",
        )
        lines.append(f"| {' | '.join(shown)} |")
    lines += ["", f"| model | window | {' | '.join(names)} |", "| --- | --- |" + " --- |" * len(names)]
    for row in results["rows"]:
        lines.append(f"| {row['model']} | {row['window']:,} | {' | '.join(_cell(row, name) for name in names)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], name: str) -> str:
    """Formats compiled GiB in bold and predicted GiB in italics."""
    compiled, planned = row["compiled_gib"].get(name), row["planned_gib"][name]
    if compiled is not None:
        return "refused" if compiled["gib"] is None else f"**{compiled['gib']:.1f}**"
    return f"_{planned:.1f}_" if planned <= DEVICES["v4"].memory / GIB else "—"


def main() -> None:
    """Fills the table and writes the page."""
    parser = ArgumentParser("tpu_table.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--afresh",
        nargs="?",
        const="eabf",
        default=[],
        action="append",
        metavar="TEXT",
        help="compile what is known already, too: all of it, or commands with this text in them (may be given again)",
    )
    parsed = parser.parse_args()
    write_part(PAGE, BEGIN, tables(fill(Cells(RESULTS, parsed.afresh))))
    print(f"{RESULTS.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    run(main)
