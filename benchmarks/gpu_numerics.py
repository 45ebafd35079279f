"""Compares what a GPU computes with float32 references: training, prefill and decoding, under every rotary scheme.

python benchmarks/gpu_numerics.py --json benchmarks/results/gpu_numerics_h200.json
python benchmarks/gpu_numerics.py --device cpu --schemes eabf --json OUT.json

Attention kernels and entropies are compared with NumPy in float64. Models of three layers are compared with the same
model in float32 with dense attention and JAX's own gradients. The comparisons are the loss and the gradients of every
kind of parameter and of hidden states in the programs of the layerwise step, logits of prompts read in chunks, and
logits of tokens decoded from a cache by rows of different lengths, in bfloat16 and with an int8 cache.

An error is |a - b| / |b| in the Euclidean norm. It may be at most twice the error of a plain bfloat16 computation with
dense attention that writes out every attention weight. Both round the same numbers to 8 bits in different order, so
their errors have the same size, while a wrong mask, scale or position makes one many times larger. If keys and values
are rounded to int8, the plain computation rounds them too. Exit status 1 means that an error exceeds its limit.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from provenance import record

from eabf_jax.cli import run
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.interop.directory import write_json

LENIENCE = 2.0
# Values of the schemes' parameters without a default; `pretrained_window` is shorter than the text, so it has an
# effect.
FACTOR, LOW, HIGH = 4.0, 1.0, 4.0


class Sizes(NamedTuple):
    """The sizes of the comparisons.

    Attributes:
      length: tokens per row in training, and of a text with its continuation.
      chunk: tokens of a prompt read at a time.
      window: pretrained window of the schemes.
      decoded: number of decoded tokens.
      hidden: hidden size of the model.
      head_dim: head size of the model that every scheme is tried on.
      wide: head size of another model; None for none.
      policies: remat policies for EABF; other schemes use the first one.
      lengths: row lengths for the attention kernels.
      slots: sizes of the caches that a token attends to: XLA's products read the small ones, cuDNN the large ones.
      caches: kinds of caches.
      entropies: row lengths for attention entropies.
    """

    length: int
    chunk: int
    window: int
    decoded: int
    hidden: int
    head_dim: int
    wide: int | None
    policies: tuple[str, ...]
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    caches: tuple[str, ...]
    entropies: tuple[int, ...]


# On the GPU, caches have more than 1,024 slots, so that cuDNN's kernel attends to them.
SIZES = {
    "gpu": Sizes(
        length=1200, chunk=600, window=256, decoded=5, hidden=256, head_dim=64, wide=128,
        policies=("dots", "full", "attention", "qkv", "none"), lengths=(64, 128, 200, 257, 1000), slots=(512, 1536),
        caches=("model", "int8"), entropies=(200, 1000, 2500),
    ),
    "cpu": Sizes(
        length=40, chunk=24, window=12, decoded=2, hidden=32, head_dim=8, wide=None, policies=("dots",), lengths=(33,),
        slots=(48,), caches=("int8",), entropies=(300,),
    ),
}  # fmt: skip
# XLA's CPU backend lacks bfloat16 products that the backward pass of `chunked` needs.
BACKENDS = {"gpu": "auto", "cpu": "reference"}
HEADS, KV_HEADS, LAYERS, VOCABULARY = 4, 2, 3, 256  # EABF's multiplier begins at the third layer


def distance(found: Any, expected: Any) -> float:
    """Returns |found - expected| / |expected|, in float64."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def comparison(path: str, what: str, found: Any, plain: Any, expected: Any, **where: Any) -> dict[str, Any]:
    """Compares a result with its reference.

    Args:
      path: the code that computed it.
      what: name of the result.
      found: the result.
      plain: the result of the plain bfloat16 computation.
      expected: the reference.
      **where: scheme and shape.

    Returns:
      Both errors, the limit, and whether the result is within it.
    """
    error, usual = distance(found, expected), distance(plain, expected)
    limit = LENIENCE * usual
    # A comparison with NaN is false.
    return {"path": path, **where, "what": what, "error": error, "plain_error": usual, "limit": limit,
            "within": error <= limit}  # fmt: skip


