"""A model of three layers, and conversations for it that need no tokenizer."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
import yaml
from flax import nnx
from weights import torch_state

from eabf_jax.data.chat import Encoded
from eabf_jax.data.dataset import DatasetWriter
from eabf_jax.interop.native import save_params, write_model_json
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama
from eabf_jax.parallel.mesh import MeshConfig
from eabf_jax.rope import scheme, to_hf
from eabf_jax.training.recipe import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    ModelConfig,
    RecipeConfig,
    RopeConfig,
    TrainConfig,
)

ROOT = Path(__file__).parents[2]
# Three layers, so that one has the entropy-aware multiplier. Weights have a wide spread: at 0.02 every logit is nearly
# zero, and a mistake in the model would hardly change the loss.
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
WINDOW, RECORDS = 64, 40


def write_records(directory, *, records=RECORDS, longest=WINDOW, metadata=None, seed=0):
    """Writes random conversations of 33 to 64 tokens, with loss on about half of the tokens."""
    rng = np.random.default_rng(seed)
    with DatasetWriter(directory) as writer:
        for number in range(records):
            length = int(rng.integers(longest // 2 + 1, longest + 1))
            tokens = rng.integers(0, SHAPE["vocab_size"], length).astype(np.int32)
            writer.add("train", Encoded(tokens, rng.random(length) < 0.5), f"r{number}")
        writer.finish({"vocab_size": SHAPE["vocab_size"]} if metadata is None else metadata)
    return directory


@pytest.fixture(scope="session")
def model_config():
    """The micro model before extension: 32 tokens, no scaling."""
    return LlamaConfig.from_fields(SHAPE)


@pytest.fixture(scope="session")
def yarn(model_config):
    """The micro model extended to 64 tokens by a scheme that transformers also has."""
    rope = scheme("yarn", factor=2.0, pretrained_window=32)
    return dataclasses.replace(model_config, max_position_embeddings=WINDOW, rope=rope)


@pytest.fixture(scope="session")
def extended(model_config):
    """The micro model extended to 64 tokens by entropy-aware ABF."""
    rope = scheme("eabf", base=50_000.0, pretrained_window=32, unscaled_layers=2)
    return dataclasses.replace(model_config, max_position_embeddings=WINDOW, rope=rope)


@pytest.fixture(scope="session")
def params(model_config):
    """Its parameters as NumPy arrays. Norm scales are random too, so that a missing norm changes the result."""
    rng = np.random.default_rng(3)
    drawn = jax.jit(lambda: Llama(model_config, rngs=nnx.Rngs(7)).parameters())()
    return jax.tree.map_with_path(
        lambda path, leaf: (
            rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) if path[-1].key == "scale" else np.asarray(leaf)
        ),
        drawn,
    )


@pytest.fixture(scope="session")
def base_model(tmp_path_factory, model_config, params):
    """A native model directory without a tokenizer."""
    directory = tmp_path_factory.mktemp("base") / "model"
    directory.mkdir()
    write_model_json(directory, model_config)
    save_params(directory, params)
    return directory


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="session")
def write_dataset():
    return write_records


@pytest.fixture(scope="session")
def run_config(base_model, dataset):
    """Builds the configuration of a micro run of 10 steps: 40 records, batch size 8, 2 epochs."""

    def build(output, **changes):
        parts = {
            "recipe": {"batch_size": 8, "learning_rate": 1e-2},
            "compute": {"dtype": "float32", "attention": "reference", "remat": "none", "loss_chunk": 64},
            "model": {"path": str(base_model)},
            "data": {"directory": str(dataset)},
            "checkpoint": {},
            "mesh": {},
            "rope": {"type": "eabf", "base": 50_000.0, "pretrained_window": 32, "unscaled_layers": 2},
        }
        other = {key: value for key, value in changes.items() if key not in parts}
        mesh = changes.get("mesh") if isinstance(changes.get("mesh"), str) else None
        changed = {key: value for key, value in changes.items() if not isinstance(value, str)}
        values = {name: {**part, **changed.get(name, {})} for name, part in parts.items()}
        rope = values["rope"]
        return TrainConfig(
            **{"output": str(output), "window": WINDOW, **other},
            rope=RopeConfig.get_choice_class(rope.pop("type"))(**rope),
            model=ModelConfig(**values["model"]),
            data=DataConfig(**values["data"]),
            recipe=RecipeConfig(**values["recipe"]),
            compute=ComputeConfig(**values["compute"]),
            mesh=mesh or MeshConfig(**values["mesh"]),
            checkpoint=CheckpointConfig(**values["checkpoint"]),
        )

    return build


@pytest.fixture(scope="session")
def config_file(base_model, dataset):
    """Writes such a configuration to a file, for the command line."""

    def write(path, output, **changes):
        values = {
            "output": str(output),
            "window": WINDOW,
            "rope": {"type": "eabf", "base": 50_000.0, "pretrained_window": 32},
            "model": {"path": str(base_model)},
            "data": {"directory": str(dataset)},
            "recipe": {"batch_size": 8, "learning_rate": 1e-2},
            "compute": {"dtype": "float32", "attention": "reference", "remat": "none", "loss_chunk": 64},
        }
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture(scope="session")
def train_py():
    """The program that a user starts."""
    return (ROOT / "train.py").read_text()


@pytest.fixture(scope="session")
def read_metrics():
    def read(run):
        return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]

    return read


@pytest.fixture(scope="session")
def in_transformers():
    """Builds transformers' LlamaForCausalLM with our parameters, in float32 with plain attention."""

    def build(config, params):
        fields = {name: getattr(config, name) for name in SHAPE} | to_hf(
            config.rope, head_dim=config.head_dim, spelling="rope_parameters"
        )
        reference = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **fields, tie_word_embeddings=False, rms_norm_eps=1e-5, attn_implementation="eager"
            )
        )
        reference.load_state_dict(torch_state(params))
        return reference

    return build


@pytest.fixture(scope="session")
def shape():
    return dict(SHAPE)
