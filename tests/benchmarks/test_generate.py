"""The generation benchmark on a shape that a CPU runs, and its count of FLOPs."""

import jax
import pytest

from eabf_jax.errors import InputError
from eabf_jax.model import Llama, LlamaConfig


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("generate")


def test_flops_are_those_of_the_products(program):
    """Every matrix once a token, but the head's once; half of a square of logits and of weighted values a head."""
    shape, length = program.SHAPES["micro"], 96
    parameters = Llama.abstract(LlamaConfig.from_fields(shape)).parameters()
    matrices = sum(leaf.size for leaf in jax.tree.leaves(parameters["layers"]) if leaf.ndim == 3)
    head = parameters["lm_head"]["kernel"].size
    attention = 2 * 2 * shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"] * length**2 / 2
    assert program.prefill_flops(shape, length) == 2 * matrices * length + 2 * head + attention


def test_one_token_has_no_speed(program, monkeypatch):
    monkeypatch.setattr("sys.argv", ["generate", "--shape", "micro", "--new", "1"])
    with pytest.raises(InputError, match="--new 1: at least 2 are needed"):
        program.main()


def test_our_figures(program):
    figures = program.ours(program.SHAPES["micro"], {"short": {"batch": 2, "prompt": 5, "new": 20}}, "int8", 16)
    (run,) = figures["runs"].values()
    assert (run["batch"], run["prompt"], run["new"]) == (2, 5, 20)
    assert run["compile_seconds"] > 0 and run["first_token_seconds"] > 0
    assert run["tokens_per_second"] > 0 and figures["device"] == "cpu"
    assert 0 <= run["worst_choice"] < 0.1  # int8 keys and values; a token at random would be several below
