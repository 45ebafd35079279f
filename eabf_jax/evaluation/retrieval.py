"""Retrieval of one fact from a long text: prompts of a given length, and whether a model gives the answer.

The prompt holds the beginning of the reply, up to the answer's first character. Otherwise many models would first give
a space or "the", which shows nothing about what they found. Greedy decoding gives the answer exactly if each of its
tokens is the likeliest after the prompt and the answer's earlier tokens. One forward pass over prompt and answer shows
this, and gives the answer's likelihood.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eabf_jax.data.chat import Turn
from eabf_jax.errors import InputError
from eabf_jax.evaluation.scorer import Scorer, Span
from eabf_jax.inference.chat import render
from eabf_jax.inference.text import encode_text
from eabf_jax.interop.tokenizer import Tokenizer
from eabf_jax.model.llama import Llama


class Wording(NamedTuple):
    """A question as text."""

    question: str  # the user's whole message, with the long text
    opening: str  # the beginning of the reply
    answer: str  # the only correct continuation of the opening


class Prompt(NamedTuple):
    """A question as tokens."""

    length: int  # maximum tokens of prompt and answer together
    depth: int | None  # place of the answer in the long text, percent; None if it is random
    tokens: list[int]  # the prompt, followed by the correct answer
    begin: int  # index of the answer's first token


class Answer(NamedTuple):
    """A model's result on one prompt."""

    hit: bool  # whether greedy decoding gives the answer
    loss: float  # of the answer, nats per token


@dataclass(frozen=True)
class Cell:
    """A model's result on the prompts of one length and depth."""

    length: int
    depth: int | None
    hits: int
    total: int
    loss: float  # of the answers, nats per token, over prompts of equal weight


def encode(tokenizer: Tokenizer, wording: Wording, *, chat: bool = True) -> list[int]:
    """Encodes a question up to the end of its answer, as the model reads them.

    Args:
      chat: whether to use the tokenizer's chat template, if it has one.

    Raises:
      InputError: the template refuses an unfinished reply, or changes it.
    """
    return _tokens(tokenizer, _text(tokenizer, wording, chat), chat)


def _text(tokenizer: Tokenizer, wording: Wording, chat: bool) -> str:
    """Returns the text that `encode` encodes, which ends with the answer."""
    question, reply = wording.question, wording.opening + wording.answer
    if not (chat and tokenizer.chat_template):
        return f"{question} {reply}"
    try:
        text = render(tokenizer.chat_template, [Turn("user", question), Turn("assistant", reply)], tokenizer)
        # What follows the reply ends it.
        return text[: text.rindex(reply) + len(reply)]
    except ValueError as error:
        raise InputError(
            "the model's chat template does not accept a reply that has already begun; --no-chat-template leaves the "
            "template out"
        ) from error


def _tokens(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    return tokenizer.encode(text, special=True) if chat and tokenizer.chat_template else encode_text(tokenizer, text)


def fitted(
    tokenizer: Tokenizer, worded: Callable[[int], Wording], length: int, *, guess: int, chat: bool
) -> tuple[list[int], int, int]:
    """Finds the longest question of at most `length` tokens.

    Args:
      worded: makes the question with a given amount of the long text; more text gives more tokens.
      length: maximum tokens of prompt and answer.
      guess: a first estimate of the amount; a close one saves steps.
      chat: as for `encode`.

    Returns:
      The tokens of prompt and answer, the index of the answer's first token, and the amount of text.
    Raises:
      InputError: the question is too long even without the text, or as for `encode`.
    """
    size, fits, exceeds = guess, -1, None
    tokens: list[int] = []
    while exceeds is None or exceeds - fits > 1:
        found = encode(tokenizer, worded(size), chat=chat)
        if len(found) <= length:
            fits, tokens = size, found
        elif size == 0:
            raise InputError(f"length {length}: the question alone has {len(found)} tokens; a larger length is needed")
        else:
            exceeds = size
        # Tokens grow in proportion to the text, so the next size corrects for the tokens missing or in excess.
        size += int((length - len(found)) * max(size, 1) // len(found))
        size = max(size, fits + 1) if exceeds is None else min(max(size, fits + 1), exceeds - 1)
    wording = worded(fits)
    # The answer is cut off the rendered text: a template may strip the last space of an opening alone.
    before = _tokens(tokenizer, _text(tokenizer, wording, chat).removesuffix(wording.answer), chat)
    same = (a == b for a, b in zip(before, tokens, strict=False))
    return tokens, next((index for index, equal in enumerate(same) if not equal), len(before)), fits


def measure(
    model: Llama,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Cell]:
    """Measures a model on all prompts.

    Args:
      batch_size: prompts that each device reads at a time.
      progress: called with the number of prompts done.

    Returns:
      A cell for each length and depth, in the order in which they first appear.
    """
    results: dict[tuple[int, int | None], list[Answer]] = {}
    for prompt, answer in zip(prompts, answers(model, prompts, batch_size=batch_size, progress=progress), strict=True):
        results.setdefault((prompt.length, prompt.depth), []).append(answer)
    return [
        Cell(length, depth, sum(answer.hit for answer in found), len(found), float(np.mean([x.loss for x in found])))
        for (length, depth), found in results.items()
    ]


def answers(
    model: Llama,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Measures a model on all prompts; returns a result for each. The arguments are those of `measure`."""
    spans = [Span(prompt.tokens, prompt.begin - 1, prompt.tokens[prompt.begin :]) for prompt in prompts]
    found = {}
    for done, (index, log_probs, is_greedy) in enumerate(Scorer(model)(spans, batch_size), start=1):
        found[index] = Answer(bool(is_greedy.all()), -float(log_probs.mean()))
        progress(done)
    return [found[index] for index in range(len(prompts))]
