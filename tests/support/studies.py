"""A micro model, conversations for it, and studies of it whose cells take about a second."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from flax import nnx

from eabf_jax.data.chat import Encoded
from eabf_jax.data.dataset import DatasetWriter
from eabf_jax.interop.native import save_params, write_model_json
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama

SHAPE = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 16, "initializer_range": 0.3,
}  # fmt: skip
WINDOW, BEYOND = 32, 64


def write_records(directory: Path, names: dict[str, list[str]], length: int, seed: int = 0) -> Path:
    """Writes random conversations with these ids by split."""
    random = np.random.default_rng(seed)
    with DatasetWriter(directory) as writer:
        for split, ids in names.items():
            for identifier in ids:
                tokens = random.integers(0, SHAPE["vocab_size"], length).astype(np.int32)
                writer.add(split, Encoded(tokens, np.ones(length, bool)), identifier)
        writer.finish({"vocab_size": SHAPE["vocab_size"]})
    return directory


def write_inputs(folder: Path) -> Path:
    """Writes `model`, `train`, `more` and `test` datasets, and `run.yaml`, the configuration of a run of one step."""
    config = LlamaConfig.from_fields(SHAPE)
    (folder / "model").mkdir()
    write_model_json(folder / "model", config)
    save_params(folder / "model", jax.jit(lambda: Llama(config, rngs=nnx.Rngs(7)).parameters())())
    write_records(folder / "train", {"train": [f"c{n}#0" for n in range(16)], "held_out": ["h0#0", "h1#0"]}, WINDOW, 1)
    write_records(folder / "more", {"train": [f"m{n}#0" for n in range(8)]}, WINDOW, 2)
    write_records(folder / "test", {"held_out": ["c1#0", *(f"t{n}#0" for n in range(6))]}, BEYOND, 3)
    run = {
        "output": "unused",
        "window": WINDOW,
        "rope": {"type": "eabf", "base": 20_000, "pretrained_window": 16},
        "model": {"path": str(folder / "model")},
        "data": {"directory": str(folder / "train")},
        "recipe": {"batch_size": 8, "epochs": 1, "learning_rate": 1.0e-2},
        "compute": {"dtype": "float32", "attention": "reference", "remat": "none"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def study_values(inputs: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Returns a study of two methods, without training and on eight conversations, with one seed."""
    values = {
        "output": str(output),
        "config": str(inputs / "run.yaml"),
        "methods": {"PI": {"rope": {"type": "pi", "base": 10_000, "factor": 2}}, "EABF": {}},
        "data": {"0": [], "8": [{"directory": str(inputs / "train"), "samples": 8}]},
        "evaluate": {
            "documents": {"directory": str(inputs / "test"), "count": 5},
            "windows": [16, WINDOW, BEYOND],
            "measures": {"loss": {}},
        },
    }
    return {**values, **changes}


def write_study(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def records(output: Path) -> dict[str, dict[str, Any]]:
    """Reads the files of finished cells by name."""
    return {path.stem: json.loads(path.read_text()) for path in (output / "cells").glob("[!.]*__[0-9].json")}
