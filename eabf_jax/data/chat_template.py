"""Renders a model's own Jinja chat template as transformers does, and finds the text that it marks for learning."""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eabf_jax.errors import InputError

# A real template renders a conversation in milliseconds.
SECONDS = 10.0


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
    """Renders a conversation as transformers' `apply_chat_template` does, in a sandbox with limits.

    The limits are 10 s, 2 GiB of memory, and 2^20 characters beyond 16 times the conversation and the template.

    A template can use `messages`, `tools` and `documents` (None), `add_generation_prompt`, the tokenizer's special
    tokens by name, `raise_exception`, `strftime_now`, `tojson` with options of `json.dumps`, `break` and `continue`,
    and `{% generation %}`.

    Args:
      source: the template, in Jinja.
      turns: role and text of each turn.
      special_tokens: text of the tokenizer's special tokens by name, such as bos_token.
      add_generation_prompt: whether the template adds the opening of the assistant's answer.

    Raises:
      InputError: the template is faulty, refuses the conversation, or reaches a limit.
    Source: transformers, `utils/chat_template_utils.py`.
    """
    request = {
        "source": source,
        "turns": [list(turn) for turn in turns],
        "special_tokens": dict(special_tokens),
        "add_generation_prompt": add_generation_prompt,
    }
    answer = _process.ask(json.dumps(request).encode() + b"\n")
    if "error" in answer:
        raise InputError(
            f"the model's chat template does not accept this conversation: {' '.join(answer['error'].split())}; "
            "choose another with --template"
        )
    learned = [(begin, end) for begin, end in answer["learned"]]
    return Rendered(answer["text"], learned, answer["is_marked"])


class _TemplateProcess:
    """The process that runs `template_process`; each process of ours starts its own when it first renders."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0
        self._running: subprocess.Popen[bytes] | None = None
        atexit.register(self.end)

    def ask(self, request: bytes) -> dict[str, Any]:
        """Sends a request and waits for the answer; after a failure, the next request starts a new process."""
        with self._lock:
            running = self._start()
            try:
                answer = self._exchange(running, request)
            except TimeoutError:
                self._kill()
                return {"error": f"it takes more than {SECONDS:g} s"}
            except (EOFError, BrokenPipeError):
                self._kill()
                return {"error": "it ends the process that renders it"}
            except BaseException:
                self._kill()
                raise
        found: dict[str, Any] = json.loads(answer)
        return found

    def _start(self) -> "subprocess.Popen[bytes]":
        # A fork has its parent's process, which must hear only the parent.
        if self._running is None or self._owner != os.getpid() or self._running.poll() is not None:
            program = str(Path(__file__).with_name("template_process.py"))
            self._running = subprocess.Popen(
                [sys.executable, "-P", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
        return self._running

    @staticmethod
    def _exchange(running: "subprocess.Popen[bytes]", request: bytes) -> bytes:
        """Returns the answer; raises TimeoutError, or EOFError or BrokenPipeError if the process ends."""
        assert running.stdin is not None and running.stdout is not None
        running.stdin.write(request)
        running.stdin.flush()
        answers = select.poll()
        answers.register(running.stdout, select.POLLIN)
        end, parts = time.monotonic() + SECONDS, [b""]
        while not parts[-1].endswith(b"\n"):
            if not answers.poll(1000 * max(0.0, end - time.monotonic())):
                raise TimeoutError
            parts.append(os.read(running.stdout.fileno(), 2**20))
            if not parts[-1]:
                raise EOFError
        return b"".join(parts)

    def _kill(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.kill()
            running.communicate()

    def end(self) -> None:
        """Ends the process, if this process started it."""
        if self._owner == os.getpid():
            self._kill()


_process = _TemplateProcess()
