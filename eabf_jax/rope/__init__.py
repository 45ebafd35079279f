"""Rotary schemes: how positions turn into angles, and how attention logits grow past the pretrained window."""

from eabf_jax.rope.schemes import (
    Scheme,
    compose,
    from_hf,
    needs_remote_code,
    parameters_of,
    scheme,
    scheme_names,
    to_hf,
)

__all__ = [
    "Scheme",
    "compose",
    "from_hf",
    "needs_remote_code",
    "parameters_of",
    "scheme",
    "scheme_names",
    "to_hf",
]