# Attention alone, against float64.


def dense(q: Any, k: Any, v: Any, mask: Any, d_out: Any) -> dict[str, np.ndarray]:
    """Computes attention and its gradients, written out in float64.

    Args:
      q: [batch, length, heads, head_dim].
      k: [batch, keys, kv_heads, head_dim].
      v: [batch, keys, kv_heads, head_dim].
      mask: [batch, length, keys], true where a query sees a key.
      d_out: gradient of the output.

    Returns:
      `out`, `d_q`, `d_k` and `d_v`.
    """
    # [batch, kv_heads, heads of each, tokens, head_dim]: matrix products run over the last two axes.
    rows, kv_heads, head_dim = k.shape[0], k.shape[2], k.shape[3]

    def by_head(x: Any) -> np.ndarray:
        return np.asarray(x, np.float64).reshape(rows, x.shape[1], kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)

    def by_token(x: np.ndarray) -> np.ndarray:
        return x.transpose(0, 3, 1, 2, 4).reshape(rows, x.shape[3], -1, head_dim)

    q, k, v, d_out = (by_head(x) for x in (q, k, v, d_out))
    logits = np.where(mask[:, None, None], q @ k.mT, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = d_out @ v.mT
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    # All heads of a group share a key.
    d_k, d_v = ((x.mT @ y).sum(2, keepdims=True) for x, y in ((d_logits, q), (weights, d_out)))
    found = {"out": weights @ v, "d_q": d_logits @ k, "d_k": d_k, "d_v": d_v}
    return {name: by_token(x) for name, x in found.items()}


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Any]:
    """Draws normal numbers in bfloat16; the first shape, the queries, is scaled for logits of unit variance."""
    import jax.numpy as jnp

    random = np.random.default_rng(seed)
    scales = [shapes[0][-1] ** -0.5, *[1.0] * (len(shapes) - 1)]
    return [jnp.asarray(random.normal(0, s, shape), jnp.bfloat16) for s, shape in zip(scales, shapes, strict=True)]


