"""Random weights for tests, and the same weights under transformers' names."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from eabf_jax.model import Llama, LlamaConfig


def random_params(config: LlamaConfig, seed: int = 0) -> dict[str, Any]:
    """Draws weights that make attention sharp and logits of order 1; norms and biases are not trivial either."""
    generator = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        normal = generator.normal(size=leaf.shape).astype(np.float32)
        if kind == "kernel":
            return normal * np.float32(1.5 / math.sqrt(leaf.shape[-2]))
        return {"scale": 1 + 0.2 * normal, "bias": 0.3 * normal, "embedding": normal}[kind].astype(np.float32)

    return jax.tree.map_with_path(draw, Llama.abstract(config).parameters())


def torch_state(params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Converts our stacked [in, out] tree to transformers' state: one tensor per layer, kernels [out, in]."""
    state = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
    }
    if "lm_head" in params:
        state["lm_head.weight"] = params["lm_head"]["kernel"].T
    layers = params["layers"]
    for index in range(layers["input_layernorm"]["scale"].shape[0]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{index}.{norm}.weight"] = layers[norm]["scale"][index]
        for part in ("self_attn", "mlp"):
            for name, tensors in layers[part].items():
                state[f"model.layers.{index}.{part}.{name}.weight"] = tensors["kernel"][index].T
                if "bias" in tensors:
                    state[f"model.layers.{index}.{part}.{name}.bias"] = tensors["bias"][index]
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
