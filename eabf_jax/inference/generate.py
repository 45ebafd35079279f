"""Generation: prompts are read in chunks, layer by layer; then tokens are made in a loop that stays on the device.

Prompts of different lengths share a batch: each row starts in slot 0 of its cache and keeps its own position. Reading
runs one compiled layer after another, so that a new shape costs the compilation of one layer; the decode loop is one
program of all layers, which knows how to choose tokens and when to stop, and hands tokens out by the chunk.

A scheme that follows the current length changes every key and, above the first layer, every hidden state with each
token past the pretrained window: nothing in a cache stays true. There the whole row is read again for each token, which
is what the scheme means, unless `rope_length` fixes the length that it follows.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from eabf_jax.errors import InputError
from eabf_jax.inference import placement
from eabf_jax.inference.sampling import Numbers, Sampling, Steps, choose, split
from eabf_jax.inference.text import running_text
from eabf_jax.interop.tokenizer import Tokenizer
from eabf_jax.model import decoder
from eabf_jax.model.attention import select
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.decoder import LayerWeights, Weights
from eabf_jax.model.kv_cache import LayerCache, empty_cache, grown
from eabf_jax.model.llama import Llama, Row
from eabf_jax.parallel.rules import batch_ways

# Tokens that the decode loop makes before the host looks at them.
TOKENS_AT_ONCE = 16
# Shapes are multiples of this at least: of lengths that differ by less, one program serves all.
_SMALLEST = 16
# A row that has ended says this where others say a token.
_NOTHING = -1


class Completion(NamedTuple):
    """What was generated for one prompt, so far or in all.

    Attributes:
      tokens: the new tokens, without the one that ended them.
      text: them as text, without a stop string; "" without a tokenizer.
      finish: why it ended: a stop token, a stop string or the number of tokens asked for; None while it goes on.
    """

    tokens: list[int]
    text: str
    finish: Literal["stop_token", "stop_string", "length"] | None


@dataclass(frozen=True)
class _Setup:
    """What programs are compiled for, beside the shapes of their arrays."""

    config: LlamaConfig
    dtype: Any
    backend: str
    chunk: int
    mesh: Mesh | None
    rope_length: int | None


class _State(NamedTuple):
    """What the decode loop carries on."""

    caches: tuple[LayerCache, ...]
    token: Int[Array, "B"]  # the newest token, which no cache holds yet
    position: Int[Array, "B"]  # its place in the row
    ended: Bool[Array, "B"]
    seen: Bool[Array, "B V"] | None  # tokens of the row, where a penalty asks for them
    chosen: Int[Array, ""]  # number of tokens chosen


class _Choice(NamedTuple):
    """How tokens are chosen and what ends a row."""

    numbers: Numbers
    keys: Array
    stop_tokens: Int[Array, "stops"]


class Generator:
    """A model made ready to generate."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        mesh: Mesh | None = None,
        cache: str = "model",
        prefill_chunk: int = 8192,
        attention: str = "auto",
        rope_length: int | None = None,
    ):
        """Takes the model's weights, in its compute dtype; the model itself is not kept.

        Args:
          model: any Llama without adapters.
          tokenizer: for text, stop strings and the default stop tokens.
          mesh: devices to share the work: heads over `tensor`, rows over `data` and `fsdp`. None: the default device.
          cache: keys and values in the "model" dtype or as "int8" with a scale a token and head.
          prefill_chunk: tokens of each prompt that are read at a time.
          attention: the backend, a name in `model.attention.BACKENDS` or "auto".
          rope_length: the length in tokens that a dynamic scheme is to follow, whatever the row's own; None for the
            row's own. Other schemes do not look at it.

        Raises:
          InputError: an unknown name, a number that is not positive, a mesh that does not fit, or a model with
            adapters.
        """
        _check_count("prefill_chunk", prefill_chunk)
        if rope_length is not None:
            _check_count("rope_length", rope_length)
        empty_cache(1, 1, 1, 1, model.dtype, cache)  # tells of an unknown kind
        backend = select(attention, model.dtype, model.config.head_dim)
        if mesh is not None:
            placement.check(mesh, model.config)
        self._setup = _Setup(model.config, model.dtype, backend, prefill_chunk, mesh, rope_length)
        weights = decoder.weights_of(model)
        self._weights = weights if mesh is None else placement.place_weights(mesh, weights)
        self._cache_kind = cache
        self.config = model.config
        self.tokenizer = tokenizer

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[Completion]:
        """Continues prompts.

        Args:
          prompts: token ids, of any lengths.
          max_new_tokens: most tokens to add to each.
          **options: as for `stream`.

        Returns:
          One completion a prompt, in their order.
        Raises:
          InputError: as `stream`.
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

        A row's tokens depend on its prompt, its seed and the settings, not on the rows beside it (but for the rounding
        of products whose shapes differ).

        Args:
          prompts: token ids, of any lengths.
          max_new_tokens: most tokens to add to each.
          sampling: how tokens are chosen; None takes the likeliest.
          seeds: of the draws, one for all rows or one a row.
          stop_tokens: ids that end a row; None for those of the tokenizer, or else of the model's configuration.
          stop_strings: what ends a row where it appears in the new text.

        Yields:
          The completions so far, one a prompt in their order; in the last ones, none has `finish` None.
        Raises:
          InputError: no prompts, an empty one, text in place of ids, ids that the model does not have, stop strings
            without a tokenizer, or numbers that make no sense.
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
        """Logits of the token after each prompt.

        Args:
          prompts: token ids, of any lengths.

        Returns:
          float32 [prompts, vocab_size].
        Raises:
          InputError: no prompts, an empty one, or ids that the model does not have.
        """
        rows = self._checked(prompts)
        padded = self._padded(rows)
        hidden, *_ = self._hidden(padded, max(map(len, rows)))
        return np.asarray(_logits(self._setup, self._ends(), hidden))[: len(rows)]

    def _checked(self, prompts: Any) -> list[list[int]]:
        """The prompts as lists of ids that the model has."""
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
        """What a row amounts to, of all tokens made for it."""
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
        """New tokens by the chunk: int32 [rows, few], `_NOTHING` where a row has ended."""
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
        # Past its pretrained window, nothing in a cache stays true for a scheme that follows the length.
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
        """The first token of `state` and those that the loop makes, `count` in all, and which rows have ended."""
        total = length + count - 1
        yield np.asarray(state.token)[:, None], state.ended
        ahead: list[Array] = []
        # On a GPU, who starts the loop waits for its end, and the chunk is there. Elsewhere the device has the next one
        # to do while the host looks at this one.
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
        """The state with caches of at least so many slots."""
        if state.caches[0].k.shape[2] >= slots:
            return state
        caches, state = list(state.caches), state._replace(caches=())
        for number, cache in enumerate(caches):  # one by one: the device need not hold all of them twice
            caches[number] = _grown(cache, slots, self._setup.mesh)
        return state._replace(caches=tuple(caches))

    def _padded(self, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The prompts, and others that only fill the mesh."""
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
        """Reads the prompts, which are to have so many tokens in the end, and chooses the first new token."""
        hidden, caches, lengths = self._hidden(prompts, total)
        seen = None
        if steps.penalize:
            present = np.zeros((len(prompts), self.config.vocab_size), np.bool_)
            for row, prompt in enumerate(prompts):
                present[row, list(prompt)] = True
            seen = self._row_array(present)
        logits = _logits(self._setup, self._ends(), hidden)
        return _first(steps, logits, caches, lengths, ended, seen, jnp.int32(chosen), choice)

    def _hidden(
        self, prompts: Sequence[Sequence[int]], total: int
    ) -> tuple[Float[Array, "B D"], tuple[LayerCache, ...], Int[Array, "B"]]:
        """Hidden states after the last layer at each prompt's end, the caches, and the prompts' lengths."""
        longest = max(map(len, prompts))
        chunks = _chunks(longest, self._setup.chunk)
        width = chunks[-1].stop
        tokens = np.zeros((len(prompts), width), np.int32)
        for number, prompt in enumerate(prompts):
            tokens[number, : len(prompt)] = prompt
        lengths = self._row_array(np.array([len(prompt) for prompt in prompts], np.int32))
        caches = self._empty_caches(len(prompts), max(_slots(longest + TOKENS_AT_ONCE, total), width))
        hidden = self._row_array(jnp.zeros((len(prompts), self.config.hidden_size), self._setup.dtype))
        for chunk in chunks:
            start = jnp.int32(chunk.start)
            x, row = _begin(self._setup, self._weights.embedding, self._row_array(tokens[:, chunk]), start, lengths)
            for index, weights in enumerate(self._weights.layers):
                x, caches[index] = _read_layer(
                    self._setup, chunk.start, weights, jnp.int32(index), x, row, caches[index]
                )
            hidden = _collect(x, hidden, lengths, start)
        return hidden, tuple(caches), lengths

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
    """A list of whole numbers from 0 up to `end`."""
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
    """Appends new tokens to the rows that they belong to."""
    for text, new in zip(texts, tokens.tolist(), strict=True):
        text += [token for token in new if token != _NOTHING]


