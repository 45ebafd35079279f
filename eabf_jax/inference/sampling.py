"""Sampling the next token: repetition penalty, temperature, top-k and top-p, as transformers defines them."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eabf_jax.errors import InputError

_ALL = 2**31 - 1  # more tokens than any vocabulary has


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are greedy.

    Attributes:
      temperature: divides the logits; 0 means greedy and ignores top_k and top_p.
      top_k: keeps the k likeliest tokens; 0 keeps all.
      top_p: keeps the smallest set of likeliest tokens whose probabilities add up to at least p; 1 keeps all.
      repetition_penalty: for tokens that already occur in the row, divides positive logits and multiplies negative
        ones; 1 means none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; 0 (greedy) or a positive number is needed")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; 0 (all tokens) or a positive number is needed")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; a number above 0 and up to 1 (all tokens) is needed")
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(f"repetition_penalty is {self.repetition_penalty}; a positive number (1: none) is needed")


class Steps(NamedTuple):
    """The steps that a program contains; static, while the values in `Numbers` may change between calls."""

    penalize: bool
    draw: bool
    filter: bool


class Numbers(NamedTuple):
    """The settings as arrays."""

    temperature: Array
    top_k: Array
    top_p: Array
    repetition_penalty: Array


def split(sampling: Sampling) -> tuple[Steps, Numbers]:
    """Splits the settings into static steps, which a program is compiled for, and arrays that are its arguments."""
    draw = sampling.temperature > 0
    steps = Steps(sampling.repetition_penalty != 1, draw, draw and (sampling.top_k > 0 or sampling.top_p < 1))
    numbers = Numbers(
        jnp.float32(sampling.temperature if draw else 1.0),
        jnp.int32(min(sampling.top_k or _ALL, _ALL)),
        jnp.float32(sampling.top_p),
        jnp.float32(sampling.repetition_penalty),
    )
    return steps, numbers


def processed(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, steps: Steps, numbers: Numbers
) -> Float[Array, "B V"]:
    """Applies penalty, temperature, top-k and top-p to the logits, in this order.

    Tokens tied with the last one that top-p keeps are kept too; transformers drops some of them.

    Args:
      logits: float32 [batch, vocab_size].
      seen: True for tokens that occur in the row, prompt included; None for no penalty.

    Returns:
      float32, the shape of `logits`; -inf for excluded tokens.
    Source: transformers, `RepetitionPenaltyLogitsProcessor`, `TemperatureLogitsWarper`, `TopKLogitsWarper` and
      `TopPLogitsWarper`, in the order in which `generate` calls them.
    """
    if seen is not None:
        penalty = jnp.where(logits < 0, numbers.repetition_penalty, 1 / numbers.repetition_penalty)
        logits = jnp.where(seen, logits * penalty, logits)
    if not steps.draw:
        return logits
    logits = logits / numbers.temperature
    if not steps.filter:
        return logits
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    last = jnp.minimum(numbers.top_k, logits.shape[-1]) - 1
    lowest = jnp.take(ordered, last, axis=-1)[:, None]
    probabilities = jax.nn.softmax(jnp.where(ordered >= lowest, ordered, -jnp.inf), axis=-1)
    likelier = jnp.cumsum(probabilities, axis=-1) - probabilities  # total probability of the tokens before each one
    nucleus = jnp.where((likelier < numbers.top_p) & (ordered >= lowest), ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= nucleus, logits, -jnp.inf)


def choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    keys: Array,
    count: Int[Array, ""],
    steps: Steps,
    numbers: Numbers,
) -> Int[Array, "B"]:
    """Chooses each row's next token.

    Args:
      logits: float32 [batch, vocab_size].
      seen: as for `processed`.
      keys: one random key per row; a row's draws depend only on its own key.
      count: number of tokens generated before, folded into the keys.

    Returns:
      int32 [batch].
    """
    logits = processed(logits, seen, steps, numbers)
    if not steps.draw:
        return logits.argmax(-1).astype(jnp.int32)
    draws = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, count), row))(keys, logits)
    return draws.astype(jnp.int32)
