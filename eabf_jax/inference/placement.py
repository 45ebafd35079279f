"""Sharding of generation's arrays on a mesh: heads and hidden units over `tensor`, rows over `data` and `fsdp`.

Unlike in training, weights are never gathered, because a decode step would have to wait for them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from eabf_jax.errors import InputError
from eabf_jax.model.attention import Backend
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.decoder import AXES, LAYER_AXES, PART_AXES, Weights, WeightSource, weights_of
from eabf_jax.model.kv_cache import LayerCache, attend_chunk, attend_token
from eabf_jax.model.parameters import Axes
from eabf_jax.parallel.rules import check_tensor_axis, spec

_CACHE = {
    "k": spec("batch", "heads", None, None),
    "v": spec("batch", "heads", None, None),
    "k_scale": spec("batch", "heads", None),
    "v_scale": spec("batch", "heads", None),
}


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


def weights_on(mesh: Mesh | None, source: WeightSource) -> Weights:
    """Makes the weights of generation on a mesh, or on the default device; see `decoder.weights_of`."""
    if mesh is None:
        return weights_of(source)

    def placed(axes: Mapping[str, Axes]) -> dict[str, NamedSharding]:
        # As in training, but not along `embed`: such a weight would have to be gathered.
        partitions = {name: spec(*(None if axis == "embed" else axis for axis in own)) for name, own in axes.items()}
        return {name: NamedSharding(mesh, partition) for name, partition in partitions.items()}

    return weights_of(source, placed(PART_AXES | AXES), placed(LAYER_AXES))


def cache_sharding(mesh: Mesh, cache: Any) -> Any:
    """Returns the shardings of a layer's cache; None for arrays that it does not have."""
    return LayerCache(
        **{
            name: None if getattr(cache, name) is None else NamedSharding(mesh, partition)  # type: ignore[arg-type]
            for name, partition in _CACHE.items()
        }
    )


def on_mesh(mesh: Mesh | None, cache: LayerCache) -> LayerCache:
    """Constrains a traced cache to its sharding; without a mesh, returns it unchanged."""
    return cache if mesh is None else jax.lax.with_sharding_constraint(cache, cache_sharding(mesh, cache))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays with the batch as their first dimension."""
    return NamedSharding(mesh, spec("batch"))


def chunk_attention(
    mesh: Mesh | None, q: Array, k: Array, v: Array, cache: LayerCache, *, start: int, backend: Backend
) -> tuple[Array, LayerCache]:
    """Runs `attend_chunk` on each device's own rows and heads."""
    attend: Any = functools.partial(attend_chunk, start=start, backend=backend)
    if mesh is None or mesh.size == 1:
        return attend(q, k, v, cache)
    return _mapped(mesh, attend, cache, spec("batch", None, "heads", None))(q, k, v, cache)


def token_attention(
    mesh: Mesh | None, q: Array, k: Array, v: Array, cache: LayerCache, positions: Array, *, backend: Backend
) -> tuple[Array, LayerCache]:
    """Runs `attend_token` on each device's own rows and heads."""
    attend: Any = functools.partial(attend_token, backend=backend)
    if mesh is None or mesh.size == 1:
        return attend(q, k, v, cache, positions)
    return _mapped(mesh, attend, cache, spec("batch", "heads", None), spec("batch"))(q, k, v, cache, positions)


def _mapped(mesh: Mesh, attend: Any, cache: LayerCache, heads: P, *others: P) -> Any:
    caches = jax.tree.map(lambda sharding: sharding.spec, cache_sharding(mesh, cache))
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(heads, heads, heads, caches, *others),
        out_specs=(heads, caches),
        check_vma=False,
    )
