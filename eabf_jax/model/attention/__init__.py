"""Causal self-attention: one protocol (`Backend`), a module for each kernel, and the registry.

A new kernel is a module with a `Backend`, which is listed in `BACKENDS`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.model.attention import chunked, cudnn, reference, splash
from eabf_jax.model.attention.backend import Attention, Backend, joined, named, precision_of
from eabf_jax.model.config import LlamaConfig

__all__ = [
    "BACKENDS",
    "Attention",
    "Backend",
    "ability",
    "joined",
    "named",
    "needs_of",
    "precision_of",
    "select",
    "with_window",
]

# "auto" takes the first one that fits.
BACKENDS = {backend.name: backend for backend in (cudnn.BACKEND, splash.BACKEND, chunked.BACKEND, reference.BACKEND)}

# What the optional abilities of a backend are for, by field, to complete error messages.
_ABILITIES = {
    "forward": "return log-sum-exps, which prompts longer than prefill_chunk and mesh context need",
    "backward": "compute gradients from log-sum-exps, which mesh context needs",
    "windowed": "attend within the model's sliding window",
}


def select(
    backend: str, dtype: jnp.dtype, head_dim: int, platform: str | None = None, *, needs: tuple[str, ...] = ()
) -> Backend:
    """Selects a backend before tracing.

    Args:
      backend: a name in `BACKENDS`, or "auto" for the best one that the platform, dtype and head size allow.
      dtype: the compute dtype.
      platform: "cpu", "gpu" or "tpu"; None means JAX's default backend.
      needs: abilities that it must have, as for `ability`.

    Raises:
      InputError: an unknown name, or a backend that does not take the dtype or head size, or lacks an ability.
    """
    if backend == "auto":
        platform = platform or jax.default_backend()
        return next(
            found
            for found in BACKENDS.values()
            if (found.platforms is None or platform in found.platforms)
            and found.limits(dtype, head_dim) is None
            and all(getattr(found, name) for name in needs)
        )
    if backend not in BACKENDS:
        raise unknown_name("attention backend", backend, [*BACKENDS, "auto"])
    found, limits = BACKENDS[backend], BACKENDS[backend].limits(dtype, head_dim)
    if limits is not None:
        raise InputError(
            f"attention backend {backend!r} takes {limits}, not {jnp.dtype(dtype).name} and {head_dim}; "
            "'auto' chooses one that does"
        )
    for name in needs:
        ability(found, name)
    return found


def ability(backend: Backend, name: str) -> Callable[..., Any]:
    """Returns an optional field of a backend.

    Raises:
      InputError: the backend lacks the ability.
    """
    found: Callable[..., Any] | None = getattr(backend, name)
    if found is None:
        able = ", ".join(other.name for other in BACKENDS.values() if getattr(other, name))
        raise InputError(f"attention backend {backend.name!r} cannot {_ABILITIES[name]}: choose one of {able}")
    return found


def needs_of(config: LlamaConfig) -> tuple[str, ...]:
    """Returns the abilities that a model needs of its attention backend."""
    return () if config.sliding_window is None else ("windowed",)


def with_window(attention: Attention, window: int) -> Attention:
    """Returns the attention of a backend in which each query sees the last `window` keys only, its own included.

    Raises:
      InputError: a backend without this ability, or a function that is no backend.
    """
    if not isinstance(attention, Backend):
        raise InputError(f"sliding_window {window} needs an attention backend by name, not a function: {attention}")
    found: Attention = ability(attention, "windowed")(window)
    return found
