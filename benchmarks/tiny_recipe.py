"""Chooses base and learning rate of the demo's configurations, on documents that the demo does not report.

The demo holds out the first 32 conversations of its dataset; this takes a dataset that holds out 64, trains on its
training split, and measures on the last 32:

    eabf prepare --src SHAREGPT --dst data/tiny_select --tokenizer assets/tiny --template vicuna --min-tokens 1250 \
        --max-tokens 2048 --num-conversations 100 --held-out 64 --portion 0.9:1.0 --keep-complete
    python benchmarks/tiny_recipe.py --data data/tiny_select --json benchmarks/results/tiny_recipe.json
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import jax

from eabf_jax import load
from eabf_jax.cli import run
from eabf_jax.evaluation.documents import read_documents
from eabf_jax.evaluation.perplexity import band_losses, position_losses
from eabf_jax.interop.directory import write_json
from eabf_jax.training.recipe import load_config
from eabf_jax.training.trainer import train

BASE_MODEL = "assets/tiny"
EDGES = [0, 256, 512, 1024, 2048]
LEARNING_RATES = (1e-4, 2e-4, 4e-4)
WINDOW = {"pretrained_window": 512}
SCHEMES: tuple[dict[str, Any], ...] = (
    *({"type": "eabf", "base": base, **WINDOW} for base in (5e4, 1e5, 2e5, 5e5)),
    {"type": "eabf", "base": 1e5, "unscaled_layers": 0, **WINDOW},
    {"type": "abf", "base": 1e5},
    {"type": "pi", "factor": 4.0},
    {"type": "yarn", "factor": 4.0, **WINDOW},
    {
        "type": "compose",
        "frequencies": {"type": "ntk_by_parts", "factor": 4.0, **WINDOW},
        "logit_scale": {"type": "eabf", **WINDOW},
    },
)


def bands(directory: str, documents: Any, rope: dict[str, Any] | None = None) -> list[float]:
    """Mean loss by band of the selection documents."""
    model, _ = load(directory, rope=rope, dtype="float32")
    return [round(band.mean, 4) for band in band_losses(position_losses(model, documents, batch_size=4), EDGES)]


def fine_tune(output: Path, data: str, rope: dict[str, Any], learning_rate: float) -> None:
    """The demo's six steps with another scheme or rate."""
    path = output.with_suffix(".json")
    settings = {
        "output": str(output),
        "window": EDGES[-1],
        "rope": rope,
        "model": {"path": BASE_MODEL},
        "data": {"directory": data},
        "recipe": {"learning_rate": learning_rate},
        "compute": {"dtype": "float32", "remat": "none", "microbatch_size": 4},
        "checkpoint": {"every_steps": None},
    }
    path.write_text(json.dumps(settings))
    with contextlib.redirect_stderr(io.StringIO()):
        train(load_config(["--config_path", str(path)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the dataset that holds out 64")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    options = parser.parse_args()
    documents = read_documents(options.data, "held_out", None, None)[32:64]
    made_on = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    rows: list[dict[str, Any]] = [{"rope": None, "learning_rate": None, "bands": bands(BASE_MODEL, documents)}]
    rows += [{"rope": rope, "learning_rate": None, "bands": bands(BASE_MODEL, documents, rope)} for rope in SCHEMES]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (rope, rate) in enumerate((rope, rate) for rope in SCHEMES for rate in LEARNING_RATES):
            output = Path(scratch) / str(number)
            fine_tune(output, options.data, rope, rate)
            rows.append({"rope": rope, "learning_rate": rate, "bands": bands(str(output), documents)})
            print(rows[-1], flush=True)
            write_json(options.json, {**made_on, "edges": EDGES, "seeds": 1, "runs": rows})


run(main)
