"""Runs passkey and line retrieval for SmolLM2, untouched and under each scheme, before and after training to 32k.

    python convert/from_gguf.py --src SmolLM2-135M-Instruct.Q4_1.gguf --dst models/smollm2-135m
    eabf prepare --src SHAREGPT --dst data/sharegpt_32k_100 --tokenizer models/smollm2-135m --template chatml \
        --min-tokens 10000 --max-tokens 32768 --num-conversations 100
    python benchmarks/retrieval_smollm2.py --output retrieval --time-limit 560

Each scheme is trained by its configuration (configs/smollm2_135m_SCHEME_32k.yaml, which differ only in `rope`) and
exported; then every model answers the same prompts. Existing results are not repeated, so the same command resumes a
run that was interrupted or whose time was up (exit status 3). Further options with a dot (--recipe.batch_size 4) and
--window go to train.py.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from provenance import commit

from eabf_jax.cli import ArgumentParser, run
from eabf_jax.commands.evaluate import measured_on, numbers, tokenizer_of
from eabf_jax.commands.evaluate.retrieval import Retrieval, draw, figures, table
from eabf_jax.console import progress_bar, show, track
from eabf_jax.errors import InputError
from eabf_jax.evaluation import line_retrieval, passkey
from eabf_jax.evaluation.retrieval import Cell, Prompt, measure
from eabf_jax.interop.directory import read_json_object, write_json
from eabf_jax.interop.loading import load, read_config
from eabf_jax.parallel.mesh import gpu_defaults

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"eabf": "EABF", "yarn": "YaRN", "abf": "ABF", "pi": "PI"}
UNFINISHED = 3


class Clock:
    """The remaining time."""

    def __init__(self, limit: float | None):
        """Starts the clock.

        Args:
          limit: seconds; None for no end.
        """
        self._end = None if limit is None else time.monotonic() + limit

    @property
    def left(self) -> float | None:
        """Remaining seconds, or None."""
        return None if self._end is None else self._end - time.monotonic()

    def check(self, needed: float, what: str) -> None:
        """Ends the program if there is no time for the next part.

        Args:
          needed: seconds that it needs.
          what: its name.
        """
        if self.left is not None and self.left < needed:
            print(f"time is up before {what}; run the same command to continue", flush=True)
            sys.exit(UNFINISHED)


def train(scheme: str, arguments: argparse.Namespace, overrides: list[str], clock: Clock) -> Path:
    """Trains and exports one scheme; skips either part if it is done.

    Args:
      scheme: its name in the configurations' names.
      arguments: the command line.
      overrides: further options for train.py.
      clock: when the time is up, the run stops after a step with a checkpoint, and the program ends.

    Returns:
      The directory of the exported model.
    """
    exported = arguments.output / "exported" / scheme
    if exported.is_dir():
        return exported
    clock.check(30, f"training {NAMES[scheme]}")
    output = arguments.output / "runs" / scheme
    command = [
        *(sys.executable, str(ROOT / "train.py"), "--config_path", arguments.config.format(scheme)),
        *("--model.path", arguments.base, "--data.directory", arguments.data, "--output", str(output), *overrides),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(command, env=environment) as process:
        try:
            # After its current step, the process still writes a checkpoint.
            status = process.wait(None if clock.left is None else max(clock.left - 20, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            clock.check(float("inf"), f"the end of training {NAMES[scheme]}")
    if status:
        raise InputError(f"training {NAMES[scheme]} failed (exit status {status}); its last lines say why")
    to_hf = [sys.executable, str(ROOT / "convert/to_hf.py"), "--src", str(output), "--dst", str(exported)]
    subprocess.run(to_hf, env={**environment, "JAX_PLATFORMS": "cpu"}, check=True)
    return exported


def make_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """Makes the prompts of the tasks; only the passkey's have a depth."""
    tokenizer = tokenizer_of(arguments.base)
    chat, lengths = arguments.chat_template, arguments.lengths
    made = []
    if "passkey" in arguments.tasks:
        made += passkey.prompts(tokenizer, lengths, arguments.depths, arguments.samples, arguments.seed, chat=chat)
    if "line-retrieval" in arguments.tasks:
        made += line_retrieval.prompts(tokenizer, lengths, arguments.line_samples, arguments.seed, chat=chat)
    return made


