"""A small model for all tests, so that its programs are compiled once."""

import pytest
from flax import nnx
from transformers import LlamaConfig as HfConfig
from transformers import LlamaForCausalLM
from weights import torch_state

from eabf_jax.model import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=62,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    tie_word_embeddings=True,
    initializer_range=0.3,
)


@pytest.fixture(scope="session")
def model() -> Llama:
    return Llama(CONFIG, rngs=nnx.Rngs(1), attention="reference")


@pytest.fixture(scope="session")
def reference(model: Llama) -> LlamaForCausalLM:
    """The same weights in transformers."""
    reference = LlamaForCausalLM(
        HfConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.hidden_size,
            intermediate_size=CONFIG.intermediate_size,
            num_hidden_layers=CONFIG.num_hidden_layers,
            num_attention_heads=CONFIG.num_attention_heads,
            num_key_value_heads=CONFIG.num_key_value_heads,
            head_dim=CONFIG.head_dim,
            rms_norm_eps=CONFIG.rms_norm_eps,
            tie_word_embeddings=True,
        )
    ).eval()
    missing, unexpected = reference.load_state_dict(torch_state(model.parameters()), strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    reference.tie_weights()
    return reference
