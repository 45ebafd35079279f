"""Generation: prompts in, text out, with a cache of keys and values."""

from eabf_jax.inference.generate import Completion, Generator
from eabf_jax.inference.sampling import Sampling

__all__ = ["Completion", "Generator", "Sampling"]
