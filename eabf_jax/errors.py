"""Errors that name what a user got wrong; the command line prints them as one line and exits with status 2."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that the user can correct: the message says what is wrong, the value found, and what would be right."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Builds the error for a name that is not in a table, with the nearest known name where one is near.

    Args:
      kind: what the name stands for, e.g. "rotary scheme".
      name: the name found.
      known: the names that would be right.

    Returns:
      An InputError, to be raised by the caller.
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {kind} {name!r}: {hint}known: {', '.join(choices)}")
