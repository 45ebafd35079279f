"""Streamed tokens as text, with a byte tokenizer, which can split a character between tokens."""

from collections.abc import Iterable
from itertools import pairwise

import pytest

from eabf_jax.inference.text import continuation, running_text


class Bytes:
    """A tokenizer with one token per byte."""

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def pieces(text: str, *stop_strings: str) -> list[str]:
    """Returns the text shown after each token; the last call says that no more tokens follow."""
    tokens = list(text.encode())
    return [
        running_text(Bytes(), b"prompt ", tokens[:count], stop_strings, is_whole=count == len(tokens))[0]  # type: ignore[arg-type]
        for count in range(1, len(tokens) + 1)
    ]


def test_nothing_shown_is_taken_back() -> None:
    shown = pieces("añ\N{GRINNING FACE}. stop now, sto", " stop here", "now!")
    assert shown[-1] == "añ\N{GRINNING FACE}. stop now, sto"
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert shown[:4] == ["a", "a", "añ", "añ"]  # half a character is not shown
    assert "añ\N{GRINNING FACE}." in shown and "añ\N{GRINNING FACE}. st" not in shown  # nor half a stop


@pytest.mark.parametrize(
    ("text", "stops", "shown", "kept"),
    [
        ("one, two, three", [", "], "one", 5),
        ("one, two, three", ["three", "two"], "one, ", 8),
        ("one, two, three", ["two, t", "two"], "one, ", 8),  # both begin at the same place; the shorter one ends first
        ("one", ["one"], "", 3),
        ("one, two", ["three"], "one, two", None),
    ],
)
def test_the_first_stop_string_ends_the_text(text: str, stops: list[str], shown: str, kept: int | None) -> None:
    assert running_text(Bytes(), b"p", list(text.encode()), stops, is_whole=True) == (shown, kept)  # type: ignore[arg-type]


def test_new_text_may_complete_a_character_of_the_prompt() -> None:
    first, *rest = "\N{GRINNING FACE}".encode()
    assert continuation(Bytes(), [*b"so: ", first], [*rest, *b" yes"]) == "\N{GRINNING FACE} yes"  # type: ignore[arg-type]
