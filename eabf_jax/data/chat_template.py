"""Renders a model's own Jinja chat template as transformers does, and finds the text that it marks for learning."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eabf_jax.errors import InputError


class Rendered(NamedTuple):
    """A rendered conversation."""

    text: str  # with special tokens spelt out
    learned: list[tuple[int, int]]  # start and end of each stretch that the template marks with `{% generation %}`
    is_marked: bool  # whether the template has that tag at all


def render(
    source: str,
    turns: Sequence[tuple[str, str]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool,
) -> Rendered:
    """Renders a conversation as transformers' `apply_chat_template` does, in a sandbox.

    A template can use `messages`, `tools` and `documents` (None), `add_generation_prompt`, the tokenizer's special
    tokens by name, `raise_exception`, `strftime_now`, `tojson` with options of `json.dumps`, `break` and `continue`,
    and `{% generation %}`.

    Args:
      source: the template, in Jinja.
      turns: role and text of each turn.
      special_tokens: text of the tokenizer's special tokens by name, such as bos_token.
      add_generation_prompt: whether the template adds the opening of the assistant's answer.

    Raises:
      InputError: the template is faulty or refuses the conversation.
    Source: transformers, `utils/chat_template_utils.py`.
    """
    blocks: list[str] = []
    learned: list[tuple[int, int]] = []

    def mark(text: str) -> str:
        begin = sum(map(len, blocks))
        learned.append((begin, begin + len(text)))
        return text

    try:
        template, is_marked = _compiled(source)
        stream = template.generate(
            messages=[{"role": role, "content": text} for role, text in turns],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
            **{_MARK: mark},
        )
        for block in stream:  # `mark` counts the text rendered so far
            blocks.append(block)
    except Exception as error:  # a template is a program and may fail in any way
        raise InputError(
            f"the model's chat template does not accept this conversation: {error}; choose another with --template"
        ) from error
    return Rendered("".join(blocks), learned, is_marked)


# The template's name for the function that records the stretches of `{% generation %}`.
_MARK = "_learned"


class _GenerationTag(Extension):
    """The tag `{% generation %}` … `{% endgeneration %}`, which marks the text that the assistant learns."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 only looks up names in it
    is_used = False

    def parse(self, parser: Parser) -> nodes.Node:
        self.is_used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_stretch", [nodes.ContextReference()]), [], [], body).set_lineno(line)

    def _stretch(self, context: jinja2.runtime.Context, caller: jinja2.runtime.Macro) -> str:
        return str(context[_MARK](caller()))


@lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[jinja2.Template, bool]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    template = environment.from_string(source)
    tag = environment.extensions[_GenerationTag.identifier]
    return template, isinstance(tag, _GenerationTag) and tag.is_used


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes characters for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
