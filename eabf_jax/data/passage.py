"""Turns passages into tokens verbatim, without a template; the loss covers all tokens except the prompt's."""

import numpy as np

from eabf_jax.data.chat import Encoded, Tokenizer, common_prefix
from eabf_jax.data.forms import Passage


def encode_passage(passage: Passage, tokenizer: Tokenizer) -> Encoded:
    """Tokenizes a passage as the model reads it.

    It begins with BOS if the tokenizer adds it, and ends with EOS. Prompt and text are tokenized together. The mask
    begins at the first token that differs from those of the prompt alone.

    Returns:
      int32 tokens [length] and bool mask [length]: true on the text's tokens and on EOS, but never on the first token,
      which has no context.
    """
    opening = _opening(tokenizer)
    tokens = tokenizer.encode(passage.prompt + passage.text)
    prompt = tokenizer.encode(passage.prompt) if passage.prompt else []
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    whole = np.asarray([*opening, *tokens, *end], np.int32)
    return Encoded(whole, np.arange(len(whole)) >= max(1, len(opening) + common_prefix(tokens, prompt)))


def split_passage(passage: Passage, tokenizer: Tokenizer, *, min_tokens: int, max_tokens: int) -> list[Encoded]:
    """Splits a passage into pieces, each as long as allowed.

    Every piece of a document begins with BOS if the tokenizer adds it. A passage with a prompt is one piece, cut at
    `max_tokens`, because later pieces would lack the prompt. Pieces that are too short, or have nothing left to learn,
    are dropped.

    Args:
      min_tokens, max_tokens: limits on the tokens of a piece.
    """
    whole = encode_passage(passage, tokenizer)
    opening = len(_opening(tokenizer))
    room = max(1, max_tokens - opening)
    begins = [opening] if passage.prompt else range(opening, len(whole.tokens), room)
    pieces = [
        Encoded(*(np.concatenate([part[:opening], part[begin : begin + room]])[:max_tokens] for part in whole))
        for begin in begins
    ]
    for piece in pieces:
        piece.loss_mask[0] = False  # the first token has no context
    return [piece for piece in pieces if len(piece.tokens) >= min_tokens and piece.loss_mask.any()]


def _opening(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
