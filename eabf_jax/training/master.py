"""Float32 master parameters kept in two halves: what the model computes with, and the rest of the bits.

A float32 number rounded to bfloat16 differs from itself by less than 2**16 units of its last bit, so the bfloat16
number and a 16-bit integer are the float32 number exactly, in the same four bytes: the model computes with the first
half as it lies, and no update is lost.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def split(master: Float[Array, "..."], dtype: Any) -> tuple[Array, Array]:
    """Cuts float32 parameters into the compute dtype and what is missing to be exact.

    Args:
      master: float32, finite.
      dtype: the compute dtype.

    Returns:
      The nearest numbers in `dtype` (halves away from zero), and the rest: int16 for bfloat16, nothing (an array
      without elements) for float32, the float32 numbers themselves for float16, whose exponent is too short for the
      trick.
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
    """The float32 parameters that `split` was given, bit for bit."""
    if params.dtype == jnp.float32:
        return params
    if params.dtype != jnp.bfloat16:
        return rest
    high = jax.lax.bitcast_convert_type(params, jnp.uint16).astype(jnp.uint32) << 16
    return jax.lax.bitcast_convert_type(high + rest.astype(jnp.int32).astype(jnp.uint32), jnp.float32)


def split_tree(masters: Any, dtype: Any) -> tuple[Any, Any]:
    """`split` for every leaf of a tree: two trees."""
    pairs = jax.tree.map(lambda leaf: split(leaf, dtype), masters)
    return jax.tree.transpose(jax.tree.structure(masters), jax.tree.structure((0, 0)), pairs)
