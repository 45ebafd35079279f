"""Sharding rules: the table from logical axes to mesh axes, and what follows from it for parameters and activations."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from eabf_jax.errors import InputError
from eabf_jax.model.attention import Attention, needs_of, select, with_window
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Constrain, Llama, Product, product, unconstrained
from eabf_jax.model.parameters import parameter_axes
from eabf_jax.parallel.context import context_attention
from eabf_jax.parallel.fsdp import PARAMETER_AXES, TOKEN_AXES, sharded_product
from eabf_jax.parallel.mesh import AXES

LOGICAL_TO_MESH: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "layers": None,
    # Split over context as well as fsdp; otherwise the devices that share a row would each hold the same part.
    "embed": PARAMETER_AXES,
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}


def spec(*logical_axes: str | None, of: str = "an array") -> PartitionSpec:
    """Returns the partition of an array with these logical axes.

    Args:
      logical_axes: names in `LOGICAL_TO_MESH`, one per dimension.
      of: names the array in messages.

    Raises:
      InputError: two of them are split over the same mesh axis.
    """
    users: dict[str, str | None] = {}
    for axis in logical_axes:
        for name in _names(LOGICAL_TO_MESH[axis]):
            if name in users:
                raise InputError(
                    f"{of} has the logical axes {users[name]} and {axis}, both split over the mesh axis {name}, which "
                    "can split one dimension only: None leaves a dimension unsplit"
                )
            users[name] = axis
    return PartitionSpec(*(LOGICAL_TO_MESH[axis] for axis in logical_axes))


def parameter_spec(path: tuple[str, ...]) -> PartitionSpec:
    """Returns the partition of the parameter at a path of the tree; raises as `spec` does."""
    return spec(*parameter_axes(path), of=f"parameter {'.'.join(path)}")


def parameter_shardings(mesh: Mesh, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shardings of a parameter tree.

    Args:
      params: nested mapping of arrays or shapes, as returned by `Llama.parameters()`.

    Returns:
      A nested dict of NamedSharding with the same structure.
    Raises:
      InputError: a dimension does not divide by the mesh axes that split it; as for `spec`.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(key.key for key in path)
        partition = parameter_spec(names)
        for size, axes in zip(leaf.shape, partition, strict=True):
            ways = _ways(mesh, axes)
            if size % ways:
                raise InputError(
                    f"parameter {'.'.join(names)} has a dimension of {size}, which the mesh splits {ways} ways "
                    f"({' x '.join(_names(axes))}): choose mesh axes that divide it"
                )
        return NamedSharding(mesh, partition)

    return jax.tree.map_with_path(sharding, params)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Combines a tree of shapes with a tree of shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a [batch, length] array."""
    return NamedSharding(mesh, spec("batch", "length"))


def batch_ways(mesh: Mesh) -> int:
    """Returns the number of parts into which the mesh splits a batch."""
    return _ways(mesh, LOGICAL_TO_MESH["batch"])


def process_batch_shard(mesh: Mesh) -> tuple[int, int]:
    """Returns the index of the part of every batch that this process loads, and the number of parts.

    Processes whose devices hold parts of the same rows (a tensor or context axis across hosts) load the same part.

    Raises:
      InputError: two processes share some rows but not all, or hold different numbers of rows.
    """
    ways = batch_ways(mesh)
    rows: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = NamedSharding(mesh, spec("batch")).devices_indices_map((ways,))
    for device, (index,) in places.items():
        rows.setdefault(device.process_index, set()).update(range(*index.indices(ways)))
    return batch_part(rows, jax.process_index())


def batch_part(rows: Mapping[int, set[int]], process: int) -> tuple[int, int]:
    """The pure part of `process_batch_shard`.

    Args:
      rows: by process index, the parts of the batch that its devices hold.
      process: the index of the process in question.

    Returns:
      The part's index and the number of parts.
    Raises:
      InputError: as for `process_batch_shard`.
    """
    parts = sorted({tuple(sorted(held)) for held in rows.values()})
    overlap = len({row for part in parts for row in part}) != sum(map(len, parts))
    if overlap or len({len(part) for part in parts}) != 1:
        raise InputError(
            f"the mesh gives processes the batch rows {', '.join(map(str, parts))}, which overlap or differ in number: "
            "let tensor x context divide the devices of a process or be a multiple of them"
        )
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def _ways(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[name] for name in _names(axes))


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


@functools.cache  # models of one shape on one mesh share their compiled programs
def activation_constraint(mesh: Mesh) -> Constrain:
    """Builds the `constrain` hook of `Llama` for a mesh, which pins large activations to their logical axes."""
    if mesh.size == 1:
        return unconstrained

    def constrain(x: Array, *logical_axes: str | None) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(*logical_axes)))

    return constrain


