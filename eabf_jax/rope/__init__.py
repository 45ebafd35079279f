"""Rotary schemes: how positions turn into angles, and how attention logits grow past the pretrained window."""

import eabf_jax.rope.named as _named  # noqa: F401 - fills the table
from eabf_jax.rope.huggingface import from_hf, needs_remote_code, to_hf
from eabf_jax.rope.registry import HFSpelling, import_schemes, register
from eabf_jax.rope.schemes import Scheme, compose, parameters_of, scheme, scheme_names

__all__ = [
    "HFSpelling",
    "Scheme",
    "compose",
    "from_hf",
    "import_schemes",
    "needs_remote_code",
    "parameters_of",
    "register",
    "scheme",
    "scheme_names",
    "to_hf",
]