def _chunks(length: int, size: int) -> list[slice]:
    """Cuts a prompt into chunks of one size; the last one, if shorter, is rounded up."""
    whole, rest = divmod(length, size)
    chunks = [slice(number * size, (number + 1) * size) for number in range(whole)]
    if rest:
        chunks.append(slice(whole * size, whole * size + min(_rounded(rest), size)))
    return chunks


def _slots(needed: int, total: int) -> int:
    """How many slots a cache is to have: caches double, and never hold many more than are needed in the end."""
    return min(_power_of_two(needed), _rounded(total))


def _rounded(length: int) -> int:
    """The length, or up to an eighth more: few different shapes, little waste."""
    step = max(_SMALLEST, _power_of_two(length) // 16)
    return -(-length // step) * step


def _power_of_two(length: int) -> int:
    """The next power of two."""
    return 1 << (length - 1).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(shape: tuple[int, int, int, int], dtype: Any, kind: str, mesh: Mesh | None) -> LayerCache:
    """Made where it lies: a device need not hold what others will."""
    return placement.on_mesh(mesh, empty_cache(*shape, dtype, kind))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _grown(cache: LayerCache, slots: int, mesh: Mesh | None) -> LayerCache:
    return placement.on_mesh(mesh, grown(cache, slots))


@functools.partial(jax.jit, static_argnums=0)
def _begin(
    setup: _Setup, embedding: Array, tokens: Int[Array, "B T"], start: Array, lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B T D"], Row]:
    """Hidden states before the first layer, and what every layer is told of the tokens."""
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    length = lengths if setup.rope_length is None else setup.rope_length
    row = decoder.rows(setup.config.rope, setup.config.head_dim, positions, length)
    return jnp.take(embedding, tokens, axis=0), row


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4, 6))
def _read_layer(
    setup: _Setup, start: int, weights: LayerWeights, index: Array, x: Array, row: Row, cache: LayerCache
) -> tuple[Array, LayerCache]:
    attention = functools.partial(placement.chunk_attention, setup.mesh, start=start, backend=setup.backend)
    return decoder.layer(setup.config, weights, index, x, row, cache, attention)


@jax.jit
def _collect(x: Float[Array, "B T D"], found: Float[Array, "B D"], lengths: Array, start: Array) -> Array:
    """Each row's hidden state at its last token, where this chunk has it."""
    index = lengths - 1 - start
    inside = (index >= 0) & (index < x.shape[1])
    here = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    return jnp.where(inside[:, None], here, found)


@functools.partial(jax.jit, static_argnums=0)
def _logits(setup: _Setup, ends: Weights, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    return decoder.next_token_logits(setup.config, ends, hidden)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="caches")
def _first(
    steps: Steps,
    logits: Float[Array, "B V"],
    caches: tuple[LayerCache, ...],
    lengths: Array,
    ended: Array,
    seen: Array | None,
    chosen: Array,
    choice: _Choice,
) -> _State:
    """The state with which the decode loop begins; `token` is `_NOTHING` in rows that had ended before."""
    token = choose(logits, seen, choice.keys, chosen, steps, choice.numbers)
    token = jnp.where(ended, _NOTHING, token)
    ended |= jnp.isin(token, choice.stop_tokens)
    return _State(caches, token, lengths, ended, _marked(seen, token), chosen + 1)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="state")
