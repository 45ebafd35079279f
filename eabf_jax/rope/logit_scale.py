"""Multipliers of the attention logits, one pure function per rule.

A rule takes the 0-based positions of the queries, integers of any shape, and the 0-based layer index, which may be a
traced integer. Its own parameters follow by keyword, which are the scheme's parameters in a config file. It returns one
multiplier per query, float32, of the shape of `positions`.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int


def none(positions: Int[Array, " *shape"], layer: int | Int[Array, ""]) -> Float32[Array, " *shape"]:
    """Returns ones, which leave every logit unchanged."""
    del layer
    return jnp.ones(jnp.shape(positions), jnp.float32)


def entropy_aware(
    positions: Int[Array, " *shape"],
    layer: int | Int[Array, ""],
    *,
    pretrained_window: int,
    unscaled_layers: int = 2,
) -> Float32[Array, " *shape"]:
    """Computes the entropy-aware multiplier t = max(ln i / ln c, 1) for the query at 1-based position i.

    Within the pretrained window, and in the first `unscaled_layers` layers, t is exactly 1.

    Args:
      pretrained_window: c in tokens, the window before the extension.
      unscaled_layers: number of first layers that keep t = 1; 2 in the paper, in effect 0 in the released code.

    Source: Zhang et al. 2024, section 3 (entropy-aware ABF).
    """
    # ln i / ln c = 1 + ln(1 + (i - c)/c) / ln c: only the small second term is rounded, and i = c gives exactly 1.
    excess = jnp.maximum(jnp.asarray(positions).astype(jnp.float32) - np.float32(pretrained_window - 1), 0.0)
    multiplier = 1.0 + jnp.log1p(excess / np.float32(pretrained_window)) * np.float32(1.0 / math.log(pretrained_window))
    return jnp.where(jnp.asarray(layer) < unscaled_layers, jnp.float32(1.0), multiplier)
