"""Encoding of text for a model, and streaming decoding that holds back text that later tokens may change."""

import contextlib
from collections.abc import Iterator, Sequence

from eabf_jax.errors import InputError
from eabf_jax.interop.tokenizer import Tokenizer

# How a prompt that is too long is cut.
TRUNCATIONS = ("middle", "left")
# Prompt tokens decoded together with new ones, whose text can depend on a space or on bytes of the tokens before.
_CONTEXT = 8
# Decoders write this for bytes that do not yet form a complete character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@contextlib.contextmanager
def only_text(source: str) -> Iterator[None]:
    """Turns decoding errors of the block into an `InputError`.

    Args:
      source: name of the input that the block reads, for the message.

    Raises:
      InputError: the input is not valid UTF-8.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not valid UTF-8: {error.reason} at byte {error.start}") from error


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the token ids of a text, with a leading BOS token if the tokenizer asks for one."""
    opening = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return [*opening, *tokenizer.encode(text)]


def truncated(tokens: Sequence[int], room: int, how: str, bos_id: int | None) -> list[int]:
    """Cuts a prompt to `room` tokens.

    Args:
      tokens: more than `room` of them.
      room: tokens to keep, at least 2.
      how: "middle" keeps as much of the beginning as of the end, as LongBench does; "left" keeps the end.
      bos_id: the token that begins a text; "left" keeps it if the prompt has it.
    """
    if how == "middle":
        return [*tokens[: room // 2], *tokens[len(tokens) - (room - room // 2) :]]
    opening = list(tokens[:1]) if tokens[0] == bos_id else []
    return [*opening, *tokens[len(tokens) - (room - len(opening)) :]]


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Decodes new tokens as the continuation of a prompt, leading space included."""
    context = list(prompt[-_CONTEXT:])
    before = tokenizer.decode(context).rstrip(_INCOMPLETE)
    return tokenizer.decode([*context, *tokens])[len(before) :]


def running_text(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    tokens: Sequence[int],
    stop_strings: Sequence[str],
    *,
    is_whole: bool,
) -> tuple[str, int | None]:
    """Returns the part of a row's text that no later token can change, cut before the first stop string.

    Args:
      stop_strings: strings that end the text.
      is_whole: True if no more tokens follow; then nothing is held back.

    Returns:
      The text, and the number of tokens up to the end of the stop string (None without a stop string).
    """
    text = continuation(tokenizer, prompt, tokens)
    places = [place for place in map(text.find, stop_strings) if place >= 0]
    if places:
        found = min(places)
        ends = min(found + len(stop) for stop in stop_strings if text.startswith(stop, found))
        kept = len(tokens)
        while kept > 1 and len(continuation(tokenizer, prompt, tokens[: kept - 1])) >= ends:
            kept -= 1
        return text[:found], kept
    if is_whole:
        return text, None
    text = text.rstrip(_INCOMPLETE)
    begun = max((_overlap(text, stop) for stop in stop_strings), default=0)
    return text[: len(text) - begun], None


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of the text that is a prefix of the stop string."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
