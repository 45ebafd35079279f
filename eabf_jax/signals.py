"""Signals of the command line: SIGTERM cleans up as Ctrl-C does, and a second signal ends the process at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eabf_jax.errors import Stopped

# Seconds within which a further signal belongs to the first: `timeout` and some schedulers send two in a row.
REPEAT = 1.0


@contextmanager
def handled() -> Iterator[None]:
    """Handles signals while a command runs; does nothing outside the main thread.

    SIGTERM raises `Stopped`, so that partial results are removed. A second SIGTERM or Ctrl-C ends the process with
    status 128 + its number, even during a long computation, when no Python handler runs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second, args=(reader,), daemon=True).start()
    if before == signal.SIG_DFL:  # otherwise it is ignored, or a caller's
        signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        if before == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(outer)
        os.close(writer)  # ends the thread, which closes the reader


def _stop(number: int, frame: Any) -> None:
    signal.signal(number, lambda *_: None)  # a repeat must not stop the removal of partial results
    raise Stopped("terminated", 128 + number)


def _end_at_second(reader: int) -> None:
    """Reads the numbers of the signals that arrive, and ends the process at the second SIGTERM or Ctrl-C."""
    first = None
    while number := os.read(reader, 1):
        if number[0] not in (signal.SIGTERM, signal.SIGINT):
            continue
        now = time.monotonic()
        first = now if first is None else first
        if now - first > REPEAT:
            os._exit(128 + number[0])
    os.close(reader)


def _reset_in_child() -> None:
    """Gives a forked process the default handling, because it shares the pipe with its parent."""
    if signal.getsignal(signal.SIGTERM) is _stop:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_reset_in_child)
