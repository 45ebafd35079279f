"""Weights that lie in parts on the devices: gathered where they are used, their gradients summed up and scattered.

The compiler does not do this by itself. From sharding constraints alone, the TPU compiler sums up whole gradients on
every device (an all-reduce) where each keeps only its part, and on some meshes it gathers weights by an all-reduce too:
twice the bytes. So the collectives are written out here, in shard_map over the axes that split tokens; the tensor axis
is left to the compiler.

What runs over two mesh axes runs over one after the other: the same bytes. Over both at once, the TPU compiler makes an
all-reduce of a reduce-scatter on 64 chips, and of an all-gather too where the mesh cuts a dimension of the torus.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from eabf_jax.model.attention import precision_of

# Mesh axes that split tokens: rows, and the tokens of a row.
TOKEN_AXES = ("data", "fsdp", "context")
# Those that split one dimension of each parameter, the same for all.
PARAMETER_AXES = ("fsdp", "context")


def by_device(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over `TOKEN_AXES`; along the tensor axis, arrays stay whole to the function.

    Args:
      mesh: the device mesh.
      function: of each device's parts of arrays.
      in_specs: how its arguments lie on the mesh, the tensor axis included.
      out_specs: how its results do.

    Returns:
      The function of whole arrays.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        axis_names=set(TOKEN_AXES),
        in_specs=jax.tree.map(_without_tensor, in_specs),
        out_specs=jax.tree.map(_without_tensor, out_specs),
        check_vma=False,
    )


def _without_tensor(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axes == "tensor" else axes for axes in spec))


@jax.named_scope("parameters")
def gathered(mesh: Mesh, part: Array, spec: PartitionSpec) -> Array:
    """Within `by_device`: the whole of a parameter of which a device has its part."""
    dimension = _split(spec)
    if dimension is not None:
        for axis in reversed(PARAMETER_AXES):
            if mesh.shape[axis] > 1:
                part = jax.lax.all_gather(part, axis, axis=dimension, tiled=True)
    return part


@jax.named_scope("parameter_gradients")
def scattered(mesh: Mesh, partial: Array, spec: PartitionSpec) -> Array:
    """Within `by_device`: a device's part of the sum of all devices' arrays.

    Args:
      mesh: the device mesh.
      partial: what a device adds, in the parameter's whole shape.
      spec: how the parameter lies on the mesh.

    Returns:
      The sum, in the shape of the device's part.
    """
    dimension = _split(spec)
    if dimension is None:
        return jax.lax.psum(partial, TOKEN_AXES)
    for axis in PARAMETER_AXES:
        partial = reduce_scatter(mesh, partial, axis, dimension)
    return jax.lax.psum(partial, "data") if mesh.shape["data"] > 1 else partial


def reduce_scatter(mesh: Mesh, x: Array, axis: str, dimension: int) -> Array:
    """`jax.lax.psum_scatter` along a dimension, in the steps in which the compiler does it.

    Args:
      mesh: the device mesh.
      x: what a device adds.
      axis: a mesh axis.
      dimension: the dimension that is cut.

    Returns:
      The device's part of the sum.
    """
    ways = mesh.shape[axis]
    if ways == 1:
        return x
    # The TPU compiler makes an all-reduce of a reduce-scatter over a slice's three dimensions at once.
    whole_slice = ways == mesh.size > 4 and mesh.devices.flat[0].platform == "tpu"
    for groups in _in_two_steps(ways) if whole_slice else (None,):
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, axis_index_groups=groups, tiled=True)
    return x


def _in_two_steps(ways: int) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of devices: reduce-scattered among the first, then the second, each has what one step would give it."""
    places = np.arange(ways).reshape(-1, 4)
    return places.T.tolist(), places.tolist()


def _split(spec: PartitionSpec) -> int | None:
    """The dimension that lies in parts; None where every device has all."""
    return next((number for number, axes in enumerate(spec) if axes == PARAMETER_AXES), None)


