"""What an attention backend is, and what several backends share.

Dimensions, here and in `llama.py`: B batch, T length, N query heads, K key-value heads (N is a multiple of K),
G = N / K, H head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jaxtyping import Array

Attention = Callable[[Array, Array, Array, Array | None], Array]
Forward = Callable[[Array, Array, Array, Array | None, bool], tuple[Array, Array]]
Backward = Callable[[Array, Array, Array, Array | None, Array, Array, Array, bool], tuple[Array, Array, Array]]

# exp() of this is 0 in float32; unlike -inf, it gives no NaN in a row whose entries are all masked.
MASKED = -1e30
# Residuals of a backend's backward pass, other than its inputs, carry this name, so that a remat policy can keep them.
CHECKPOINT_NAME = "attention_output"


@dataclass(frozen=True, eq=False)
class Backend:
    """An attention kernel: what it computes, where it runs, and what else it can do.

    The fields from `forward` on are optional abilities; None means that the backend lacks one. Code that needs an
    ability gets it from `attention.ability`, which refuses a backend without it.

    Attributes:
      name: as in the configuration.
      attend: as `__call__`.
      platforms: where "auto" may choose the backend; None means anywhere.
      limits: (dtype, head_dim) -> None if the backend takes them, else a description of what it takes.
      chunk_multiple: with a context axis, the length of a row's chunks is a multiple of this.
      forward: (q, k, v, segment_ids, causal) -> out [B, T, N, H], log_sum_exp float32 [B, N, T]. If not causal, every
        query sees every key, and the number of keys may differ from the number of queries.
      backward: (q, k, v, segment_ids, out, log_sum_exp, d_out, causal) -> d_q, d_k, d_v. If `out` and `log_sum_exp`
        cover more keys than `k` holds, the result is the contribution of the keys in `k` to the gradients.
      permuted: (order, heads, sharding of [heads, queries]) -> kernel, its partitions, run. `order` has the index in
        the row of every query; run(kernel, q, k, v) attends from a device's queries to the keys of the whole row.
      token: (q [B, N, H], k [B, K, S, H], v, lengths [B]) -> out [B, N, H]: one query per row, which sees the first
        `lengths` keys of a cache.
      windowed: (window) -> the same attention in which a query sees only the last `window` keys, its own included.
    """

    name: str
    attend: Attention
    platforms: tuple[str, ...] | None = None
    limits: Callable[[jnp.dtype, int], str | None] = lambda dtype, head_dim: None
    chunk_multiple: int = 1
    forward: Forward | None = None
    backward: Backward | None = None
    permuted: Callable[[np.ndarray, int, NamedSharding], tuple[Any, Any, Callable[..., Array]]] | None = None
    token: Callable[[Array, Array, Array, Array], Array] | None = None
    windowed: Callable[[int], Attention] | None = None

    def __call__(self, q: Array, k: Array, v: Array, segment_ids: Array | None = None) -> Array:
        """Attends causally; differentiable.

        Args:
          q: queries [B, T, N, H], rotated and scaled (1/sqrt(head_dim) and the scheme's logit multiplier included).
          k: keys [B, T, K, H], rotated.
          v: values [B, T, K, H].
          segment_ids: int32 [B, T]; tokens attend only within their own segment. None means one segment per row.

        Returns:
          The attended values [B, T, N, H], in the dtype of `v`; softmax is taken in float32.
        """
        return self.attend(q, k, v, segment_ids)


def with_residuals(forward: Forward, backward: Backward) -> Attention:
    """Builds attention whose output and log-sum-exp a remat policy can keep, so that the forward pass runs only once.

    Both carry the name "attention_output". Callers must not name the output again, or it is kept twice; they name
    the other residuals (q, k, v) themselves. The arguments are those of `Backend`.
    """

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        return forward(q, k, v, segment_ids, True)[0]

    def kept(q: Array, k: Array, v: Array, segment_ids: Array | None) -> tuple[Array, Any]:
        out, log_sum_exp = named(*forward(q, k, v, segment_ids, True))
        return out, (q, k, v, segment_ids, out, log_sum_exp)

    def gradients(saved: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
        q, k, v, segment_ids, out, log_sum_exp = saved
        return *backward(q, k, v, segment_ids, out, log_sum_exp, d_out, True), None

    attend.defvjp(kept, gradients)
    return attend


def named(*residuals: Array) -> tuple[Array, ...]:
    """Tags a kernel's residuals with the name that remat policies look for."""
    return tuple(checkpoint_name(x, CHECKPOINT_NAME) for x in residuals)


def joined(out: Array, log_sum_exp: Array, other: Array, other_log_sum_exp: Array) -> tuple[Array, Array]:
    """Joins what `Backend.forward` returns for the same queries and two sets of keys into the result for both sets.

    Args:
      out, log_sum_exp: for the first set, [B, T, N, H] and float32 [B, N, T].
      other, other_log_sum_exp: for the second set.

    Returns:
      The attended values, in the dtype of `out`, and their log-sum-exp.
    """
    both = jnp.logaddexp(log_sum_exp, other_log_sum_exp)

    def share(part: Array) -> Array:
        return jnp.exp(part - both).swapaxes(1, 2)[..., None]

    return (out * share(log_sum_exp) + other * share(other_log_sum_exp)).astype(out.dtype), both


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Returns the precision of matrix products for a compute dtype, so that float32 means float32 on every device.

    Returns:
      HIGHEST for float32, which TPUs and recent GPUs would otherwise round to fewer bits; None for other dtypes.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
