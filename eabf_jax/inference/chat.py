"""Conversations to prompts: by the model's own Jinja template, else by one of `data.chat`."""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eabf_jax.data.chat import TEMPLATES, Turn, answer_ends, encode_prompt
from eabf_jax.errors import InputError
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
    if template is not None:
        ends = answer_ends(template, tokenizer)
        return Format(
            lambda turns: encode_prompt(turns, template, tokenizer), tuple(dict.fromkeys((*tokenizer.eos_ids, *ends)))
        )
    source = tokenizer.chat_template
    if source is None:
        raise InputError(
            f"the model's tokenizer has no chat template: name the one that it was trained with, --template "
            f"{', '.join(sorted(TEMPLATES))}"
        )
    return Format(lambda turns: tokenizer.encode(render(source, turns, tokenizer), special=True), tokenizer.eos_ids)


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
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    names = {
        f"{role}_token": "" if token is None else tokenizer.decode([token])
        for role, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
    }
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        template = environment.from_string(source)
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"the model's chat template does not take this conversation: {error}; --template names another"
        ) from error


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes what HTML would.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