@functools.cache
def layer_product(mesh: Mesh, *, whole: bool = False) -> Product:
    """Builds the `product` hook of `Llama` for a mesh, which gathers parameters and scatters their gradients.

    Args:
      whole: the parameters are already gathered.
    """
    if all(mesh.shape[axis] == 1 for axis in TOKEN_AXES):
        return product
    multiply = sharded_product(mesh, spec("batch", "length"), whole=whole)
    # Without the axis of layers: a product is one layer's.
    return lambda x, kernel, path: multiply(x, kernel, PartitionSpec(*parameter_spec(path)[1:]))


def check_tensor_axis(ways: int, kv_heads: int) -> None:
    """Refuses a tensor axis that would split a head.

    Args:
      ways: size of the tensor axis.
      kv_heads: key-value heads of the model.

    Raises:
      InputError: the axis does not divide the key-value heads.
    """
    if kv_heads % ways:
        raise InputError(
            f"mesh tensor={ways} does not divide the model's {kv_heads} key-value heads: use a divisor of it and give "
            "the rest of the devices to fsdp"
        )


@functools.cache
def sharded_attention(mesh: Mesh, attention: Attention, kv_heads: int) -> Attention:
    """Runs an attention backend on each device's own rows, queries and heads, so that kernels need not handle a mesh.

    Args:
      attention: one of `model.attention.BACKENDS`, or without a context axis any function with its signature.
      kv_heads: key-value heads of the model.

    Returns:
      A function with the same signature for arrays laid out on the mesh; with a context axis, the tokens of each row
      must be in `context.zigzag_order`.
    Raises:
      InputError: the tensor axis does not divide the key-value heads, or the backend cannot split rows.
    """
    check_tensor_axis(mesh.shape["tensor"], kv_heads)
    if mesh.size == 1:
        return attention
    heads = spec("batch", "length", "heads", None)
    if mesh.shape["context"] > 1:
        return context_attention(mesh, attention, heads)

    def attend(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        if segment_ids is None:
            return jax.shard_map(
                lambda q, k, v: attention(q, k, v, None),
                mesh=mesh,
                in_specs=(heads,) * 3,
                out_specs=heads,
                check_vma=False,
            )(q, k, v)
        return jax.shard_map(
            attention,
            mesh=mesh,
            in_specs=(heads, heads, heads, spec("batch", "length")),
            out_specs=heads,
            check_vma=False,
        )(q, k, v, segment_ids)

    return attend


def llama_on(
    mesh: Mesh,
    config: LlamaConfig,
    *,
    dtype: Any,
    attention: str | Attention = "auto",
    whole: bool = False,
    **options: Any,
) -> Llama:
    """Builds a model that computes on a mesh, with shapes in place of parameters.

    Args:
      dtype: compute dtype.
      attention: a backend's name, "auto", or a function for one device.
      whole: as for `layer_product`.
      **options: as for `Llama`.

    Raises:
      InputError: the tensor axis does not divide the key-value heads; unknown backend.
    """
    if isinstance(attention, str):
        platform = mesh.devices.flat[0].platform
        attention = select(attention, jnp.dtype(dtype), config.head_dim, platform, needs=needs_of(config))
    windowed = None
    if config.sliding_window is not None:
        if mesh.shape["context"] > 1:
            raise InputError(
                f"mesh context={mesh.shape['context']} cannot split rows for the model's sliding_window "
                f"{config.sliding_window}; give these devices to fsdp or tensor"
            )
        windowed = with_window(attention, config.sliding_window)
        windowed = sharded_attention(mesh, windowed, config.num_key_value_heads)
    return Llama.abstract(
        config,
        dtype=jnp.dtype(dtype),
        attention=sharded_attention(mesh, attention, config.num_key_value_heads),
        windowed=windowed,
        constrain=activation_constraint(mesh),
        product=layer_product(mesh, whole=whole),
        **options,
    )


def moved(model: Llama, mesh: Mesh) -> Llama:
    """Returns a model on one device as one that is held and computed on a mesh."""
    params = model.parameters()
    options: dict[str, Any] = {"dtype": model.dtype, "attention": model.attention, "lora": model.lora}
    placed = jax.device_put(params, parameter_shardings(mesh, params))
    return llama_on(mesh, model.config, **options).with_parameters(placed)


def mesh_of(model: Llama) -> Mesh | None:
    """Returns the mesh that a model's parameters are on; None if they are on one device."""
    mesh = getattr(getattr(model.embed_tokens.embedding[...], "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, Mesh) and mesh.axis_names == AXES else None
