"""Attention entropy: how widely each query spreads its attention, by layer, head and position.

The entropy of a query's row of attention weights p is H = -Σ p ln p, in nats; a query that attends evenly to n keys has
ln n. It is computed for every row first and then averaged, because the entropy of a mean of rows is larger.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from eabf_jax.errors import InputError
from eabf_jax.evaluation.intervals import Mean, student
from eabf_jax.evaluation.perplexity import check_edges
from eabf_jax.evaluation.scorer import filled, on_mesh
from eabf_jax.inference import placement
from eabf_jax.model.attention import precision_of
from eabf_jax.model.attention.backend import MASKED
from eabf_jax.model.llama import Llama, Row, checked
from eabf_jax.parallel.rules import batch_ways

# Queries and keys in a block: on CPU, blocks that stay in its cache; on others, blocks that keep all cores busy.
_BLOCK = {"cpu": 256}
_LARGE_BLOCK = 1024
# The steepest multiplier that `matched` fits, in multiples of 1 / ln c, the growth of the paper's.
_STEEPEST = 1.5


class Entropies(NamedTuple):
    """Mean entropies of the queries in bands of positions."""

    edges: list[int]  # band i has the positions edges[i] <= position < edges[i + 1], 0-based
    means: Float[np.ndarray, "documents layers heads bands"]  # nats

    @property
    def uniform(self) -> Float[np.ndarray, " bands"]:
        """Mean over each band of ln n, the entropy of even attention to all n tokens so far."""
        logs = np.log(np.arange(1, self.edges[-1] + 1))
        return np.array([logs[start:end].mean() for start, end in itertools.pairwise(self.edges)])


def row_entropies(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], window: int | None = None, block: int | None = None
) -> Float[Array, "B N T"]:
    """Computes the entropy of every query's causal attention, without the [T, T] matrix of weights.

    Blocks of keys update the running maximum m of the logits x, Σ exp(x - m) and Σ exp(x - m) (x - m).

    Args:
      q: queries, rotated and scaled as for `attention.Backend`.
      k: keys; N is a multiple of K.
      window: keys that a query sees, its own included; None means all before it.
      block: queries and keys in a block; None chooses by platform.

    Returns:
      float32, nats.
    """
    batch, length, heads, size = q.shape
    kv_heads = k.shape[2]
    block = min(length, block or _BLOCK.get(jax.default_backend(), _LARGE_BLOCK))
    count = -(-length // block)
    padding = ((0, 0), (0, count * block - length), (0, 0), (0, 0))
    q = jnp.pad(q, padding).reshape(batch, count, block, kv_heads, heads // kv_heads, size)
    k = jnp.pad(k, padding).reshape(batch, count, block, kv_heads, size)
    within = jnp.arange(block)

    def of_queries(i: Array) -> Array:
        def add_keys(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, largest, weighted = carry
            logits = jnp.einsum(
                "btkgh,bskh->bkgts", q[:, i], k[:, j],
                preferred_element_type=jnp.float32, precision=precision_of(q.dtype),
            )  # fmt: skip
            distance = (i - j) * block + within[:, None] - within
            seen = (distance >= 0) & (distance < (length if window is None else window))
            new = jnp.maximum(largest, jnp.where(seen, logits, MASKED).max(-1))
            below = jnp.where(seen, logits - new[..., None], 0.0)
            weights = jnp.where(seen, jnp.exp(below), 0.0)
            fall = largest - new
            shrink = jnp.exp(fall)
            weighted = shrink * (weighted + fall * total) + (weights * below).sum(-1)
            return shrink * total + weights.sum(-1), new, weighted

        zeros = jnp.zeros((batch, kv_heads, heads // kv_heads, block), jnp.float32)
        first = 0 if window is None else jnp.maximum(0, (i * block - window + 1) // block)
        total, _, weighted = jax.lax.fori_loop(first, i + 1, add_keys, (zeros, zeros + MASKED, zeros))
        return jnp.log(total) - weighted / total

    found = jax.lax.map(of_queries, jnp.arange(count))  # [count, B, K, G, block]
    return jnp.moveaxis(found, 0, -2).reshape(batch, heads, -1)[..., :length]


@functools.partial(jax.jit, static_argnames=("graph", "window"))
def _layer(
    graph: Any, params: Any, x: Array, row: Row, index: Array, window: int | None
) -> tuple[Array, Float[Array, "B N T"]]:
    """Runs one layer, whose window is known; returns the hidden states and the entropies."""
    found = []

    def tap(q: Array, k: Array) -> Array:
        found.append(row_entropies(q, k, window))
        return q

    return _tapped(nnx.merge(graph, params), x, row, index, window, tap), found[0]


def _tapped(
    model: Llama, x: Array, row: Row, index: Array, window: int | None, tap: Callable[[Array, Array], Array]
) -> Array:
    """Runs one layer, whose window is known; `tap` sees queries and keys, and returns the queries to attend with."""
    attention = model.attention if window is None else model.windowed
    assert attention is not None

    def attend(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        return attention(tap(q, k), k, v, segment_ids)

    model.attention, model.windowed = attend, None
    parameters = jax.tree.map(lambda leaf: leaf[index], nnx.to_pure_dict(nnx.state(model.layers, nnx.Param)))
    return model.layer(parameters, index, x, row)


def _window_of(model: Llama, layer: int, length: int) -> int | None:
    """Returns the sliding window of a layer if it is shorter than the rows."""
    window = model.config.window_of(layer)
    return None if window is None or window >= length else window


@functools.partial(jax.jit, static_argnames="graph")
def _begin(graph: Any, params: Any, tokens: Array) -> tuple[Array, Row]:
    model = nnx.merge(graph, params)
    return model.embed(model.embed_tokens.embedding[...], tokens), model.row(tokens)


def attention_entropy(model: Llama, tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "layers heads T"]:
    """Computes the mean entropy of every query position's attention.

    Args:
      model: on one device, or on a mesh that it was loaded on; rows are copied to fill the mesh.
      tokens: integers [batch, length].

    Returns:
      float32 [layers, heads, length], nats, means over the rows; position 0, which sees one key, has 0.

    Raises:
      InputError: as for `entropies`.
    """
    tokens = np.asarray(tokens)
    found = entropies(model, tokens, range(tokens.shape[-1] + 1), batch_size=1)
    return found.means.mean(0).astype(np.float32)


def entropies(
    model: Llama,
    documents: Int[np.ndarray, "documents T"],
    edges: Sequence[int],
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Entropies:
    """Measures the attention entropy of a model that reads documents, each in one pass.

    Args:
      model: on one device, which is then copied to all, or on a mesh that it was loaded on.
      documents: integers [documents, length].
      edges: increasing positions from 0 or more, at most the length.
      batch_size: documents that each device reads at a time.
      progress: called with the number of documents done.

    Raises:
      InputError: tokens that are no [documents, length] array or beyond the vocabulary, bands that do not fit them, or
        entropies that are not finite.
    """
    documents = np.asarray(checked("documents", documents, 0, model.config.vocab_size))
    check_edges(edges, documents.shape[1])
    mesh, model = on_mesh(model)
    config, at = model.config, placement.row_sharding(mesh)
    graph, params = nnx.split(model)
    rows, widths = batch_size * batch_ways(mesh), np.diff(edges)
    means = np.empty((len(documents), config.num_hidden_layers, config.num_attention_heads, len(widths)))
    for start in range(0, len(documents), rows):
        batch = documents[start : start + rows]
        x, row = _begin(graph, params, jax.device_put(filled(batch, rows), at))
        for layer in range(config.num_hidden_layers):
            window = _window_of(model, layer, documents.shape[1])
            x, found = _layer(graph, params, x, row, jnp.int32(layer), window)
            nats = np.asarray(found, np.float64)[: len(batch), :, : edges[-1]]
            means[start : start + len(batch), layer] = np.add.reduceat(nats, edges[:-1], axis=-1) / widths
        progress(start + len(batch))
    if not np.isfinite(means).all():
        raise InputError("an entropy is not finite; check the weights, or use --dtype float32")
    return Entropies(list(edges), means)


class Matched(NamedTuple):
    """What `matched` finds, by layer."""

    betas: Float[np.ndarray, " layers"]  # of the multiplier `layer_temperature`
    growth: Float[np.ndarray, " layers"]  # of the entropy inside the window, nats per factor of e in position


def matched(
    model: Llama,
    documents: Int[np.ndarray, "documents T"],
    window: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Matched:
    """Fits each layer's logit multiplier so that attention entropy beyond the window is that in its last half.

    The multiplier is 1 + beta ln max(i / c, 1), with beta from 0 to 1.5 / ln c. Layers are fitted in order, each on the
    hidden states that the fitted layers before it give.

    Args:
      model: with the frequencies to use, and no multiplier.
      documents: integers [documents, length], longer than the window; all are read in one batch.
      window: c, the pretrained window, in tokens.
      progress: called with the number of layers done.

    Raises:
      InputError: as for `entropies`; documents within the window.
    """
    documents = np.asarray(checked("documents", documents, 0, model.config.vocab_size))
    if documents.shape[1] <= window:
        raise InputError(f"documents of {documents.shape[1]} tokens end within the window of {window}")
    mesh, model = on_mesh(model)
    count = len(documents)
    full = filled(documents, count + -count % batch_ways(mesh))
    graph, params = nnx.split(model)
    x, row = _begin(graph, params, jax.device_put(full, placement.row_sharding(mesh)))
    betas, growth = [], []
    for layer in range(model.config.num_hidden_layers):
        sliding = _window_of(model, layer, documents.shape[1])
        x, beta, slope = _fit_layer(graph, params, x, row, jnp.int32(layer), sliding, window, count)
        betas.append(float(beta))
        growth.append(float(slope))
        progress(layer + 1)
    if not np.isfinite([betas, growth]).all():
        raise InputError("an entropy is not finite; check the weights, or use --dtype float32")
    return Matched(np.array(betas), np.array(growth))


@functools.partial(jax.jit, static_argnames=("graph", "sliding", "window", "count"))
def _fit_layer(
    graph: Any, params: Any, x: Array, row: Row, index: Array, sliding: int | None, window: int, count: int
) -> tuple[Array, Array, Array]:
    """Runs one layer with the beta that matches its entropies; returns the hidden states, beta and growth."""
    beyond = jnp.log(jnp.maximum((row.positions + 1) / window, 1.0))
    found: list[Array] = []

    def scaled(q: Array, beta: Array) -> Array:
        return (q * (1.0 + beta * beyond)[..., None, None]).astype(q.dtype)

    def tap(q: Array, k: Array) -> Array:
        inside = row_entropies(q[:, :window], k[:, :window], sliding)[:count].mean((0, 1))
        near, nearer = inside[window // 2 :].mean(), inside[window // 8 : window // 4].mean()
        growth = (near - nearer) / np.float32(np.log(4))  # the two bands are a factor of four apart

        def far(beta: Array) -> Array:
            return row_entropies(scaled(q, beta), k, sliding)[:count, :, window:].mean()

        betas = jnp.linspace(0.0, _STEEPEST, 7) / np.float32(np.log(window))
        # Entropy falls as beta grows, so the beta of an entropy is read from the points in reverse.
        beta = jnp.interp(near, jax.lax.map(far, betas)[::-1], betas[::-1])
        found.extend((beta, growth))
        return scaled(q, beta)

    x = _tapped(nnx.merge(graph, params), x, row, index, sliding, tap)
    beta, growth = found
    return x, beta, growth


def by_layer(found: Entropies) -> list[list[Mean]]:
    """Returns the mean over heads by layer and band, with the interval over documents."""
    means = found.means.mean(2)
    return [[student(means[:, layer, band]) for band in range(means.shape[2])] for layer in range(means.shape[1])]


def by_head(found: Entropies) -> list[list[list[Mean]]]:
    """Returns the mean by layer, head and band, with the interval over documents."""
    _, layers, heads, bands = found.means.shape
    return [
        [[student(found.means[:, layer, head, band]) for band in range(bands)] for head in range(heads)]
        for layer in range(layers)
    ]


def sides(edges: Sequence[int], window: int) -> tuple[Bool[np.ndarray, " bands"], Bool[np.ndarray, " bands"]]:
    """Returns which bands lie in the last half of a window of this many tokens, and which lie beyond it."""
    starts, ends = np.array(edges[:-1]), np.array(edges[1:])
    return (starts >= window // 2) & (ends <= window), starts >= window


def near_and_far(
    found: Entropies, window: int, end: int | None = None
) -> tuple[Float[np.ndarray, "documents layers"], Float[np.ndarray, "documents layers"]]:
    """Returns mean entropies, over heads, in the last half of the pretrained window and beyond it.

    Args:
      window: the pretrained window, in tokens.
      end: position up to which the bands beyond it count; None for all.

    Raises:
      InputError: no band lies beyond the window, or none in its last half.
    """
    inside, beyond = sides(found.edges, window)
    beyond &= np.array(found.edges[1:]) <= (end or found.edges[-1])
    if not inside.any() or not beyond.any():
        raise InputError(
            f"bands {','.join(map(str, found.edges))} have no part within {window // 2} to {window} tokens, the last "
            "half of the pretrained window, or none beyond it"
        )
    widths, means = np.diff(found.edges), found.means.mean(2)
    near, far = (np.average(means[..., part], axis=-1, weights=widths[part]) for part in (inside, beyond))
    return near, far


def drift(found: Entropies, window: int) -> list[Mean]:
    """Returns by layer the entropy beyond the pretrained window minus that in its last half, with the interval.

    Args:
      window: the pretrained window, in tokens.

    Raises:
      InputError: as for `near_and_far`.
    """
    near, far = near_and_far(found, window)
    return [student(change) for change in (far - near).T]
