"""The model's shape: what it refuses, and how it reads plain values."""

import dataclasses
from typing import Any

import pytest

from eabf_jax.errors import InputError
from eabf_jax.model import LlamaConfig
from eabf_jax.rope import compose, scheme

LAYERS = {"type": "layer_temperature", "pretrained_window": 16, "betas": [0.1, 0.2, 0.3]}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"head_dim": 8, "partial_rotary_factor": 0.4}, "0.4: 3 rotated dimensions of head_dim 8"),
        ({"head_dim": 8, "partial_rotary_factor": 1.5}, "1.5: 12 rotated dimensions of head_dim 8"),
        ({"sliding_window": 0}, "sliding_window 0 is not a positive number"),
        ({"unrotated_layers": (9,)}, "unrotated_layers names layer 9; the model has 0 to"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0 is not a positive number"),
        ({"vocab_size": -1}, "vocab_size -1 is not a positive number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps -1e-05 is negative"),
        ({"rope": compose({"type": "abf"}, LAYERS)}, "rope: 3 betas for 2 layers; each layer needs one"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LlamaConfig(**{**SIZES, **changes})


def test_plain_values_become_typed_ones() -> None:
    config = LlamaConfig.from_fields(
        {**SIZES, "rope": {"type": "abf", "base": 5e5}, "eos_token_id": [2, 3], "rms_norm_eps": 1e-6, "mlp_bias": True}
    )
    assert config == LlamaConfig(
        **SIZES, rope=scheme("abf", base=500_000.0), eos_token_id=(2, 3), rms_norm_eps=1e-6, mlp_bias=True
    )
    hash(config)  # a static argument of jitted functions


def test_rope_may_be_a_scheme_already_and_defaults_to_plain_rotation() -> None:
    assert LlamaConfig.from_fields({**SIZES, "rope": scheme("pi", factor=2.0)}).rope == scheme("pi", factor=2.0)
    assert LlamaConfig.from_fields(SIZES).rope == scheme("default", base=10_000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 32}, "unknown model field 'hiden_size': did you mean 'hidden_size'"),
        ({"vocab_size": "64"}, "'vocab_size' is '64'; an integer is needed"),
        ({"vocab_size": True}, "'vocab_size' is True; an integer is needed"),
        ({"head_dim": None}, "'head_dim' is None; an integer is needed"),
        ({"rms_norm_eps": "0.00001"}, "'rms_norm_eps' is '0.00001'; a finite number"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' is 'no'; true or false"),
        ({"pad_token_id": 0.5}, "'pad_token_id' is 0.5; an integer or null"),
        ({"eos_token_id": ["</s>"]}, "'eos_token_id' is .*; an integer or a list of integers or null"),
        ({"rope": "eabf"}, "'rope' is 'eabf'; a mapping of keys is needed"),
    ],
)
def test_values_of_a_wrong_type_or_name_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LlamaConfig.from_fields({**SIZES, **changes})


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_size_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"model field '{name}' is missing; an integer is needed"):
        LlamaConfig.from_fields({key: value for key, value in SIZES.items() if key != name})


def test_every_field_with_a_default_may_be_left_out() -> None:
    config = LlamaConfig.from_fields(SIZES)
    assert dataclasses.asdict(config) == dataclasses.asdict(LlamaConfig(**SIZES))
