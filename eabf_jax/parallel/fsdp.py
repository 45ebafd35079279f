"""Fully sharded weights: all-gathered before use, their gradients reduce-scattered.

Sharding constraints alone are not enough. With them, the TPU compiler all-reduces whole gradients even where each
device keeps only its part, and on some meshes it also gathers weights with an all-reduce, at twice the bytes. This
module therefore writes the collectives out, in shard_map over the axes that split tokens; the compiler handles the
tensor axis.

A collective over two mesh axes runs over one axis after the other, which moves the same bytes. Over both at once, the
TPU compiler turns reduce-scatters into all-reduces on 64 chips; all-gathers too, if the mesh cuts a torus dimension.
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

# Mesh axes that split tokens: data and fsdp split the rows of a batch, context splits each row.
TOKEN_AXES = ("data", "fsdp", "context")
# Mesh axes that together split one dimension of each sharded parameter.
PARAMETER_AXES = ("fsdp", "context")


def by_device(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Applies `jax.shard_map` over `TOKEN_AXES`; the function sees whole arrays along the tensor axis.

    Args:
      function: takes and returns one device's parts of arrays.
      in_specs: partitions of its arguments, tensor axis included.
      out_specs: partitions of its results, tensor axis included.

    Returns:
      A function of whole arrays.
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
    """Gathers a whole parameter from the devices' parts; call it within `by_device`."""
    dimension = _split(spec)
    if dimension is not None:
        for axis in reversed(PARAMETER_AXES):
            if mesh.shape[axis] > 1:
                part = jax.lax.all_gather(part, axis, axis=dimension, tiled=True)
    return part


@jax.named_scope("parameter_gradients")
def scattered(mesh: Mesh, partial: Array, spec: PartitionSpec) -> Array:
    """Sums an array over devices and returns each device's part; call it within `by_device`.

    Args:
      partial: the device's summand, in the parameter's whole shape.
      spec: partition of the parameter on the mesh.

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
    """Runs `jax.lax.psum_scatter`, in two steps where the compiler would turn one step into an all-reduce.

    Args:
      x: the device's summand.
      dimension: the dimension of x to split.

    Returns:
      The device's part of the sum.
    """
    ways = mesh.shape[axis]
    if ways == 1:
        return x
    # The TPU compiler turns a reduce-scatter over all three dimensions of a slice into an all-reduce.
    whole_slice = ways == mesh.size > 4 and mesh.devices.flat[0].platform == "tpu"
    for groups in _in_two_steps(ways) if whole_slice else (None,):
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, axis_index_groups=groups, tiled=True)
    return x


def _in_two_steps(ways: int) -> tuple[list[list[int]], list[list[int]]]:
    """Returns two lists of device groups; reduce-scatters over the first, then the second, equal one over all."""
    places = np.arange(ways).reshape(-1, 4)
    return places.T.tolist(), places.tolist()


def _split(spec: PartitionSpec) -> int | None:
    """Returns the dimension that is split over `PARAMETER_AXES`; None if there is none."""
    return next((number for number, axes in enumerate(spec) if axes == PARAMETER_AXES), None)


def sharded_product(
    mesh: Mesh, tokens: PartitionSpec, *, whole: bool
) -> Callable[[Array, Array, PartitionSpec], Array]:
    """Builds the product of activations with a sharded parameter.

    Args:
      tokens: partition of [batch, length] on the mesh.
      whole: the parameters are already gathered; their gradients are scattered in either case.

    Returns:
      A function of x [batch, length, in], a parameter [in, out] and its partition, to [batch, length, out].
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
                # The transpose is scattered along its first dimension, because the TPU compiler turns a scatter of
                # narrow columns into an all-reduce.
                d_kernel = scattered(mesh, sum_up("...i,...o->oi", x, d_y), PartitionSpec(*reversed(spec))).T
            else:
                d_kernel = scattered(mesh, sum_up("...i,...o->io", x, d_y), spec)
            return d_x, d_kernel

        return by_device(mesh, local, (rows, given(spec), rows), (rows, spec))(*saved, d_y)

    product.defvjp(forward, backward)
    return product


def lookup(mesh: Mesh, tokens: PartitionSpec, spec: PartitionSpec) -> Callable[[Array, Array], Array]:
    """Builds the lookup in an embedding with sharded columns: gathers token ids and exchanges the columns found.

    Args:
      tokens: partition of [batch, length] on the mesh.
      spec: partition of the embedding [vocab, hidden_size]; if its columns are not split, the lookup is local.

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
    """Builds the derivative of `lookup`, which adds to an accumulated gradient.

    Args:
      tokens: partition of [batch, length] on the mesh.
      spec: partition of the accumulated gradient, split by columns.

    Returns:
      A function of the float32 sum [vocab, hidden_size], tokens and the vectors' gradient, to the new sum.
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
    """Gathers the tokens of all devices that split an embedding's columns: [fsdp, context, batch, length]."""
    for axis in reversed(PARAMETER_AXES):
        tokens = jax.lax.all_gather(tokens, axis)
    return tokens
