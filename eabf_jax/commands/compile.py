"""`eabf compile`: what a train step, evaluation or generation will cost, as a table."""

import argparse
from collections.abc import Mapping
from typing import Any

from eabf_jax.commands.options import write_figures
from eabf_jax.console import Grid, show
from eabf_jax.errors import InputError
from eabf_jax.evaluation.compile import compile_for as compile_inference
from eabf_jax.hardware import DEVICES, GIB
from eabf_jax.parallel.mesh import gpu_defaults
from eabf_jax.parallel.topology import tpu_slice
from eabf_jax.training.compile import compile_for, predict
from eabf_jax.training.recipe import load_config

EPILOG = """\
Without --topology: predicts the memory of the step by part, from shapes alone, and chooses the `auto` settings.
With --topology: compiles the step with the TPU compiler (pip install libtpu; no TPU is needed) and reads the memory
from the program. --for evaluate compiles the scoring of a window instead, and --for generate compiles the reading of
a prompt and the decode loop up to a window's end. `eabf train --help` lists the keys of the configuration.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's own options; its other arguments are configuration keys."""
    parser.usage = "%(prog)s --config_path FILE [--topology SLICE | --device NAME --devices N] [--dotted.key VALUE ...]"
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    parser.set_defaults(configuration_keys=[])
    add = parser.add_argument
    add("--config_path", metavar="FILE", required=True, help="the run's configuration")
    add(
        "--for",
        dest="purpose",
        choices=("train", "evaluate", "generate"),
        default="train",
        help="what to compile for a --topology (default: the train step)",
    )
    add("--topology", metavar="SLICE", help="TPU slice to compile for: v4-8 to v4-512, v5e-8, v5p-8, …")
    add("--device", metavar="NAME", help=f"plan for {', '.join(DEVICES)}; default: this machine")
    add("--devices", metavar="N", type=int, help="number of devices; default: this machine's, or 1 with --device")
    add("--json", metavar="FILE", help="also write the figures to this file")


def run(arguments: argparse.Namespace) -> None:
    """Predicts or compiles, and prints the figures."""
    gpu_defaults()
    config = load_config(["--config_path", arguments.config_path, *arguments.configuration_keys])
    if arguments.topology is None and arguments.purpose != "train":
        raise InputError(f"--for {arguments.purpose} compiles for a TPU slice: name it with --topology")
    if arguments.topology is None:
        figures = predict(config, arguments.device, arguments.devices)
    elif arguments.device or arguments.devices:
        raise InputError("--topology already names the devices: leave out --device and --devices")
    elif arguments.purpose == "train":
        figures = compile_for(config, tpu_slice(arguments.topology))
    else:
        figures = compile_inference(arguments.purpose, config, tpu_slice(arguments.topology))
    show(table(figures))
    write_figures(arguments, figures)


def table(figures: Mapping[str, Any]) -> Grid:
    """Lays out the figures as a table."""
    if "topology" in figures:
        where = f"{figures['topology']} ({figures['chips']} chips)"
        told, by_part, total, limit = "compiled", "hbm_gib_by_part", "hbm_gib_per_chip", "hbm_gib_available"
    else:
        where = f"{figures['devices']} x {figures['device']}"
        told, by_part, total, limit = "predicted", "gib_by_part", "gib_per_device", "device_gib"
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1) or "one device"
    what = {"evaluate": "evaluation", "generate": "generation"}.get(figures.get("for", ""), "train step")
    shown = Grid([""], [""], title=f"{what} on {where}: {mesh}, window {figures['window']:,}")
    for key in ("rows", "microbatch_size", "remat", "optimizer_memory", "gather"):
        if key in figures:
            shown.add_row(key if key == "rows" else f"compute.{key}", str(figures[key]))
    for name, size in figures[by_part].items():
        shown.add_row(name, f"{size:.2f} GiB")
    shown.add_row(f"{told}, of {figures[limit]:.2f} GiB", f"{figures[total]:.2f} GiB", style="bold")
    for name, size in figures.get("host_gib_by_part", {}).items():
        shown.add_row(f"{name} in host memory", f"{size:.2f} GiB")
    if "estimate" in figures:
        shown.add_row("model FLOPs per chip and step", f"{figures['model_flops_per_chip']:.3e}")
        shown.add_row("recomputed FLOPs", f"{figures['recomputed_flops_per_chip']:.3e}")
        for kind, size in figures["collective_bytes_per_chip"].items():
            shown.add_row(f"{kind}, sent by a chip", f"{size / GIB:.2f} GiB")
        for name, value in figures["estimate"].items():
            shown.add_row(f"estimate: {name.replace('_', ' ')}", f"{value:,.3f}" if value < 100 else f"{value:,.0f}")
    return shown
