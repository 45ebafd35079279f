"""Errors in the user's input, which the command line prints as one line, and the end of a command by a signal."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that the user can correct; the message names the problem, the value found and the expected value."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the command.

    Attributes:
      status: the exit status of the command line; docs/exit_statuses.md lists them.
    """

    def __init__(self, message: str, status: int):
        """Keeps the line to print and the exit status."""
        super().__init__(message)
        self.status = status


# The exit status of a command that was stopped before its end, and that continues if it is run again.
CAN_CONTINUE = 3


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Builds the error for an unknown name, with the nearest known name if there is one.

    Args:
      kind: what the name stands for, e.g. "rotary scheme".
      known: the allowed names.
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {kind} {name!r}: {hint}known: {', '.join(choices)}")


def one_line(error: BaseException) -> str:
    """Returns a library's error message as part of ours: on one line, cut to 200 characters."""
    return " ".join(str(error).split())[:200]
