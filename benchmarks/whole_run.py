"""Times the recipe as a user runs it: `python train.py` on a converted model, then `python convert/to_hf.py`.

train_step.py times only the optimizer steps. This program times everything from the start of one program to the end of
the other: starting Python and JAX, reading weights and conversations from disk, compilation, the steps, checkpoints,
the final save, and the export. The model has random weights of the configuration's shape, on disk in bfloat16 as
`convert/from_hf.py` writes them; creating it is not timed.

    python benchmarks/whole_run.py --config_path configs/llama2_7b_eabf_16k.yaml --data data/sharegpt_16k_100 \
        --tokenizer assets/tiny --scratch /tmp/whole --json OUT.json

Any key of the configuration may follow, as for train.py.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from provenance import ROOT, record

from eabf_jax.cli import ArgumentParser, run
from eabf_jax.errors import InputError
from eabf_jax.interop import native
from eabf_jax.interop.directory import write_json
from eabf_jax.interop.tokenizer import copy_tokenizer_files
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import nest, parameters
from eabf_jax.training.recipe import load_config
from eabf_jax.training.trainer import shape_config

GIB = 2**30


def random_model(config: LlamaConfig, directory: Path, tokenizer: Path) -> None:
    """Writes a native model directory with random bfloat16 weights, the same in all layers.

    Args:
      config: the model's shape.
      directory: the directory to create.
      tokenizer: a directory whose tokenizer files are copied beside the weights.
    """
    generator, leaves = np.random.default_rng(0), {}
    for entry in parameters(config):
        if entry.path[-1] == "scale":
            drawn = np.ones(entry.single, ml_dtypes.bfloat16)
        else:
            drawn = (0.02 * generator.standard_normal(entry.single, np.float32)).astype(ml_dtypes.bfloat16)
        leaves[entry.path] = drawn if entry.layers is None else np.broadcast_to(drawn, entry.shape).copy()
    directory.mkdir(parents=True)
    native.save_params(directory, nest(leaves))
    copy_tokenizer_files(tokenizer, directory)
    native.write_model_json(directory, config, dtype="bfloat16")


def timed(command: list[str]) -> dict[str, Any]:
    """Runs a program to its end.

    Args:
      command: program and arguments.

    Returns:
      `seconds`, peak `host_gib`, and `ended` on the clock of time.time().
    Raises:
      InputError: the program failed.
    """
    print("$", " ".join(command), flush=True)
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise InputError(f"{command[1]} ended with exit status {os.waitstatus_to_exitcode(status)}")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "host_gib": usage.ru_maxrss * 1024 / GIB, "ended": time.time()}


def figures(
    train: dict[str, Any], export: dict[str, Any], metrics: list[dict[str, Any]], last: float
) -> dict[str, Any]:
    """Splits the time of a run into its parts.

    Args:
      train: from `timed`.
      export: from `timed`.
      metrics: the lines of the run's metrics.jsonl.
      last: when the last line was written, on the clock of time.time().

    Returns:
      Seconds of each part; they add up to `total_seconds`.
    """
    steps = [line["seconds"] for line in metrics]
    after = train["ended"] - last
    return {
        "total_seconds": train["seconds"] + export["seconds"],
        "train_seconds": train["seconds"],
        "before_first_step_seconds": train["seconds"] - sum(steps) - after,
        "compile_seconds": metrics[0]["compile_seconds"],
        "step_seconds": steps,
        "steps_seconds": sum(steps),
        "after_last_step_seconds": after,
        "export_seconds": export["seconds"],
        "host_gib": train["host_gib"],
        "tokens_per_second": [line["tokens_per_second"] for line in metrics],
        "mfu": [line["mfu"] for line in metrics],
        "losses": [line["loss"] for line in metrics],
    }


def planned(config_path: str, overrides: list[str], report: Path) -> dict[str, Any]:
    """Returns the prediction of `eabf compile` from a separate process, because this one must not use the device."""
    command = [sys.executable, "-m", "eabf_jax", "compile", "--config_path", config_path, "--json", str(report)]
    subprocess.run([*command, *overrides], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def main() -> None:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config_path", required=True, help="the configuration, as for train.py")
    parser.add_argument("--data", type=Path, required=True, help="a dataset of `eabf prepare`")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the tokenizer that made it")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for model, run and export; must not exist")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    options, overrides = parser.parse_known_args()
    config = load_config(["--config_path", options.config_path, *overrides])
    if options.scratch.exists():
        raise InputError(f"--scratch {options.scratch} exists; name a folder that does not")
    model, output, exported = (options.scratch / name for name in ("model", "run", "exported"))
    random_model(shape_config(config), model, options.tokenizer)
    keys = {"model.path": model, "data.directory": options.data, "output": output}
    overrides += [word for key, value in keys.items() for word in (f"--{key}", str(value.absolute()))]
    plan = planned(options.config_path, overrides, options.scratch / "plan.json")
    train = timed([sys.executable, "train.py", "--config_path", options.config_path, *overrides])
    last = (output / native.METRICS_FILE).stat().st_mtime
    metrics = [json.loads(line) for line in (output / native.METRICS_FILE).read_text().splitlines()]
    export = timed(
        [sys.executable, "convert/to_hf.py", "--src", str(output), "--dst", str(exported), "--dtype", "bfloat16"]
    )
    report = {
        **record("whole_run"),
        "name": Path(options.config_path).stem,
        "window": config.window,
        "sequences": config.recipe.batch_size,
        "plan": plan,
        "planned_host_gib": sum(plan["host_gib_by_part"].values()),
        **figures(train, export, metrics, last),
    }
    write_json(options.json, report)
    print(json.dumps({key: report[key] for key in report if key.endswith("seconds") or "host" in key}, indent=2))
    shutil.rmtree(options.scratch)


if __name__ == "__main__":
    run(main)
