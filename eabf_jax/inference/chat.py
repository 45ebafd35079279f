"""Conversations to prompts: by the model's own Jinja template, else by one of `data.chat`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from eabf_jax.data import chat_template
from eabf_jax.data.chat import OWN, Turn, answer_ends, encode_prompt
from eabf_jax.interop.tokenizer import Tokenizer


class Format(NamedTuple):
    """How a model is talked to.

    Attributes:
      encode: turns, the user's last, to the tokens after which the assistant answers.
      stop_tokens: what ends an answer.
    """

    encode: Callable[[Sequence[Turn]], list[int]]
    stop_tokens: tuple[int, ...]


def chat_format(tokenizer: Tokenizer, template: str | None = None) -> Format:
    """Finds how a model is talked to.

    Args:
      tokenizer: the model's.
      template: a name in `data.chat.TEMPLATES` to use in place of the tokenizer's own template.

    Returns:
      The format.
    Raises:
      InputError: an unknown name, a token that the template needs is missing, or neither has a template.
    """
    name = OWN if template is None else template
    ends = answer_ends(name, tokenizer)
    return Format(
        lambda turns: encode_prompt(turns, name, tokenizer), tuple(dict.fromkeys((*tokenizer.eos_ids, *ends)))
    )


def render(source: str, turns: Sequence[Turn], tokenizer: Tokenizer, *, add_generation_prompt: bool = True) -> str:
    """Renders a conversation as transformers' `apply_chat_template` does, up to where the assistant answers.

    Args:
      source: the template, in Jinja. It comes with the model, so it is run in a sandbox.
      turns: the conversation so far.
      tokenizer: for the names of its special tokens.
      add_generation_prompt: whether the template is to write what opens the assistant's answer.

    Returns:
      The text.
    Raises:
      InputError: the template is faulty, or refuses the conversation.
    """
    return chat_template.render(
        source, turns, tokenizer.special_tokens, add_generation_prompt=add_generation_prompt
    ).text
