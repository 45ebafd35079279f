"""Float32 masters in two halves, which restore every bit; the first half is the nearest bfloat16 number."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eabf_jax.training.master import join, split, split_tree

# Upper halves of float32 numbers: both zeros with the denormals, the smallest normal numbers, one, a significand of all
# ones (rounding carries into the exponent), the largest numbers (rounding up gives infinity), and a few others.
HIGHS = [0x0000, 0x8000, 0x007F, 0x0080, 0x3F80, 0x3FFF, 0xBFFF, 0x7F7F, 0xFF7F, 0x1234, 0xC2F7]


def floats(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def bits(array):
    return np.asarray(array).view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@pytest.mark.parametrize("high", HIGHS, ids=hex)
def test_every_number_with_these_upper_bits_comes_back(high):
    master = floats((high << 16) + np.arange(2**16))
    params, rest = jax.jit(lambda x: split(x, jnp.bfloat16))(master)
    assert (params.dtype, rest.dtype) == (jnp.bfloat16, jnp.int16)
    np.testing.assert_array_equal(bits(jax.jit(join)(params, rest)), bits(master))
    nearest = bits(master.astype(ml_dtypes.bfloat16))
    away = high + (np.arange(2**16) >= 2**15)  # ties round away from zero; ml_dtypes rounds them to even
    tie = np.arange(2**16) == 2**15
    np.testing.assert_array_equal(bits(params)[~tie], nearest[~tie])
    np.testing.assert_array_equal(bits(params), away)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8))
def test_any_numbers_come_back(numbers):
    master = np.array(numbers, np.float32)
    np.testing.assert_array_equal(bits(join(*split(master, jnp.bfloat16))), bits(master))


@pytest.mark.parametrize(("dtype", "rest_dtype", "rest_size"), [("float32", "int16", 0), ("float16", "float32", 3)])
def test_other_dtypes_keep_the_numbers_too(dtype, rest_dtype, rest_size):
    master = np.array([1e-30, 1 / 3, -7e37], np.float32)  # only 1/3 is in float16's range
    params, rest = split(jnp.asarray(master), dtype)
    assert (params.dtype, rest.dtype, rest.size) == (dtype, rest_dtype, rest_size)
    np.testing.assert_array_equal(join(params, rest), master)


def test_a_tree_is_split_into_two_of_its_shape():
    tree = {"a": {"kernel": jnp.full((2, 3), 1 / 3)}, "b": jnp.arange(4.0)}
    params, rest = split_tree(tree, jnp.bfloat16)
    assert jax.tree.structure(params) == jax.tree.structure(rest) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(join, params, rest), tree)
