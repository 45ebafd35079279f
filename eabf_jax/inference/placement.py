"""Sharding of generation's arrays on a mesh: heads and hidden units over `tensor`, rows over `data` and `fsdp`.

Unlike in training, weights are never gathered, because a decode step would have to wait for them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from eabf_jax.errors import InputError
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.decoder import AXES, LAYER_AXES, PART_AXES, LayerWeights, Weights, WeightSource, weights_of
from eabf_jax.model.kv_cache import LayerCache, attend_chunk, attend_token
from eabf_jax.model.parameters import Axes, shapes
from eabf_jax.parallel.rules import check_tensor_axis, spec


def check(mesh: Mesh, config: LlamaConfig) -> None:
    """Refuses a mesh that cannot hold a model for generation.

    Raises:
      InputError: a context axis larger than 1, or a tensor axis that does not divide the model's dimensions.
    """
    if mesh.shape["context"] > 1:
        raise InputError(f"mesh context={mesh.shape['context']}: generation takes data, fsdp and tensor axes only")
    ways = mesh.shape["tensor"]
    check_tensor_axis(ways, config.num_key_value_heads)
    for name in ("intermediate_size", "vocab_size"):
        if getattr(config, name) % ways:
            raise InputError(f"mesh tensor={ways} does not divide the model's {name} {getattr(config, name)}")


def _shardings(mesh: Mesh, axes: Mapping[str, Axes]) -> dict[str, NamedSharding]:
    # As in training, but not along `embed`: such a weight would have to be gathered.
    kept = {name: [None if axis == "embed" else axis for axis in own] for name, own in axes.items()}
    return {name: NamedSharding(mesh, spec(*own)) for name, own in kept.items()}


def weights_on(mesh: Mesh | None, source: WeightSource) -> Weights:
    """Makes the weights of generation on a mesh, or on the default device; see `decoder.weights_of`."""
    if mesh is None:
        return weights_of(source)
    return weights_of(source, _shardings(mesh, PART_AXES | AXES), _shardings(mesh, LAYER_AXES))


def weight_shapes(mesh: Mesh, config: LlamaConfig, dtype: Any) -> Weights:
    """Returns what `weights_on` makes, with shapes and shardings in place of arrays."""
    own = shapes(config)
    made = jax.eval_shape(lambda: weights_of(WeightSource(config, dtype, lambda path: jnp.zeros(own[path], dtype))))

    def placed(arrays: Any, axes: Mapping[str, Axes]) -> dict[str, Any]:
        at = _shardings(mesh, axes)
        found = {name: getattr(arrays, name) for name in axes}
        return {name: x and jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at[name]) for name, x in found.items()}

    layers = tuple(LayerWeights(**placed(layer, LAYER_AXES)) for layer in made.layers)
    return Weights(layers=layers, **placed(made, AXES))


def cache_sharding(mesh: Mesh, cache: Any) -> Any:
    """Returns the shardings of a layer's cache; None for arrays that it does not have."""
    return jax.tree.map(lambda x: NamedSharding(mesh, spec("batch", "heads", *[None] * (x.ndim - 2))), cache)


def on_mesh(mesh: Mesh | None, cache: LayerCache) -> LayerCache:
    """Constrains a traced cache to its sharding; without a mesh, returns it unchanged."""
    return cache if mesh is None else jax.lax.with_sharding_constraint(cache, cache_sharding(mesh, cache))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays with the batch as their first dimension."""
    return NamedSharding(mesh, spec("batch"))


def chunk_attention(
    mesh: Mesh | None, options: Mapping[str, Any], q: Array, k: Array, v: Array, cache: LayerCache
) -> tuple[Array, LayerCache]:
    """Runs `attend_chunk` with its keyword arguments `options` on each device's own rows and heads."""
    attend = functools.partial(attend_chunk, **options)
    return _mapped(mesh, attend, cache, spec("batch", None, "heads", None))(q, k, v, cache)


def token_attention(
    mesh: Mesh | None, options: Mapping[str, Any], q: Array, k: Array, v: Array, cache: LayerCache, positions: Array
) -> tuple[Array, LayerCache]:
    """Runs `attend_token` with its keyword arguments `options` on each device's own rows and heads."""
    attend = functools.partial(attend_token, **options)
    return _mapped(mesh, attend, cache, spec("batch", "heads", None), spec("batch"))(q, k, v, cache, positions)


def _mapped(mesh: Mesh | None, attend: Any, cache: LayerCache, heads: P, *others: P) -> Any:
    if mesh is None or mesh.size == 1:
        return attend
    caches = jax.tree.map(lambda sharding: sharding.spec, cache_sharding(mesh, cache))
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(heads, heads, heads, caches, *others),
        out_specs=(heads, caches),
        check_vma=False,
    )
