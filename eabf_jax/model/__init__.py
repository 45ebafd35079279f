"""LLaMA in Flax NNX: the shape, the modules and the attention backends."""

from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama

__all__ = ["Llama", "LlamaConfig"]
