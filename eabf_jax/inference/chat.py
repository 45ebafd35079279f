"""Formatting of conversations as prompts, by the model's own Jinja template or one of `data.chat`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from eabf_jax.data import chat_template
from eabf_jax.data.chat import OWN, Turn, answer_ends, encode_prompt
from eabf_jax.interop.tokenizer import Tokenizer


class Format(NamedTuple):
    """The prompt format of a chat model."""

    encode: Callable[[Sequence[Turn]], list[int]]  # turns, the user's last, to the prompt that the answer follows
    stop_tokens: tuple[int, ...]  # ids that end an answer


def chat_format(tokenizer: Tokenizer, template: str | None = None) -> Format:
    """Finds the prompt format of a chat model.

    Args:
      template: a name in `data.chat.TEMPLATES` to use in place of the tokenizer's own template.

    Raises:
      InputError: an unknown name, a token that the template needs is missing, or neither has a template.
    """
    name = OWN if template is None else template
    ends = dict.fromkeys((*tokenizer.eos_ids, *answer_ends(name, tokenizer)))
    return Format(lambda turns: encode_prompt(turns, name, tokenizer), tuple(ends))


def render(source: str, turns: Sequence[Turn], tokenizer: Tokenizer, *, add_generation_prompt: bool = True) -> str:
    """Renders a conversation to text as transformers' `apply_chat_template` does.

    Args:
      source: the Jinja template; it is run in a sandbox, because it comes with the model.
      tokenizer: provides the special tokens.
      add_generation_prompt: whether the template writes the opening of the assistant's answer.

    Raises:
      InputError: the template is faulty, or refuses the conversation.
    """
    return chat_template.render(
        source, turns, tokenizer.special_tokens, add_generation_prompt=add_generation_prompt
    ).text
