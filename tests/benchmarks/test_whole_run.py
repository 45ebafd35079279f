"""The parts of a whole run add up to its time, and the model that it starts from is complete."""

import dataclasses

import numpy as np
import pytest

from eabf_jax import load
from eabf_jax.errors import InputError
from eabf_jax.interop.loading import load_parameters
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import flatten

SHAPE = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}  # fmt: skip


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("whole_run")


def test_the_parts_add_up_to_the_whole(program):
    train = {"seconds": 400.0, "host_gib": 90.4, "ended": 1_000_400.0}
    export = {"seconds": 50.0, "host_gib": 2.0, "ended": 1_000_460.0}
    line = {"tokens_per_second": 1.0, "mfu": None, "loss": 10.4}
    metrics = [{"seconds": 60.0, "compile_seconds": 12.0, **line}, *({"seconds": 50.0, **line} for _ in range(5))]
    found = program.figures(train, export, metrics, last=1_000_370.0)
    assert found["total_seconds"] == 450.0
    assert (found["steps_seconds"], found["after_last_step_seconds"]) == (310.0, 30.0)
    # Compilation is part of the time before the first step.
    assert (found["before_first_step_seconds"], found["compile_seconds"]) == (60.0, 12.0)
    parts = ("before_first_step_seconds", "steps_seconds", "after_last_step_seconds", "export_seconds")
    assert sum(found[part] for part in parts) == found["total_seconds"]
    assert found["host_gib"] == 90.4


def test_the_model_on_disk_is_a_converted_one(program, tmp_path):
    config = LlamaConfig.from_fields(SHAPE)
    program.random_model(config, tmp_path / "model", program.ROOT / "assets/tiny")
    model, tokenizer = load(tmp_path / "model")
    assert tokenizer is not None and model.config == dataclasses.replace(config, rope=model.config.rope)
    leaves = dict(flatten(load_parameters(tmp_path / "model")[1]))
    assert {str(leaf.dtype) for leaf in leaves.values()} == {"bfloat16"}
    kernel = np.asarray(leaves["layers", "mlp", "up_proj", "kernel"], np.float32)
    assert kernel.std() == pytest.approx(0.02, rel=0.05)  # of 4,608 numbers: off by about 1 %
    assert (np.asarray(leaves["norm", "scale"]) == 1).all()


def test_a_failed_program_ends_the_measurement(program):
    import sys

    with pytest.raises(InputError, match="-c ended with exit status 3"):
        program.timed([sys.executable, "-c", "raise SystemExit(3)"])
