"""Generation: prefill in chunks, layer by layer, then a decode loop that stays on the device.

Prompts of different lengths share a batch: each row starts in slot 0 of its cache and has its own position. Prefill
calls one compiled layer at a time, so a new shape costs the compilation of one layer. The decode loop is one program of
all layers; it samples tokens, checks stop tokens, and returns tokens in chunks.

With a scheme that follows the current length, each token past the pretrained window changes every key and, above the
first layer, every hidden state, so the whole cache becomes stale. The whole row is then read again for each token, as
the scheme is defined, unless `rope_length` fixes the length.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from eabf_jax.errors import InputError
from eabf_jax.inference import placement
from eabf_jax.inference.sampling import Numbers, Sampling, Steps, choose, split
from eabf_jax.inference.text import running_text
from eabf_jax.interop.tokenizer import Tokenizer
from eabf_jax.model import decoder
from eabf_jax.model.attention import Backend, needs_of, select
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.decoder import LayerWeights, Weights, WeightSource
from eabf_jax.model.kv_cache import LayerCache, empty_cache, grown
from eabf_jax.model.llama import Llama, Row, embedded, rotary_tables
from eabf_jax.parallel.rules import batch_ways, mesh_of, with_shardings

# Tokens per row that the decode loop generates before the host reads them.
TOKENS_AT_ONCE = 16
# Lengths are rounded up to multiples of at least this number, so that one program serves many lengths.
_SMALLEST = 16
# Finished rows produce this token as padding.
_NOTHING = -1


class Completion(NamedTuple):
    """The text generated for one prompt, so far or complete.

    Attributes:
      tokens: the new tokens, without the stop token.
      text: the new tokens as text, without the stop string; "" without a tokenizer.
      finish: why generation ended: a stop token, a stop string or `max_new_tokens`; None while it continues.
    """

    tokens: list[int]
    text: str
    finish: Literal["stop_token", "stop_string", "length"] | None


@dataclass(frozen=True)
class _Setup:
    """Static settings that programs are compiled for, in addition to the shapes of their arrays."""

    config: LlamaConfig
    dtype: Any
    backend: Backend
    chunk: int
    mesh: Mesh | None
    rope_length: int | None


class _State(NamedTuple):
    """The carry of the decode loop."""

    caches: tuple[LayerCache, ...]
    token: Int[Array, "B"]  # the newest token, not yet in the caches
    position: Int[Array, "B"]  # 0-based position of `token` in its row
    ended: Bool[Array, "B"]
    seen: Bool[Array, "B V"] | None  # tokens that occur in the row; None without a repetition penalty
    chosen: Int[Array, ""]  # number of tokens chosen per row


class _Choice(NamedTuple):
    """Sampling settings, random keys and stop tokens."""

    numbers: Numbers
    keys: Array
    stop_tokens: Int[Array, "stops"]


class Generator:
    """Generates text with a model."""

    def __init__(
        self,
        model: Llama | WeightSource,
        tokenizer: Tokenizer | None = None,
        *,
        mesh: Mesh | None = None,
        cache: str = "model",
        prefill_chunk: int = 8192,
        attention: str = "auto",
        rope_length: int | None = None,
    ):
        """Makes the weights of generation, in the compute dtype, from a model in memory or on disk.

        Args:
          model: a Llama without adapters, whose weights are copied, or what `open_weights` returns.
          tokenizer: for text, stop strings and the default stop tokens.
          mesh: splits heads over `tensor`, and rows over `data` and `fsdp`; None means the mesh that the model is on,
            else the default device.
          cache: "model" stores keys and values in the model's dtype, "int8" in 8 bits with a scale per token and head.
          prefill_chunk: tokens of each prompt that are read at a time.
          attention: the backend, a name in `model.attention.BACKENDS` or "auto".
          rope_length: the length in tokens that a dynamic scheme uses for all rows; None means each row's own length.
            Other schemes ignore it.

        Raises:
          InputError: an unknown name, a number that is not positive, a mesh that does not fit, or a model with
            adapters.
        """
        _check_count("prefill_chunk", prefill_chunk)
        if rope_length is not None:
            _check_count("rope_length", rope_length)
        if isinstance(model, Llama):
            mesh, model = mesh or mesh_of(model), decoder.source_of(model)
        empty_cache(1, 1, 1, 1, model.dtype, cache)  # raises if the kind is unknown
        backend = select(attention, model.dtype, model.config.head_dim, needs=needs_of(model.config))
        if mesh is not None:
            placement.check(mesh, model.config)
        self._setup = _Setup(model.config, model.dtype, backend, prefill_chunk, mesh, rope_length)
        self._weights = placement.weights_on(mesh, model)
        self._attention = attention
        self._cache_kind = cache
        self.config = model.config
        self.tokenizer = tokenizer

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[Completion]:
        """Continues prompts.

        Args:
          prompts, max_new_tokens, **options: as for `stream`.

        Returns:
          One completion per prompt, in the same order.
        Raises:
          InputError: as for `stream`.
        """
        *_, last = self.stream(prompts, max_new_tokens, **options)
        return last

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        seeds: int | Sequence[int] = 0,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
    ) -> Iterator[list[Completion]]:
        """Continues prompts, a few tokens at a time.

        A row's tokens depend on its prompt, its seed and the settings, and not on other rows, except for the rounding
        of products whose shapes differ.

        Args:
          prompts: token ids of each prompt, of any lengths.
          max_new_tokens: maximum number of tokens to add to each prompt.
          sampling: how tokens are chosen; None means greedy.
          seeds: random seeds, one for all rows or one per row.
          stop_tokens: ids that end a row; None means the tokenizer's, or without a tokenizer the model configuration's.
          stop_strings: strings that end a row when they appear in the new text.

        Yields:
          The completions so far, one per prompt in the same order; in the last list, every `finish` is set.
        Raises:
          InputError: no prompts, an empty prompt, text in place of ids, ids outside the vocabulary, stop strings
            without a tokenizer, a number out of range, or a prompt longer than `prefill_chunk` for a backend that
            returns no log-sum-exps.
        """
        rows = self._checked(prompts)
        _check_count("max_new_tokens", max_new_tokens)
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise InputError(f"sampling is {sampling!r:.80}; a Sampling is needed")
        each = _whole_numbers("seeds", [seeds] * len(rows) if _is_whole(seeds) else seeds, 2**32)
        if len(each) != len(rows):
            raise InputError(f"{len(each)} seeds for {len(rows)} prompts; one for each, or one for all, is needed")
        if isinstance(stop_strings, str) or not all(isinstance(text, str) for text in stop_strings):
            raise InputError(f"stop_strings is {stop_strings!r:.80}; a list of strings is needed")
        if stop_strings and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this model came without one")
        if "" in stop_strings:
            raise InputError("a stop string is empty; it would end every text at once")
        stops = (
            self._stop_tokens()
            if stop_tokens is None
            else tuple(_whole_numbers("stop_tokens", stop_tokens, self.config.vocab_size))
        )
        return self._stream(rows, max_new_tokens, sampling, each, stops, stop_strings)

    def _stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        stops: Sequence[int],
        stop_strings: Sequence[str],
    ) -> Iterator[list[Completion]]:
        made: list[list[int]] = [[] for _ in prompts]
        current = [Completion([], "", None) for _ in prompts]
        for tokens in self._tokens(prompts, max_new_tokens, sampling, seeds, stops):
            for row, new in enumerate(tokens[: len(prompts)].tolist()):
                if current[row].finish is None:
                    made[row] += [token for token in new if token != _NOTHING]
                    current[row] = self._completion(prompts[row], made[row], max_new_tokens, stops, stop_strings)
            yield list(current)
            if all(completion.finish for completion in current):
                return

    def next_token_logits(self, prompts: Sequence[Sequence[int]]) -> Float[np.ndarray, "prompts V"]:
        """Returns the logits of the token after each prompt, float32 [prompts, vocab_size].

        Args:
          prompts: token ids of each prompt, of any lengths.

        Raises:
          InputError: no prompts, an empty prompt, or ids outside the vocabulary.
        """
        rows = self._checked(prompts)
        padded = self._padded(rows)
        hidden, *_ = self._hidden(padded, max(map(len, rows)))
        return np.asarray(_logits(self._setup, self._ends(), hidden))[: len(rows)]

    def _checked(self, prompts: Any) -> list[list[int]]:
        """Checks the prompts and returns them as lists of ids in the vocabulary."""
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise InputError(f"prompts is {prompts!r:.80}; a list of prompts is needed, each a list of token ids")
        rows = [_whole_numbers(f"prompt {number}", row, self.config.vocab_size) for number, row in enumerate(prompts)]
        if not rows:
            raise InputError("no prompts; at least one is needed")
        if not all(rows):
            raise InputError(f"prompt {rows.index([])} is empty; at least one token is needed")
        return rows

    def _stop_tokens(self) -> tuple[int, ...]:
        if self.tokenizer is not None:
            return self.tokenizer.eos_ids
        ids = self.config.eos_token_id
        return () if ids is None else ids if isinstance(ids, tuple) else (ids,)

    def _completion(
        self,
        prompt: Sequence[int],
        made: Sequence[int],
        max_new_tokens: int,
        stops: Sequence[int],
        stop_strings: Sequence[str],
    ) -> Completion:
        """Builds a row's completion from all tokens generated for it."""
        ended = bool(made) and made[-1] in stops
        tokens = list(made[:-1] if ended else made)
        finish: Any = "stop_token" if ended else "length" if len(made) >= max_new_tokens else None
        if self.tokenizer is None:
            return Completion(tokens, "", finish)
        text, kept = running_text(self.tokenizer, prompt, tokens, stop_strings, is_whole=finish is not None)
        if kept is not None:
            return Completion(tokens[:kept], text, "stop_string")
        return Completion(tokens, text, finish)

    def _tokens(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        stops: Sequence[int],
    ) -> Iterator[np.ndarray]:
        """Yields new tokens in chunks, int32 [rows, tokens of the chunk]; `_NOTHING` where a row has ended."""
        rope = self.config.rope
        padded = self._padded(prompts)
        fillers = len(padded) - len(prompts)
        ended = self._row_array(np.arange(len(padded)) >= len(prompts))
        steps, numbers = split(sampling)
        choice = _Choice(
            numbers,
            self._row_array(jax.vmap(jax.random.key)(np.array([*seeds, *[0] * fillers], np.uint32))),
            jnp.array(stops, jnp.int32),
        )
        longest = max(map(len, prompts))
        # Past the pretrained window, each new token makes the cache of a length-following scheme stale.
        cached = max_new_tokens
        if rope.depends_on_length and self._setup.rope_length is None:
            cached = min(cached, dict(rope.frequencies.parameters)["pretrained_window"] - longest + 1)
        texts = [list(prompt) for prompt in padded]
        if cached > 0:
            read = self._read(padded, longest + cached - 1, steps, choice, ended)
            for tokens, newest in self._loop(read, longest, cached, steps, choice):
                _extend(texts, tokens)
                yield tokens
                ended = newest
        for chosen in range(max(cached, 0), max_new_tokens):
            state = self._read(texts, max(map(len, texts)), steps, choice, ended, chosen)
            tokens, ended = np.asarray(state.token)[:, None], state.ended
            _extend(texts, tokens)
            yield tokens

    def _loop(
        self, state: _State, length: int, count: int, steps: Steps, choice: _Choice
    ) -> Iterator[tuple[np.ndarray, Array]]:
        """Yields `count` tokens per row (the first from `state`, the rest from the loop), and which rows have ended."""
        total = length + count - 1
        yield np.asarray(state.token)[:, None], state.ended
        ahead: list[Array] = []
        # On a GPU, the host blocks until the loop ends, so the chunk is complete. Elsewhere the device computes the
        # next chunk while the host reads this one.
        most = 0 if jax.default_backend() == "gpu" else 1
        left = count - 1
        while left > 0:
            size = min(TOKENS_AT_ONCE, left)
            state = self._with_room(state, _slots(length + size, total))
            made, state = _decode(self._setup, steps, self._weights, state, choice, size)
            ahead.append(made)
            if len(ahead) > most:
                yield np.asarray(ahead.pop(0)), state.ended
            left, length = left - size, length + size
        if ahead:
            yield np.asarray(ahead.pop()), state.ended

    def _with_room(self, state: _State, slots: int) -> _State:
        """Returns the state with caches of at least `slots` slots."""
        if state.caches[0].k.shape[2] >= slots:
            return state
        caches, state = list(state.caches), state._replace(caches=())
        for number, cache in enumerate(caches):  # one at a time, so that the device never holds all of them twice
            caches[number] = _grown(cache, slots, self._setup.mesh)
        return state._replace(caches=tuple(caches))

    def _padded(self, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Returns the prompts, plus dummy prompts so that the mesh divides their number."""
        ways = 1 if self._setup.mesh is None else batch_ways(self._setup.mesh)
        return [*prompts, *[[0]] * (-len(prompts) % ways)]

    def _row_array(self, values: Any) -> Array:
        mesh = self._setup.mesh
        return jnp.asarray(values) if mesh is None else jax.device_put(values, placement.row_sharding(mesh))

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        total: int,
        steps: Steps,
        choice: _Choice,
        ended: Array,
        chosen: int = 0,
    ) -> _State:
        """Reads the prompts and chooses the first new token; `total` is the final length in tokens to have room for."""
        hidden, caches, lengths = self._hidden(prompts, total)
        seen = None
        if steps.penalize:
            present = np.zeros((len(prompts), self.config.vocab_size), np.bool_)
            for row, prompt in enumerate(prompts):
                present[row, list(prompt)] = True
            seen = self._row_array(present)
        logits = _logits(self._setup, self._ends(), hidden)
        return _first(self._setup.mesh, steps, logits, caches, lengths, ended, seen, jnp.int32(chosen), choice)

    def _hidden(
        self, prompts: Sequence[Sequence[int]], total: int
    ) -> tuple[Float[Array, "B D"], tuple[LayerCache, ...], Int[Array, "B"]]:
        """Returns the last layer's hidden state at each prompt's last token, the caches, and the prompts' lengths."""
        longest = max(map(len, prompts))
        chunks = _chunks(longest, self._setup.chunk)
        setups = [self._reading(chunk.start) for chunk in chunks]
        width = chunks[-1].stop
        tokens = np.zeros((len(prompts), width), np.int32)
        for number, prompt in enumerate(prompts):
            tokens[number, : len(prompt)] = prompt
        lengths = self._row_array(np.array([len(prompt) for prompt in prompts], np.int32))
        caches = self._empty_caches(len(prompts), max(_slots(longest + TOKENS_AT_ONCE, total), width))
        hidden = self._row_array(jnp.zeros((len(prompts), self.config.hidden_size), self._setup.dtype))
        for chunk, setup in zip(chunks, setups, strict=True):
            start = jnp.int32(chunk.start)
            x, row = _begin(self._setup, self._weights.embedding, self._row_array(tokens[:, chunk]), start, lengths)
            for index, weights in enumerate(self._weights.layers):
                place = (chunk.start, self.config.window_of(index))
                x, caches[index] = _read_layer(setup, place, weights, jnp.int32(index), x, row, caches[index])
            hidden = _collect(x, hidden, lengths, start)
        return hidden, tuple(caches), lengths

    def _reading(self, start: int) -> _Setup:
        """Returns the settings to read a chunk: past the first, the backend has to join it with the cache."""
        needs = (*needs_of(self.config), *(("forward",) if start else ()))
        backend = select(self._attention, self._setup.dtype, self.config.head_dim, needs=needs)
        return dataclasses.replace(self._setup, backend=backend)

    def _ends(self) -> Weights:
        return self._weights._replace(layers=())

    def _empty_caches(self, batch: int, slots: int) -> list[LayerCache]:
        config, mesh = self.config, self._setup.mesh
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        return [_empty(shape, self._setup.dtype, self._cache_kind, mesh) for _ in range(config.num_hidden_layers)]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_count(name: str, value: Any) -> None:
    if not _is_whole(value) or value < 1:
        raise InputError(f"{name} is {value!r}; a positive whole number is needed")


def _whole_numbers(name: str, values: Any, end: int) -> list[int]:
    """Checks values and returns them as a list of integers from 0 to `end` - 1."""
    if isinstance(values, str):
        raise InputError(f"{name} is the text {values!r:.80}; token ids are needed, as tokenizer.encode gives them")
    found = values.tolist() if isinstance(values, np.ndarray | jax.Array) else values
    found = list(found) if isinstance(found, Iterable) else found
    if not isinstance(found, list) or not all(map(_is_whole, found)):
        raise InputError(f"{name} is {values!r:.80}; a list of whole numbers is needed")
    if found and not 0 <= min(found) <= max(found) < end:
        wrong = next(number for number in found if not 0 <= number < end)
        raise InputError(f"{name}: {wrong} is out of range, expected 0 to {end - 1}")
    return [int(number) for number in found]


def _extend(texts: list[list[int]], tokens: np.ndarray) -> None:
    """Appends new tokens to their rows."""
    for text, new in zip(texts, tokens.tolist(), strict=True):
        text += [token for token in new if token != _NOTHING]


def _chunks(length: int, size: int) -> list[slice]:
    """Splits a prompt into chunks of equal size; a shorter last chunk is rounded up."""
    whole, rest = divmod(length, size)
    chunks = [slice(number * size, (number + 1) * size) for number in range(whole)]
    if rest:
        chunks.append(slice(whole * size, whole * size + min(_rounded(rest), size)))
    return chunks


def _slots(needed: int, total: int) -> int:
    """Returns a cache's number of slots: the next power of two, but at most the rounded final length."""
    return min(_power_of_two(needed), _rounded(total))


def _rounded(length: int) -> int:
    """Rounds a length up, by an eighth at most for lengths from 128, to get few shapes and little waste."""
    step = max(_SMALLEST, _power_of_two(length) // 16)
    return -(-length // step) * step


def _power_of_two(length: int) -> int:
    """Returns the smallest power of two that is at least `length`."""
    return 1 << (length - 1).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(shape: tuple[int, int, int, int], dtype: Any, kind: str, mesh: Mesh | None) -> LayerCache:
    """Creates a cache directly in its sharding, so that no device holds the parts of others."""
    return placement.on_mesh(mesh, empty_cache(*shape, dtype, kind))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _grown(cache: LayerCache, slots: int, mesh: Mesh | None) -> LayerCache:
    return placement.on_mesh(mesh, grown(cache, slots))


@functools.partial(jax.jit, static_argnums=0)
def _begin(
    setup: _Setup, embedding: Array, tokens: Int[Array, "B T"], start: Array, lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T D"], Row]:
    """Returns the hidden states before the first layer, and the per-token inputs that all layers share."""
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    length = lengths[:, None] if setup.rope_length is None else setup.rope_length
    row = _row(setup, positions, length)
    return embedded(setup.config, jnp.take(embedding, tokens, axis=0), setup.dtype), row


def _row(setup: _Setup, positions: Int[Array, "B T"], length: int | Array | None) -> Row:
    return Row(positions, *rotary_tables(setup.config.rope, setup.config.rotary_dim, positions, length), None)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4, 6))
def _read_layer(
    setup: _Setup,
    place: tuple[int, int | None],
    weights: LayerWeights,
    index: Array,
    x: Array,
    row: Row,
    cache: LayerCache,
) -> tuple[Array, LayerCache]:
    """Reads a chunk with one layer; `place` has the chunk's first position and the layer's sliding window."""
    start, window = place
    options = {"start": start, "window": window, "backend": setup.backend}
    attention = functools.partial(placement.chunk_attention, setup.mesh, options)
    return decoder.layer(setup.config, weights, index, x, row, cache, attention)


@jax.jit
def _collect(x: Float[Array, "B T D"], found: Float[Array, "B D"], lengths: Array, start: Array) -> Array:
    """Updates `found` with the hidden states of the last tokens that are in this chunk."""
    index = lengths - 1 - start
    inside = (index >= 0) & (index < x.shape[1])
    here = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(inside[:, None], here, found)


@functools.partial(jax.jit, static_argnums=0)
def _logits(setup: _Setup, ends: Weights, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    return decoder.next_token_logits(setup.config, ends, hidden)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="caches")
def _first(
    mesh: Mesh | None,
    steps: Steps,
    logits: Float[Array, "B V"],
    caches: tuple[LayerCache, ...],
    lengths: Array,
    ended: Array,
    seen: Array | None,
    chosen: Array,
    choice: _Choice,
) -> _State:
    """Returns the initial state of the decode loop; `token` is `_NOTHING` in rows that have already ended."""
    token = choose(logits, seen, choice.keys, chosen, steps, choice.numbers)
    token = jnp.where(ended, _NOTHING, token)
    ended |= jnp.isin(token, choice.stop_tokens)
    return _placed(mesh, _State(caches, token, lengths, ended, _marked(seen, token), chosen + 1))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def _decode(
    setup: _Setup,
    steps: Steps,
    weights: Weights,
    state: _State,
    choice: _Choice,
    size: int,
) -> tuple[Int[Array, "B chunk"], _State]:
    """Generates up to `size` tokens per row; stops early once every row has ended."""

    def attend(
        q: Array, k: Array, v: Array, cache: LayerCache, positions: Array, window: int | None
    ) -> tuple[Array, LayerCache]:
        q, k, v = (y[:, 0] for y in (q, k, v))
        options = {"backend": setup.backend, "window": window}
        out, cache = placement.token_attention(setup.mesh, options, q, k, v, cache, positions)
        return out[:, None], cache

    def step(carry: tuple[Array, Array, _State]) -> tuple[Array, Array, _State]:
        index, made, state = carry
        row = _row(setup, state.position[:, None], setup.rope_length)
        # Finished rows keep overwriting one slot; their output is ignored.
        x = jnp.take(weights.embedding, jnp.maximum(state.token, 0), axis=0)[:, None]
        x = embedded(setup.config, x, setup.dtype)
        caches = list(state.caches)
        for number, layer in enumerate(weights.layers):
            attention = functools.partial(attend, positions=state.position, window=setup.config.window_of(number))
            x, caches[number] = decoder.layer(setup.config, layer, number, x, row, caches[number], attention)
        logits = decoder.next_token_logits(setup.config, weights, x[:, 0])
        token = choose(logits, state.seen, choice.keys, state.chosen, steps, choice.numbers)
        token = jnp.where(state.ended, _NOTHING, token)
        made = jax.lax.dynamic_update_slice_in_dim(made, token[:, None], index, 1)
        state = _State(
            tuple(caches),
            token,
            jnp.where(state.ended, state.position, state.position + 1),
            state.ended | jnp.isin(token, choice.stop_tokens),
            _marked(state.seen, token),
            state.chosen + 1,
        )
        return index + 1, made, state

    def goes_on(carry: tuple[Array, Array, _State]) -> Array:
        index, _, state = carry
        return (index < size) & ~state.ended.all()

    made = jnp.full((state.token.shape[0], TOKENS_AT_ONCE), _NOTHING, jnp.int32)
    _, made, state = jax.lax.while_loop(goes_on, step, (jnp.int32(0), made, state))
    return made, _placed(setup.mesh, state)


def _placed(mesh: Mesh | None, state: _State) -> _State:
    """Pins a state's layout, so that the first call of the loop and the later ones share a program."""
    if mesh is None:
        return state
    rows, everywhere = placement.row_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    places = jax.tree.map(lambda x: rows if x.ndim else everywhere, state._replace(caches=()))
    caches = tuple(placement.on_mesh(mesh, cache) for cache in state.caches)
    return jax.lax.with_sharding_constraint(state._replace(caches=()), places)._replace(caches=caches)


def _marked(seen: Array | None, token: Array) -> Array | None:
    """Adds the newest token of each row to `seen`."""
    if seen is None:
        return None
    return seen | (jnp.arange(seen.shape[1]) == token[:, None])


def lower_generation(
    config: LlamaConfig, dtype: Any, mesh: Mesh, window: int, prefill_chunk: int = 8192
) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
    """Lowers generation to the end of a window from shapes alone, with one row per part of the batch.

    Args:
      dtype: dtype of weights, computation and cache.
      window: tokens of prompt and continuation together.
      prefill_chunk: as for `Generator`.

    Returns:
      One layer that reads the last chunk of a prompt, and the decode loop of all layers.
    """
    dtype, batch, slots = jnp.dtype(dtype), batch_ways(mesh), _rounded(window)
    backend = select("auto", dtype, config.head_dim, mesh.devices.flat[0].platform, needs=needs_of(config))
    setup = _Setup(config, dtype, backend, prefill_chunk, mesh, None)
    steps, numbers = split(Sampling())
    rows, everywhere = placement.row_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def there(shapes: Any) -> Any:
        """Adds their shardings to the shapes of row arrays and scalars."""
        at = jax.tree.map(lambda x: rows if x.ndim and x.shape[0] == batch else everywhere, shapes)
        return with_shardings(shapes, at)

    def inputs() -> tuple[_State, _Choice, Array, Row]:
        row = jnp.zeros(batch, jnp.int32)
        size = min(window, prefill_chunk)
        tables = _row(setup, jnp.zeros((batch, size), jnp.int32), row[:, None])
        choice = _Choice(jax.tree.map(jnp.asarray, numbers), jax.vmap(jax.random.key)(row), jnp.zeros(1, jnp.int32))
        x = jnp.zeros((batch, size, config.hidden_size), dtype)
        return _State((), row, row, row > 0, None, jnp.int32(1)), choice, x, tables

    state, choice, x, tables = there(jax.eval_shape(inputs))
    shape = (batch, config.num_key_value_heads, slots, config.head_dim)
    cache = jax.eval_shape(lambda: empty_cache(*shape, dtype))
    cache = with_shardings(cache, placement.cache_sharding(mesh, cache))
    weights = placement.weight_shapes(mesh, config, dtype)
    start = (window - 1) // prefill_chunk * prefill_chunk
    index = there(jax.eval_shape(lambda: jnp.int32(0)))
    prefill = _read_layer.lower(setup, (start, config.window_of(0)), weights.layers[0], index, x, tables, cache)
    state = state._replace(caches=(cache,) * config.num_hidden_layers)
    return prefill, _decode.lower(setup, steps, weights, state, choice, TOKENS_AT_ONCE)
