"""The program that renders chat templates, in a process of its own: a template is a program from a stranger.

Jinja's sandbox keeps a template from everything outside it, but not from running for ever or filling the memory. This
process has a limit of memory, and `chat_template` ends it after a limit of time. It imports only Jinja, so that it
starts fast, and reads requests and writes answers as lines of JSON.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**31  # bytes
# Characters: what a template may add to a conversation, and how often it may repeat it.
OUTPUT = 2**20
REPEATS = 16


def main() -> None:
    """Answers requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    with suppress(ValueError, OSError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        answer = _answer(line)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(line: bytes) -> dict[str, Any]:
    try:
        return _rendered(limit=OUTPUT + REPEATS * len(line), **json.loads(line))
    except MemoryError:
        return {"error": f"it needs more than {MEMORY // 2**30} GiB of memory"}
    except Exception as error:  # a template is a program and may fail in any way
        return {"error": (str(error) or type(error).__name__)[:1000]}


def _rendered(
    limit: int, source: str, turns: list[list[str]], special_tokens: dict[str, str], add_generation_prompt: bool
) -> dict[str, Any]:
    """Renders a conversation; see `chat_template.render`."""
    blocks: list[str] = []
    learned: list[tuple[int, int]] = []
    length = 0

    def mark(text: str) -> str:
        learned.append((length, length + len(text)))
        return text

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
        length += len(block)
        if length > limit:
            raise ValueError(f"it renders more than {limit:,} characters")
    return {"text": "".join(blocks), "learned": learned, "is_marked": is_marked}


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


if __name__ == "__main__":
    main()