def evaluate(
    label: str, directory: str, rope: Any, prompts: list[Prompt], settings: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Scores one model on all prompts and writes the results.

    Args:
      label: the model's name.
      directory: the model's directory.
      rope: a scheme that replaces the model's own, or None.
      prompts: from `make_prompts`.
      settings: how the prompts were made, and how the model computes.
      path: the file to write.

    Returns:
      The content of the file.
    """
    begun = time.perf_counter()
    model, _ = load(directory, rope=rope, dtype=settings["dtype"])
    with progress_bar() as bar:
        advance = track(bar, label, len(prompts))
        cells = measure(model, prompts, batch_size=settings["batch_size"], progress=advance)
    found = {
        "label": label,
        "settings": settings,
        "seconds": time.perf_counter() - begun,
        **measured_on(),
        "commit": commit(),
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
    write_json(path, found)
    return found


def report(output: Path, parts: list[dict[str, Any]], pretrained_window: int) -> None:
    """Writes figures and pictures of the tasks, and shows their tables.

    Args:
      output: the folder for them.
      parts: from `evaluate`, one per model.
      pretrained_window: the base's window, in tokens.
    """
    names = ("settings", "device", "devices", "versions", "command", "date", "commit")
    about: dict[str, Any] = {name: parts[0].get(name) for name in names}
    cells = {part["label"]: [Cell(**cell) for cell in part["cells"]] for part in parts}
    for task in about["settings"]["tasks"]:
        name, title = task.replace("-", "_"), task.replace("-", " ")
        rows = {
            label: [cell for cell in row if (cell.depth is None) == (task == "line-retrieval")]
            for label, row in cells.items()
        }
        found = Retrieval(title, rows, pretrained_window, "")
        grid = table(found)
        show(grid)
        write_json(output / f"{name}.json", {"task": title, **about, **figures(found), "table": grid.plain()})
        draw(found, output / f"{name}.png")
        print(f"figures and picture: {output / name}.{{json,png}}")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/smollm2-135m", help="the model to extend (default: %(default)s)")
    parser.add_argument("--data", default="data/sharegpt_32k_100", help="dataset to train on (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, models, figures and pictures")
    parser.add_argument(
        "--config",
        default=str(ROOT / "configs/smollm2_135m_{}_32k.yaml"),
        help="configurations, {} standing for the scheme (default: %(default)s)",
    )
    parser.add_argument("--schemes", default="pi,abf,yarn,eabf", help="which of them (default: %(default)s)")
    parser.add_argument("--tasks", default="passkey,line-retrieval", help="which of the two (default: %(default)s)")
    parser.add_argument("--lengths", default="4096,8192,16384,32768", help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--depths", default="0,25,50,75,100", help="of the passkey, percent (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=10, help="passkey prompts of a cell (default: %(default)s)")
    parser.add_argument("--line-samples", type=int, default=50, help="records of a length (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument(
        "--no-chat-template", dest="chat_template", action="store_false", help="give prompts as they are"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the evaluation (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts read at a time (default: %(default)s)")
    parser.add_argument(
        "--time-limit", type=float, help="seconds after which to stop and be given again (default: none)"
    )
    arguments, overrides = parser.parse_known_args()
    clock = Clock(arguments.time_limit)
    schemes = arguments.schemes.split(",")
    if not set(schemes) <= set(NAMES):
        raise InputError(f"--schemes {arguments.schemes}: some of {','.join(NAMES)} are needed")
    arguments.tasks = arguments.tasks.split(",")
    if not set(arguments.tasks) <= {"passkey", "line-retrieval"}:
        raise InputError(f"--tasks {','.join(arguments.tasks)}: passkey, line-retrieval or both are needed")
    arguments.lengths = numbers("--lengths", arguments.lengths, "lengths such as 4096,8192")
    arguments.depths = numbers("--depths", arguments.depths, "depths such as 0,50,100")
    window = read_config(arguments.base).max_position_embeddings
    # Errors in the requested prompts are reported before hours of training.
    ends = {"lengths": [min(arguments.lengths), max(arguments.lengths)], "samples": 1, "line_samples": 1}
    make_prompts(argparse.Namespace(**{**vars(arguments), **ends}))
    # Runs before this process uses JAX, because the training processes need the device.
    exported = {scheme: train(scheme, arguments, overrides, clock) for scheme in schemes}
    gpu_defaults()
    models: list[tuple[str, str, Any]] = [("untouched", arguments.base, None)]
    models += [(f"{NAMES[name]}, untrained", arguments.base, read_config(path).rope) for name, path in exported.items()]
    models += [(f"{NAMES[name]}, trained", str(path), None) for name, path in exported.items()]
    names = ("tasks", "lengths", "depths", "samples", "line_samples", "seed", "chat_template", "dtype", "batch_size")
    settings = {name: getattr(arguments, name) for name in names} | {"training": overrides}
    (arguments.output / "models").mkdir(parents=True, exist_ok=True)
    prompts: list[Prompt] = []
    parts: list[dict[str, Any]] = []
    longest = 0.0
    for label, directory, rope in reversed(models):
        path = arguments.output / "models" / f"{label.replace(', ', '_').lower()}.json"
        if path.is_file():
            part = read_json_object(path)
            if part["settings"] != settings:
                raise InputError(f"{path} was measured with other settings; name another --output, or remove the file")
        else:
            clock.check(longest, f"evaluating {label}")
            prompts = prompts or make_prompts(arguments)
            part = evaluate(label, directory, rope, prompts, settings, path)
            longest = max(longest, part["seconds"])
        parts.insert(0, part)
    report(arguments.output, parts, window)


if __name__ == "__main__":
    run(main)