def attention_case(backend: str, length: int, kv_heads: int, head_dim: int, packed: bool) -> list[dict[str, Any]]:
    """Checks a training kernel, forward and backward, on rows of one length."""
    import jax
    import jax.numpy as jnp

    from eabf_jax.model import attention

    rows = 2
    q, k, v, d_out = drawn(length, *[(rows, length, n, head_dim) for n in (HEADS, kv_heads, kv_heads, HEADS)])
    index = np.arange(length)
    ids = np.stack([index >= length // 3, index >= length // 2]).astype(np.int32)
    mask = np.broadcast_to(index[:, None] >= index, (rows, length, length))
    if packed:
        mask = mask & (ids[:, :, None] == ids[:, None])

    def results(name: str) -> dict[str, Any]:
        @jax.jit
        def both(q: Any, k: Any, v: Any, d_out: Any) -> Any:
            segments = jnp.asarray(ids) if packed else None
            out, pullback = jax.vjp(lambda q, k, v: attention.BACKENDS[name](q, k, v, segments), q, k, v)
            return out, *pullback(d_out)

        return dict(zip(("out", "d_q", "d_k", "d_v"), both(q, k, v, d_out), strict=True))

    found, plain, expected = results(backend), results("reference"), dense(q, k, v, mask, d_out)
    where = {"length": length, "kv_heads": kv_heads, "head_dim": head_dim, "packed": packed}
    return [comparison(f"attention, {backend}", x, found[x], plain[x], expected[x], **where) for x in expected]


def int8_rounded(x: Any) -> Any:
    """Rounds keys or values to 8 bits, with a separate scale for each token and head."""
    import jax.numpy as jnp

    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(-1, keepdims=True) / 127
    return (jnp.round(wide / scale) * scale).astype(x.dtype)


def token_case(backend: str, slots: int, kv_heads: int, head_dim: int, kind: str) -> list[dict[str, Any]]:
    """Checks one query per row against a cache that rows of different lengths fill in part."""
    import jax
    import jax.numpy as jnp

    from eabf_jax.model import attention
    from eabf_jax.model.kv_cache import attend_chunk, attend_token, empty_cache

    lengths = np.array([slots, slots // 2 + 1, 7])
    rows = len(lengths)
    q, k, v = drawn(slots, (rows, slots, HEADS, head_dim), *[(rows, slots, kv_heads, head_dim)] * 2)
    last = lengths - 1
    newest = [np.take_along_axis(np.asarray(x), last[:, None, None, None], 1)[:, 0] for x in (q, k, v)]

    @jax.jit
    def found(q: Any, k: Any, v: Any, newest: Any, positions: Any) -> Any:
        cache = empty_cache(rows, kv_heads, slots, head_dim, jnp.bfloat16, kind)
        _, cache = attend_chunk(q, k, v, cache, start=0, backend=attention.BACKENDS[backend])
        # Slots beyond a row's end must not be seen.
        beyond = jnp.arange(slots) >= positions[:, None, None]
        cache = cache._replace(
            k=jnp.where(beyond[..., None], 100, cache.k).astype(cache.k.dtype),
            v=jnp.where(beyond[..., None], 100, cache.v).astype(cache.v.dtype),
        )
        one_q, one_k, one_v = newest
        return attend_token(one_q, one_k, one_v, cache, positions, backend=attention.BACKENDS[backend])[0]

    rounded = int8_rounded if kind == "int8" else lambda x: x

    @jax.jit
    def plain(q: Any, k: Any, v: Any) -> Any:
        return attention.BACKENDS["reference"](q, rounded(k), rounded(v))

    seen = np.arange(slots) < lengths[:, None, None]
    alone = newest[0][:, None]
    expected = dense(alone, np.asarray(k), np.asarray(v), seen, alone)["out"][:, 0]
    usual = np.take_along_axis(np.asarray(plain(q, k, v), np.float32), last[:, None, None, None], 1)[:, 0]
    got = found(q, k, v, [jnp.asarray(x) for x in newest], jnp.asarray(last, jnp.int32))
    where = {"slots": slots, "kv_heads": kv_heads, "head_dim": head_dim, "cache": kind}
    return [comparison(f"a token's attention, {backend}", "out", got, usual, expected, **where)]


def entropy_case(length: int, kv_heads: int, head_dim: int, window: int | None) -> list[dict[str, Any]]:
    """Checks attention entropies, whose blocks are shorter than the longest rows."""
    import jax
    import jax.numpy as jnp

    from eabf_jax.analysis.attention_entropy import row_entropies

    q, k = drawn(length, (2, length, HEADS, head_dim), (2, length, kv_heads, head_dim))
    index = np.arange(length)
    mask = (index[:, None] >= index) & (index[:, None] - index < (window or length))

    def entropies(np_: Any, logits: Any) -> Any:
        weights = np_.exp(logits - logits.max(-1, keepdims=True)) * mask
        weights = weights / weights.sum(-1, keepdims=True)
        return -(weights * np_.log(np_.where(weights > 0, weights, 1))).sum(-1)

    @jax.jit
    def plain(q: Any, k: Any) -> Any:
        logits = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, HEADS // kv_heads, 2))
        return entropies(jnp, jnp.where(mask, logits, -1e30).astype(jnp.float32))

    wide_q, wide_k = (np.asarray(x, np.float64) for x in (q, k))
    logits = np.einsum("btnh,bsnh->bnts", wide_q, np.repeat(wide_k, HEADS // kv_heads, 2))
    expected = entropies(np, np.where(mask, logits, -1e30))
    found = jax.jit(lambda q, k: row_entropies(q, k, window))(q, k)
    where = {"length": length, "kv_heads": kv_heads, "head_dim": head_dim, "window": window}
    return [comparison("attention entropy", "entropy", found, plain(q, k), expected, **where)]


# Whole models, against float32.


def scheme_of(name: str, window: int, head_dim: int) -> Any:
    """Builds a scheme by name, extended beyond a pretrained window."""
    from eabf_jax.rope import parameters_of, scheme

    divisors = np.linspace(1.0, FACTOR, head_dim // 2).tolist()
    values = {"base": 10_000.0, "factor": FACTOR, "pretrained_window": window, "low_freq_factor": LOW,
              "high_freq_factor": HIGH, "short_factor": [1.0] * len(divisors), "long_factor": divisors}  # fmt: skip
    needed = {key for key, (_, default) in parameters_of(name).items() if default is MISSING}
    return scheme(name, **{key: values[key] for key in needed})


def configuration(sizes: Sizes, rope: Any, head_dim: int) -> Any:
    """Returns the configuration of a small model."""
    from eabf_jax.model import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=head_dim,
        max_position_embeddings=sizes.window,
        eos_token_id=None,
        rope=rope,
    )


class Dense:
    """A model with dense attention: the reference in float32, and the plain computation in bfloat16."""

    def __init__(self, config: Any, parameters: Any, dtype: str, rounded: Callable[[Any], Any] = lambda x: x):
        """Stores the model without compiling anything; `rounded` is applied to keys and values."""
        import jax
        import jax.numpy as jnp

        from eabf_jax.model import Llama, attention

        def rounding(q: Any, k: Any, v: Any, ids: Any) -> Any:
            return attention.BACKENDS["reference"](q, rounded(k), rounded(v), ids)

        model = Llama.abstract(config, dtype=dtype, param_dtype=dtype, attention=rounding)
        self._parameters = jax.tree.map(lambda x: x.astype(dtype), parameters)

        def loss(parameters: Any, tokens: Any, targets: Any) -> Any:
            logits = model.with_parameters(parameters)(tokens)
            chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
            return (jax.nn.logsumexp(logits, -1) - chosen).sum(), logits

        def logits(parameters: Any, tokens: Any, segment_ids: Any) -> Any:
            return model.with_parameters(parameters)(tokens, segment_ids=segment_ids)

        self._both, self._logits = jax.jit(jax.value_and_grad(loss, has_aux=True)), jax.jit(logits)

    def loss_and_gradients(self, tokens: Any, targets: Any) -> tuple[Any, Any]:
        """Returns the sum of the losses, and its gradients."""
        (total, _), gradients = self._both(self._parameters, tokens, targets)
        return total, gradients

    def logits_after(self, texts: Sequence[Sequence[int]], width: int) -> np.ndarray:
        """Returns the logits of the token after each text; texts are padded to one width with another segment."""
        tokens = np.zeros((len(texts), width), np.int32)
        ids = np.ones((len(texts), width), np.int32)
        for row, text in enumerate(texts):
            tokens[row, : len(text)], ids[row, : len(text)] = text, 0
        found = np.asarray(self._logits(self._parameters, tokens, ids))
        return np.stack([found[row, len(text) - 1] for row, text in enumerate(texts)])


def as_in_training(
    config: Any, parameters: Any, backend: str, policy: str, tokens: Any, targets: Any
) -> tuple[Any, Any]:
    """Computes loss and gradients like the layerwise step: a program for each piece, bfloat16, gradients in float32."""
    import jax
    import jax.numpy as jnp

    from eabf_jax.model import Llama
    from eabf_jax.training.backward import Microbatch, Pieces, add, head_parameters, zeros

    model = Llama.abstract(config, dtype="bfloat16", param_dtype="float32", attention=backend)
    pieces = Pieces(model, tokens.shape[1] // 2 + 1, wide=True)
    parameters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rows = Microbatch(jnp.asarray(tokens), jnp.asarray(targets), jnp.ones(tokens.shape, bool), positions, None)
    layers = [jax.tree.map(lambda x, i=i: x[i], parameters["layers"]) for i in range(LAYERS)]
    numbers = [jnp.int32(i) for i in range(LAYERS)]
    row = jax.jit(pieces.row)(rows)
    x = jax.jit(pieces.embed)(parameters["embed_tokens"], rows.tokens)
    forward = jax.jit(functools.partial(pieces.forward, policy))
    backward = jax.jit(functools.partial(pieces.backward, policy))
    kept = []
    for number, layer in zip(numbers, layers, strict=True):
        y, saved = forward(layer, {}, number, x, row)
        kept.append((x, saved))
        x = y
    gradients = {name: zeros(tree) for name, tree in parameters.items() if name != "layers"}
    trained, sums = (head_parameters(tree, tied=False) for tree in (parameters, gradients))
    total, sums, d_x = jax.jit(pieces.head)(trained, {}, x, rows, sums)
    gradients.update(sums)
    by_layer: list[Any] = []
    for number in reversed(range(LAYERS)):
        x, saved = kept[number]
        found, d_x = backward(layers[number], {}, numbers[number], x, row, saved, d_x)
        by_layer.insert(0, add(zeros(found), found))
    gradients["embed_tokens"] = jax.jit(pieces.embed_backward)(gradients["embed_tokens"], rows.tokens, d_x)
    gradients["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *by_layer)
    return total, gradients


def named(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by dotted name."""
    import jax

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


class Case:
    """One model and one text for all comparisons."""

    def __init__(self, sizes: Sizes, backend: str, name: str, head_dim: int):
        """Draws weights and tokens without computing anything."""
        import jax
        import jax.numpy as jnp

        from eabf_jax.model import Llama

        self._sizes, self._backend = sizes, backend
        self._where = {"scheme": name, "head_dim": head_dim}
        self._config = configuration(sizes, scheme_of(name, sizes.window, head_dim), head_dim)
        random = np.random.default_rng(1)

        def draw(path: Any, leaf: Any) -> Any:
            # Sizes that keep activations near 1. The values are exact in bfloat16, so that references begin with the
            # same weights.
            sizes = {"scale": (1.0, 0.1), "embedding": (0.0, 1.0), "kernel": (0.0, leaf.shape[-2:][0] ** -0.5)}
            return jnp.asarray(random.normal(*sizes[path[-1].key], leaf.shape), jnp.bfloat16).astype(jnp.float32)

        self._parameters = jax.tree_util.tree_map_with_path(draw, Llama.abstract(self._config).parameters())
        self._exact = Dense(self._config, self._parameters, "float32")
        self._plain = Dense(self._config, self._parameters, "bfloat16")
        self._tokens, self._targets = random.integers(0, VOCABULARY, (2, 2, sizes.length)).astype(np.int32)

    def training(self, policies: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Compares loss and gradients."""
        texts = self._tokens, self._targets
        loss, gradients = self._exact.loss_and_gradients(*texts)
        plain_loss, plain_gradients = self._plain.loss_and_gradients(*texts)
        for policy in policies:
            total, found = as_in_training(self._config, self._parameters, self._backend, policy, *texts)
            where, path = {**self._where, "remat": policy}, f"training, {self._backend}"
            # In a single number, the plain computation's roundings may cancel by chance. The limit is twice the largest
            # relative change from rounding to 8 bits.
            error, limit = distance(total, loss), LENIENCE * 2.0**-9
            yield {"path": path, **where, "what": "loss", "error": error, "limit": limit,
                   "plain_error": distance(plain_loss, loss), "within": error <= limit}  # fmt: skip
            exact, plain = named(gradients), named(plain_gradients)
            for name, gradient in named(found).items():
                yield comparison(path, f"gradient of {name}", gradient, plain[name], exact[name], **where)

    def generation(self, kind: str) -> Iterator[dict[str, Any]]:
        """Compares logits after prompts of different lengths, read in chunks, and after a few decoded tokens."""
        import jax.numpy as jnp

        from eabf_jax.inference import Generator
        from eabf_jax.model import Llama

        sizes, config = self._sizes, self._config
        model = Llama.from_params(
            config, self._parameters, dtype="bfloat16", param_dtype="float32", attention=self._backend
        )
        generator = Generator(model, cache=kind, prefill_chunk=sizes.chunk, attention=self._backend)
        plain = self._plain
        if kind == "int8":
            plain = Dense(config, self._parameters, "bfloat16", int8_rounded)
        longest = sizes.length - sizes.decoded
        prompts = [self._tokens[row, : longest - 37 * row * sizes.length // 400].tolist() for row in range(2)]
        where = {**self._where, "cache": kind}

        def compared(path: str, found: Any, texts: list[list[int]]) -> dict[str, Any]:
            logits = (model.logits_after(texts, sizes.length) for model in (plain, self._exact))
            return comparison(f"{path}, {self._backend}", "logits", found, *logits, **where)

        yield compared("prefill", generator.next_token_logits(prompts), prompts)
        texts = [list(prompt) for prompt in prompts]
        completions = generator.generate(prompts, sizes.decoded + 1)
        if not config.rope.depends_on_length:  # otherwise every token reads the texts again, like prompts
            decode = decoding(generator, prompts, longest + sizes.decoded)
            for step in range(sizes.decoded):
                for text, completion in zip(texts, completions, strict=True):
                    text.append(completion.tokens[step])
                newest = jnp.asarray([text[-1] for text in texts], jnp.int32)
                found = decode(newest, jnp.asarray([len(text) - 1 for text in texts], jnp.int32))
                yield compared(f"decode, token {step + 1}", found, texts)
        yield self._choices(prompts, completions, plain, where)

    def _choices(self, prompts: Any, completions: Any, plain: Dense, where: dict[str, Any]) -> dict[str, Any]:
        """Measures how far the tokens of the compiled loop are below the reference's likeliest tokens, in logits."""
        worst = limit = 0.0
        for made in range(self._sizes.decoded + 1):
            texts = [p + c.tokens[:made] for p, c in zip(prompts, completions, strict=True)]
            exact, rounded = (model.logits_after(texts, self._sizes.length) for model in (self._exact, plain))
            chosen = np.array([c.tokens[made] for c in completions])
            worst = max(worst, float((exact.max(-1) - exact[np.arange(len(chosen)), chosen]).max()))
            # Two tokens are compared, and the logit of each may be off by the limit of a logit.
            limit = max(limit, 2 * LENIENCE * float(np.abs(rounded - exact).max()))
        return {"path": f"generate, {self._backend}", **where, "what": "logits of greedy tokens below the likeliest",
                "error": worst, "plain_error": limit / (2 * LENIENCE), "limit": limit,
                "within": worst <= limit}  # fmt: skip


def decoding(generator: Any, prompts: Any, total: int) -> Callable[[Any, Any], Any]:
    """Returns the step of the generator's loop up to the logits, on caches that hold the prompts."""
    import jax
    import jax.numpy as jnp

    from eabf_jax.inference import placement
    from eabf_jax.model import decoder
    from eabf_jax.model.llama import Row, rotary_tables

    setup, weights = generator._setup, generator._weights
    caches = list(generator._hidden(prompts, total)[1])

    @jax.jit
    def step(weights: Any, caches: Any, token: Any, position: Any) -> Any:
        caches = list(caches)

        def attend(q: Any, k: Any, v: Any, cache: Any) -> Any:
            q, k, v = (y[:, 0] for y in (q, k, v))
            out, cache = placement.token_attention(None, {"backend": setup.backend}, q, k, v, cache, position)
            return out[:, None], cache

        positions = position[:, None]
        row = Row(positions, *rotary_tables(setup.config.rope, setup.config.head_dim, positions, None), None)
        x = jnp.take(weights.embedding, token, axis=0)[:, None]
        for number, layer in enumerate(weights.layers):
            x, caches[number] = decoder.layer(setup.config, layer, number, x, row, caches[number], attend)
        return decoder.next_token_logits(setup.config, weights, x[:, 0]), caches

    def decode(token: Any, position: Any) -> Any:
        logits, caches[:] = step(weights, caches, token, position)
        return logits

    return decode


def model_case(sizes: Sizes, backend: str, name: str, head_dim: int, policies: Sequence[str]) -> list[dict[str, Any]]:
    """Checks a whole model under one scheme, in training and in generation."""
    case = Case(sizes, backend, name, head_dim)
    return [*case.training(policies), *(x for kind in sizes.caches for x in case.generation(kind))]


Job = Callable[[], list[dict[str, Any]]]


def jobs(sizes: Sizes, backend: str, schemes: Sequence[str]) -> list[Job]:
    """Lists all comparisons as independent jobs."""
    model, first = functools.partial(model_case, sizes, backend), sizes.policies[:1]
    found: list[Job] = [
        functools.partial(model, name, sizes.head_dim, sizes.policies if name == "eabf" else first) for name in schemes
    ]
    heads = [(KV_HEADS, sizes.head_dim)]
    if sizes.wide is not None:
        heads.append((HEADS, sizes.wide))
        found += [functools.partial(model, name, sizes.wide, first) for name in schemes if name == "eabf"]
    for kv_heads, head_dim in heads:
        kernels = [(length, False) for length in sizes.lengths] + [(length, True) for length in sizes.lengths[-1:]]
        for length, packed in kernels:
            found.append(functools.partial(attention_case, backend, length, kv_heads, head_dim, packed))
        for length, window in itertools.product(sizes.entropies, (None, 100)):
            found.append(functools.partial(entropy_case, length, kv_heads, head_dim, window))
        for slots, kind in itertools.product(sizes.slots, sizes.caches):
            found.append(functools.partial(token_case, backend, slots, kv_heads, head_dim, kind))
    return found


def done(running: Sequence[Job], workers: int) -> Iterator[list[dict[str, Any]]]:
    """Yields the results of each job as it ends; several workers run in separate processes.

    They are not threads, because cuDNN records a CUDA graph when it loads a plan, and another thread's work breaks
    that.
    """
    if workers == 1:
        yield from (job() for job in running)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from (job.result() for job in as_completed([pool.submit(job) for job in running]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="gpu", help="gpu, or cpu: small shapes and XLA's attention (default: gpu)")
    parser.add_argument("--schemes", help="rotary schemes, separated by commas (default: every one)")
    parser.add_argument("--workers", type=int, default=8, help="processes (default: 8)")
    parser.add_argument("--json", type=Path, help="write every comparison here")
    options = parser.parse_args()
    if options.device not in SIZES:
        raise unknown_name("device", options.device, SIZES)
    os.environ.setdefault("JAX_PLATFORMS", {"gpu": "cuda", "cpu": "cpu"}[options.device])
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share the device
    import jax
    import jax.numpy as jnp

    from eabf_jax.model.attention import select
    from eabf_jax.parallel.mesh import gpu_defaults
    from eabf_jax.rope import scheme_names

    gpu_defaults()

    schemes = options.schemes.split(",") if options.schemes else list(scheme_names())
    for name in schemes:
        if name not in scheme_names():
            raise unknown_name("rotary scheme", name, scheme_names())
    begun, sizes = time.perf_counter(), SIZES[options.device]
    try:
        kind = jax.devices()[0].device_kind
    except RuntimeError as error:
        raise InputError(f"--device {options.device}: {error}; --device cpu runs small shapes anywhere") from error
    backend = select(BACKENDS[options.device], jnp.dtype("bfloat16"), sizes.head_dim).name
    figures = {
        **record("gpu_numerics"),
        "device": kind,
        "backend": backend,
        "lenience": LENIENCE,
    }
    found: list[dict[str, Any]] = []
    running = jobs(sizes, backend, schemes)
    for number, part in enumerate(done(running, options.workers), 1):
        found += part
        where = ", ".join(str(part[-1][key]) for key in ("path", "scheme", "length", "slots") if key in part[-1])
        print(f"{number}/{len(running)} after {time.perf_counter() - begun:.0f} s: {where}", flush=True)
    beyond = [x for x in found if not x["within"]]
    figures |= {"seconds": time.perf_counter() - begun, "beyond": len(beyond), "comparisons": found}
    if options.json:
        write_json(options.json, figures)
    for x in beyond:
        where = ", ".join(
            str(value) for key, value in x.items() if key not in ("error", "plain_error", "limit", "within")
        )
        print(f"beyond the limit: {where}: {x['error']:.2e}, at most {x['limit']:.2e}", file=sys.stderr)
    worst = max(found, key=lambda x: x["error"] / x["limit"])
    print(
        f"{len(found)} comparisons on {kind}, {backend} attention: {len(beyond)} beyond their limits; the "
        f"nearest at {worst['error'] / worst['limit']:.0%} of it ({worst['path']}, {worst['what']})"
    )
    if beyond:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
