"""`eabf compile`: what a train step will cost, as a table."""

import argparse
from collections.abc import Mapping
from typing import Any

from eabf_jax.commands.options import write_figures
from eabf_jax.console import Grid, show
from eabf_jax.errors import InputError
from eabf_jax.hardware import DEVICES, GIB
from eabf_jax.parallel.mesh import gpu_defaults
from eabf_jax.parallel.topology import tpu_slice
from eabf_jax.training.compile import compile_for, predict
from eabf_jax.training.recipe import load_config

EPILOG = """\
Without --topology: predicts the memory of the step by part, from shapes alone, and settles what is `auto`.
With --topology: compiles the very step with the TPU compiler (pip install libtpu; no TPU is needed) and reads the
memory from the program. `eabf train --help` lists the keys of the configuration.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's own options; its other arguments are configuration keys."""
    parser.usage = "%(prog)s --config_path FILE [--topology SLICE | --device NAME --devices N] [--dotted.key VALUE ...]"
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.allow_abbrev = False
    parser.set_defaults(configuration_keys=[])
    parser.add_argument("--config_path", metavar="FILE", required=True, help="the run's configuration")
    parser.add_argument("--topology", metavar="SLICE", help="TPU slice to compile for: v4-8 to v4-512, v5e-8, v5p-8, …")
    parser.add_argument("--device", metavar="NAME", help=f"plan for {', '.join(DEVICES)}; default: this machine")
    parser.add_argument("--devices", metavar="N", type=int, help="how many of them; default: all that are available")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")


def run(arguments: argparse.Namespace) -> None:
    """Predicts or compiles, and shows the figures."""
    gpu_defaults()
    config = load_config(["--config_path", arguments.config_path, *arguments.configuration_keys])
    if arguments.topology is None:
        figures = predict(config, arguments.device, arguments.devices)
    elif arguments.device or arguments.devices:
        raise InputError("--topology names the devices already: leave out --device and --devices")
    else:
        figures = compile_for(config, tpu_slice(arguments.topology))
    show(table(figures))
    write_figures(arguments, figures)


def table(figures: Mapping[str, Any]) -> Grid:
    """The figures for people."""
    compiled = "topology" in figures
    where = (
        f"{figures['topology']} ({figures['chips']} chips)"
        if compiled
        else f"{figures['devices']} x {figures['device']}"
    )
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1) or "one device"
    shown = Grid([""], [""], title=f"train step on {where}: {mesh}, window {figures['window']:,}")
    by_part, total = ("hbm_gib_by_part", "hbm_gib_per_chip") if compiled else ("gib_by_part", "gib_per_device")
    limit = figures["hbm_gib_available" if compiled else "device_gib"]
    for key in ("microbatch_size", "remat", *(() if compiled else ("optimizer_memory", "gather"))):
        shown.add_row(f"compute.{key}", str(figures[key]))
    for name, size in figures[by_part].items():
        shown.add_row(name, f"{size:.2f} GiB")
    told = "compiled" if compiled else "predicted"
    shown.add_row(f"{told}, of {limit:.2f} GiB", f"{figures[total]:.2f} GiB", style="bold")
    for name, size in figures.get("host_gib_by_part", {}).items():
        shown.add_row(f"{name} in host memory", f"{size:.2f} GiB")
    if compiled:
        shown.add_row("model FLOPs per chip and step", f"{figures['model_flops_per_chip']:.3e}")
        shown.add_row("recomputed FLOPs", f"{figures['recomputed_flops_per_chip']:.3e}")
        for kind, size in figures["collective_bytes_per_chip"].items():
            shown.add_row(f"{kind}, sent by a chip", f"{size / GIB:.2f} GiB")
        for name, value in figures["estimate"].items():
            shown.add_row(f"estimate: {name.replace('_', ' ')}", f"{value:,.3f}" if value < 100 else f"{value:,.0f}")
    return shown
