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
      unscaled_layers: number of first layers that keep t = 1; 2 in the paper, in effect 0 in the released code and in
        Qwen's `use_logn_attn`.

    Source: Zhang et al. 2024, section 3 (entropy-aware ABF).
    """
    multiplier = smooth_temperature(positions, layer, pretrained_window=pretrained_window)
    return jnp.where(jnp.asarray(layer) < unscaled_layers, jnp.float32(1.0), multiplier)


def smooth_temperature(
    positions: Int[Array, " *shape"],
    layer: int | Int[Array, ""],
    *,
    pretrained_window: int,
    beta: float | None = None,
) -> Float32[Array, " *shape"]:
    """Computes 1 + beta ln max(i / c, 1) for the query at 1-based position i, in every layer.

    Args:
      pretrained_window: c in tokens; up to it, the multiplier is exactly 1.
      beta: growth per factor of e in position; None means 1 / ln c, which gives ln i / ln c.
    """
    del layer
    return 1.0 + _log_beyond(positions, pretrained_window) * _growth(beta, pretrained_window)


def layer_temperature(
    positions: Int[Array, " *shape"],
    layer: int | Int[Array, ""],
    *,
    pretrained_window: int,
    betas: tuple[float, ...],
) -> Float32[Array, " *shape"]:
    """Computes 1 + beta ln max(i / c, 1) for the query at 1-based position i, with each layer's own beta.

    Args:
      pretrained_window: c in tokens; up to it, the multiplier is exactly 1.
      betas: growth per factor of e in position, one number for each layer of the model; `eabf suggest` fits them.
    """
    return 1.0 + _log_beyond(positions, pretrained_window) * jnp.asarray(betas, jnp.float32)[layer]


def llama4_temperature(
    positions: Int[Array, " *shape"],
    layer: int | Int[Array, ""],
    *,
    pretrained_window: int,
    beta: float | None = None,
    one_based: bool = False,
) -> Float32[Array, " *shape"]:
    """Computes 1 + beta ln(1 + floor(p / c)) for the query at position p, in every layer: a stair with steps of c.

    Args:
      pretrained_window: c in tokens; within it, the multiplier is exactly 1.
      beta: growth per factor of e in position, 0.1 in the released models; None means 1 / ln c, as in `entropy_aware`.
      one_based: whether p counts from 1, as in Llama 4, where each step comes one token earlier than in Ministral 3.

    Source: transformers, `Llama4TextAttention` (`attn_scale`, `floor_scale`) and `Ministral3Attention`
      (`llama_4_scaling_beta`, `original_max_position_embeddings`).
    """
    del layer
    # Whole numbers, because a quotient just below a whole number could round up to it.
    steps = jnp.maximum(jnp.asarray(positions) + int(one_based), 0) // pretrained_window
    return 1.0 + jnp.log1p(steps.astype(jnp.float32)) * _growth(beta, pretrained_window)


def ssmax(
    positions: Int[Array, " *shape"], layer: int | Int[Array, ""], *, scaling: float
) -> Float32[Array, " *shape"]:
    """Computes the multiplier of scalable softmax, s ln i for the query at 1-based position i, in every layer.

    The first query's multiplier is 0; that query sees only one key.

    Args:
      scaling: s, one number for all heads; the paper learns one for each.

    Source: Nakanishi 2025 (Scalable-Softmax), section 2.
    """
    del layer
    return np.float32(scaling) * jnp.log(jnp.maximum(jnp.asarray(positions).astype(jnp.float32) + 1.0, 1.0))


def _log_beyond(positions: Int[Array, " *shape"], window: int) -> Float32[Array, " *shape"]:
    """Returns ln max(i / c, 1) for the 1-based positions i and the window c."""
    # ln i - ln c = ln(1 + (i - c)/c): i = c gives exactly 0, and little is lost right after it.
    excess = jnp.maximum(jnp.asarray(positions).astype(jnp.float32) - np.float32(window - 1), 0.0)
    return jnp.log1p(excess / np.float32(window))


def _growth(beta: float | None, pretrained_window: int) -> np.float32:
    return np.float32(1.0 / math.log(pretrained_window) if beta is None else beta)
