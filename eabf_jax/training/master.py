"""Float32 master parameters stored in two halves: the parameters in the compute dtype, and the remaining bits.

Rounding a float32 number to bfloat16 changes it by at most 2**15 units in its last place. The bfloat16 number and a
16-bit integer therefore hold the float32 number exactly, in the same four bytes. The model computes with the first half
directly, and no update is lost to rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def split(master: Float[Array, "..."], dtype: Any) -> tuple[Array, Array]:
    """Splits float32 parameters into the compute dtype and the rest needed to restore them exactly.

    Args:
      master: float32, finite.
      dtype: the compute dtype.

    Returns:
      The nearest numbers in `dtype` (for bfloat16, ties round away from zero), and the rest: int16 for bfloat16, an
      empty array for float32, and the float32 numbers themselves for float16, whose exponent is too short to be split.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return master, jnp.zeros((0,), jnp.int16)
    if dtype != jnp.bfloat16:
        return master.astype(dtype), master
    bits = jax.lax.bitcast_convert_type(master, jnp.uint32)
    high = (bits + jnp.uint32(0x8000)) >> 16
    rest = jax.lax.bitcast_convert_type((bits - (high << 16)).astype(jnp.uint16), jnp.int16)
    return jax.lax.bitcast_convert_type(high.astype(jnp.uint16), jnp.bfloat16), rest


def join(params: Float[Array, "..."], rest: Array) -> Float[Array, "..."]:
    """Restores the float32 parameters that `split` was given, bit for bit."""
    if params.dtype == jnp.float32:
        return params
    if params.dtype != jnp.bfloat16:
        return rest
    high = jax.lax.bitcast_convert_type(params, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(high + rest.astype(jnp.int32).astype(jnp.uint32), jnp.float32)


def split_tree(masters: Any, dtype: Any) -> tuple[Any, Any]:
    """Applies `split` to every leaf of a tree; returns two trees."""
    pairs = jax.tree.map(lambda leaf: split(leaf, dtype), masters)
    return jax.tree.transpose(jax.tree.structure(masters), jax.tree.structure((0, 0)), pairs)
