"""transformers' tiny models of every architecture."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
# For each model_type, keys that switch on what the architecture may have.
FULL: Mapping[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "mistral": {"sliding_window": 5, "head_dim": 12},
    # head_dim is needed: transformers cannot build this model without it.
    "ministral": {"sliding_window": 5, "head_dim": 8, "layer_types": LAYER_TYPES},
    "ministral3": {"sliding_window": 7, "head_dim": 12,
                   "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "llama_4_scaling_beta": 0.3,
                                       "original_max_position_embeddings": 8}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 12, "attention_bias": True, "layer_types": LAYER_TYPES, "use_sliding_window": True,
              "sliding_window": 7},
    "smollm3": {"no_rope_layer_interval": 2, "attention_bias": True, "use_sliding_window": True, "sliding_window": 7},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 7},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3,
                "logits_scaling": 2.5, "mlp_bias": True},
    "olmo2": {"attention_bias": True},
    "seed_oss": {"head_dim": 8, "attention_bias": False, "attention_out_bias": True},
}  # fmt: skip
# Likewise, for those made of the same features as others.
SAME: Mapping[str, dict[str, Any]] = {
    "internlm3": {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "iquestcoder": {"head_dim": 12, "attention_bias": True},
    "cwm": {"head_dim": 12, "mlp_bias": True, "sliding_window": 5},
    "exaone4": {"sliding_window": 7, "sliding_window_pattern": 2},
}
# Without the padding token 0, whose embedding has no gradient in torch.
TOKENS = np.random.default_rng(0).integers(1, 40, (2, 24))


def in_transformers(kind: str, seed: int = 0, **keys: Any) -> Any:
    """Builds transformers' model with weights that make attention sharp and no norm or bias trivial."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy({**SIZES, **keys}))  # which it changes
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()