def sharded_product(
    mesh: Mesh, tokens: PartitionSpec, *, whole: bool
) -> Callable[[Array, Array, PartitionSpec], Array]:
    """Products of activations with parameters that lie in parts.

    Args:
      mesh: the device mesh.
      tokens: how [batch, length] lies on it.
      whole: the parameters have been gathered already; their gradients are scattered all the same.

    Returns:
      A function of x [batch, length, in], a parameter [in, out] and how that lies on the mesh, to [batch, length, out].
    """
    rows = PartitionSpec(*tokens, None)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def product(x: Array, kernel: Array, spec: PartitionSpec) -> Array:
        def local(x: Array, kernel: Array) -> Array:
            return jnp.matmul(x, as_used(kernel, spec, x.dtype), precision=precision_of(x.dtype))

        return by_device(mesh, local, (rows, given(spec)), rows)(x, kernel)

    def given(spec: PartitionSpec) -> PartitionSpec:
        return PartitionSpec() if whole else spec

    def as_used(kernel: Array, spec: PartitionSpec, dtype: Any) -> Array:
        return gathered(mesh, kernel.astype(dtype), given(spec))

    def forward(x: Array, kernel: Array, spec: PartitionSpec) -> tuple[Array, tuple[Array, Array]]:
        return product(x, kernel, spec), (x, kernel)

    def backward(spec: PartitionSpec, saved: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
        def local(x: Array, kernel: Array, d_y: Array) -> tuple[Array, Array]:
            precision = precision_of(x.dtype)
            d_x = jnp.matmul(d_y, as_used(kernel, spec, x.dtype).T, precision=precision)
            sum_up = functools.partial(jnp.einsum, precision=precision, preferred_element_type=kernel.dtype)
            if _split(spec) == 1:
                # Scattered along the first dimension of its transpose: the TPU compiler makes an all-reduce of a
                # scatter of narrow columns.
                d_kernel = scattered(mesh, sum_up("...i,...o->oi", x, d_y), PartitionSpec(*reversed(spec))).T
            else:
                d_kernel = scattered(mesh, sum_up("...i,...o->io", x, d_y), spec)
            return d_x, d_kernel

        return by_device(mesh, local, (rows, given(spec), rows), (rows, spec))(*saved, d_y)

    product.defvjp(forward, backward)
    return product


def lookup(mesh: Mesh, tokens: PartitionSpec, spec: PartitionSpec) -> Callable[[Array, Array], Array]:
    """Reads an embedding whose columns lie in parts: devices tell each other tokens, and hand back columns.

    Args:
      mesh: the device mesh.
      tokens: how [batch, length] lies on it.
      spec: how the embedding [vocab, hidden_size] does; with columns that every device has all of, nothing is moved.

    Returns:
      A function of the embedding and tokens to vectors [batch, length, hidden_size].
    """

    @jax.named_scope("embedding")
    def local(embedding: Array, tokens: Array) -> Array:
        if _split(spec) is None:
            return jnp.take(embedding, tokens, axis=0)
        columns = jnp.take(embedding, _everyones(tokens), axis=0)
        for place, axis in reversed(tuple(enumerate(PARAMETER_AXES))):
            columns = jax.lax.all_to_all(columns, axis, split_axis=place, concat_axis=4, tiled=True)
        return columns[0, 0]

    return by_device(mesh, local, (spec, tokens), PartitionSpec(*tokens, None))


def lookup_backward(mesh: Mesh, tokens: PartitionSpec, spec: PartitionSpec) -> Callable[[Array, Array, Array], Array]:
    """The derivative of `lookup`, added to a sum.

    Args:
      mesh: the device mesh.
      tokens: how [batch, length] lies on it.
      spec: how the sum does, by columns in parts.

    Returns:
      A function of the float32 sum [vocab, hidden_size], tokens and the gradient by the vectors, to the new sum.
    """

    @jax.named_scope("embedding")
    def local(total: Array, tokens: Array, d_x: Array) -> Array:
        columns, ids = d_x[None, None], _everyones(tokens)
        for place, axis in enumerate(PARAMETER_AXES):
            columns = jax.lax.all_to_all(columns, axis, split_axis=4, concat_axis=place, tiled=True)
        if mesh.shape["data"] == 1:
            return total.at[ids].add(columns.astype(total.dtype))
        found = jnp.zeros_like(total).at[ids].add(columns.astype(total.dtype))
        return total + jax.lax.psum(found, "data")

    return by_device(mesh, local, (spec, tokens, PartitionSpec(*tokens, None)), spec)


def _everyones(tokens: Array) -> Array:
    """The tokens of the devices that share the columns of an embedding: [fsdp, context, batch, length]."""
    for axis in reversed(PARAMETER_AXES):
        tokens = jax.lax.all_gather(tokens, axis)
    return tokens