def _decode(
    setup: _Setup,
    steps: Steps,
    weights: Weights,
    state: _State,
    choice: _Choice,
    size: int,
) -> tuple[Int[Array, "B chunk"], _State]:
    """Makes up to `size` tokens, or until every row has ended."""

    def attend(q: Array, k: Array, v: Array, cache: LayerCache, positions: Array) -> tuple[Array, LayerCache]:
        q, k, v = (y[:, 0] for y in (q, k, v))
        out, cache = placement.token_attention(setup.mesh, q, k, v, cache, positions, backend=setup.backend)
        return out[:, None], cache

    def step(carry: tuple[Array, Array, _State]) -> tuple[Array, Array, _State]:
        index, made, state = carry
        row = decoder.rows(setup.config.rope, setup.config.head_dim, state.position[:, None], setup.rope_length)
        # A row that has ended goes on in its last slot, and nobody looks.
        x = jnp.take(weights.embedding, jnp.maximum(state.token, 0), axis=0)[:, None]
        caches = list(state.caches)
        for number, layer in enumerate(weights.layers):
            attention = functools.partial(attend, positions=state.position)
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
    return made, state


def _marked(seen: Array | None, token: Array) -> Array | None:
    """Tokens of the rows, the newest among them."""
    if seen is None:
        return None
    return seen | (jnp.arange(seen.shape[1]) == token[:, None])
