"""Text to the tokens that a model reads, and tokens to text while they come: what may still change is held back."""

import contextlib
from collections.abc import Iterator, Sequence

from eabf_jax.errors import InputError
from eabf_jax.interop.tokenizer import Tokenizer

# How a prompt that is too long is cut.
TRUNCATIONS = ("middle", "left")
# How many tokens of the prompt are decoded along: the first of new text may need the last one's space or bytes.
_CONTEXT = 8
# What a decoder writes for bytes that are no whole character yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@contextlib.contextmanager
def only_text(source: str) -> Iterator[None]:
    """For reading what has to be text.

    Args:
      source: what is read inside, as the user knows it.

    Raises:
      InputError: it is no UTF-8.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is no UTF-8 text: {error.reason} at byte {error.start}") from error


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as a model is to read it.

    Args:
      tokenizer: the model's.
      text: any text.

    Returns:
      Its token ids, after the token that begins every text where the tokenizer asks for it.
    """
    opening = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return [*opening, *tokenizer.encode(text)]


def truncated(tokens: Sequence[int], room: int, how: str, bos_id: int | None) -> list[int]:
    """Cuts a prompt to a number of tokens.

    Args:
      tokens: more than `room`.
      room: tokens to keep, at least 2.
      how: "middle" keeps the first and the last half, as LongBench does; "left" keeps the end.
      bos_id: the token that begins a text; "left" keeps it where the prompt has it.

    Returns:
      The tokens left.
    """
    if how == "middle":
        return [*tokens[: room // 2], *tokens[len(tokens) - (room - room // 2) :]]
    opening = list(tokens[:1]) if tokens[0] == bos_id else []
    return [*opening, *tokens[len(tokens) - (room - len(opening)) :]]


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """New tokens as the text that follows the prompt's, its leading space included.

    Args:
      tokenizer: the model's.
      prompt: the tokens before.
      tokens: the new ones.

    Returns:
      The text.
    """
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
    """The part of a row's text that no later token can change, cut before the first stop string.

    Args:
      tokenizer: the model's.
      prompt: the tokens before.
      tokens: the new ones so far.
      stop_strings: what ends the text.
      is_whole: whether no token is to come: then nothing is held back.

    Returns:
      The text, and the number of tokens up to the end of the stop string; None where there is none.
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
    """Length of the longest end of the text that begins the stop string."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
