"""Reads the entries of a JSON file of any size: an array, a list inside an object, or consecutive values (JSONL).

At most one chunk of the file, or one entry, is in memory at a time.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from eabf_jax.errors import InputError

CHUNK_BYTES = 1 << 20
LARGEST_ENTRY = 1 << 28

_DECODER = json.JSONDecoder()
# Byte order marks count as white space, because concatenated files have them in the middle.
_WHITESPACE = re.compile("[ \t\r\n\ufeff]*")
_TRAILING_COMMA = re.compile(r",(?=\s*[\]}])")
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_UNFINISHED_NUMBER = re.compile(r"-?\d*(\.|[eE][+-]?)?")
# Outside strings, an error that is due to missing input is at most this far from the end of the text.
_LONGEST_TOKEN = 16


class Entry(NamedTuple):
    """One entry of a file."""

    offset: int | None  # of its first byte; None if the file does not hold its JSON as such
    length: int  # in bytes
    value: Any


class BrokenFile(InputError):
    """A file that is not valid JSON from some byte on.

    Attributes:
      offset: that byte; for a truncated file, the end.
      entries: number of complete entries before it.
    """

    def __init__(self, what: str, offset: int, entries: int, entry_start: int):
        """Appends the place to `what`; `entry_start` is the first byte of the first incomplete entry."""
        super().__init__(
            f"{what} at byte {offset}, in the entry that begins at byte {entry_start}; "
            f"{entries} whole entries before it"
        )
        self.offset = offset
        self.entries = entries


class _Text:
    """The part of a file that is being parsed: decoded text, a position in it, and its byte offset in the file."""

    def __init__(self, stream: IO[bytes], name: str, chunk_bytes: int, repair: bool):
        self._stream = stream
        self._chunk_bytes = chunk_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._ended = False
        self.repair = repair
        self.bad_byte: int | None = None  # the first byte that is not UTF-8
        self._bytes_read = 0
        self.name = name
        self.text = ""
        self.position = 0
        self.offset = 0
        self.entries = 0
        # Offset of the last removed comma: an entry that contains it cannot be read again from the file.
        self.last_repair = -1

    def extend(self) -> bool:
        """Reads more text, in growing amounts, so that the total cost of reparsing a long entry stays linear."""
        if self._ended:
            return False
        waiting = len(self.text) - self.position
        chunk = self._stream.read(max(self._chunk_bytes, waiting))
        self._bytes_read += len(chunk)
        self._ended = not chunk
        try:
            added = self._decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            self.bad_byte = self._bytes_read - len(error.object) + error.start
            added = error.object[: error.start].decode("utf-8")
            # An incomplete character at the end means that the file is truncated, not that it is wrongly encoded.
            if self._ended and error.reason == "unexpected end of data":
                self.bad_byte = None
            self._ended = True
        self.text = self.text[self.position :] + added
        self.position = 0
        return True

    def skip_space(self, ahead: int = 0) -> tuple[str, int]:
        """Returns the next character that is not white space (empty at the end), and how far ahead it is."""
        while True:
            ahead = _WHITESPACE.match(self.text, self.position + ahead).end() - self.position  # type: ignore[union-attr]
            if self.position + ahead < len(self.text):
                return self.text[self.position + ahead], ahead
            if not self.extend():
                return "", ahead

    def peek(self) -> str:
        """Moves to the next character that is not white space and returns it; empty at the end of the file."""
        mark, ahead = self.skip_space()
        self.advance(ahead)
        return mark

    def advance(self, characters: int) -> None:
        """Moves the position forward."""
        self.offset = self._byte_at(self.position + characters)
        self.position += characters

    def value(self, ahead: int = 0) -> tuple[Any, int]:
        """Parses the JSON value `ahead` characters ahead; returns it, and how far ahead it ends."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position + ahead)
            except json.JSONDecodeError as error:
                if self.repair and self._without_trailing_comma(error.pos):
                    continue
                in_string = error.msg.startswith("Unterminated string")
                if not in_string and error.pos < len(self.text) - _LONGEST_TOKEN:
                    raise self.broken(error.msg, error.pos) from None
                if len(self.text) - self.position > LARGEST_ENTRY:
                    raise self.broken(f"an entry does not end within {LARGEST_ENTRY} characters") from None
                # `extend` drops the text before the position.
                place = error.pos - self.position
                if not self.extend():
                    in_string = in_string or error.msg.startswith("Invalid \\u")
                    cut = in_string or _is_unfinished(self.text[self.position + place :])
                    raise self.broken("" if cut else error.msg, self.position + place, in_string) from None
            except (RecursionError, ValueError) as error:
                raise self.broken(str(error)) from None
            else:
                return value, end - self.position

    def broken(self, what: str, position: int | None = None, in_string: bool = False) -> BrokenFile:
        """Makes the error for the current entry; an empty `what` means that the file ends too early."""
        if self.bad_byte is not None:
            return BrokenFile(f"{self.name} is not UTF-8", self.bad_byte, self.entries, self.offset)
        if not what:
            inside = " inside a string" if in_string else ""
            return BrokenFile(f"{self.name} is cut off{inside}", self._bytes_read, self.entries, self.offset)
        offset = self.offset if position is None else self._byte_at(position)
        return BrokenFile(f"{self.name} is not valid JSON: {what}", offset, self.entries, self.offset)

    def _byte_at(self, position: int) -> int:
        """Returns the byte offset of a character at or after the current position."""
        passed = self.text[self.position : position]
        return self.offset + (len(passed) if passed.isascii() else len(passed.encode()))

    def _without_trailing_comma(self, position: int) -> bool:
        """Replaces a comma before a closing bracket near an error with a space; returns whether there was one."""
        before = len(self.text[self.position : position].rstrip()) + self.position
        for place in (position, before - 1):
            if place >= self.position and _TRAILING_COMMA.match(self.text, place):
                self.last_repair = self._byte_at(place)
                self.text = f"{self.text[:place]} {self.text[place + 1 :]}"
                return True
        return False


def _is_unfinished(rest: str) -> bool:
    """Tells whether the text from an error to the end of the file may be the beginning of valid JSON."""
    rest = rest.strip()
    return any(word.startswith(rest) for word in _LITERALS) or _UNFINISHED_NUMBER.fullmatch(rest) is not None


HoldsEntries = Callable[[str | None, Any], bool]


def scan(
    stream: IO[bytes],
    name: str,
    chunk_bytes: int = CHUNK_BYTES,
    holds_entries: HoldsEntries = lambda key, first: key is None,
    repair: bool = False,
) -> Iterator[Entry]:
    """Yields the entries of a JSON file.

    Args:
      stream: the file, opened in binary mode at its beginning.
      name: the file's name in errors.
      chunk_bytes: bytes to read at a time; affects only speed and memory.
      holds_entries: whether a list holds entries, given its key (None for a top-level array) and its first element. Any
        other top-level array is a single entry, as is an object without a list of entries. By default, only a top-level
        array holds entries.
      repair: whether to accept commas before a closing bracket.

    Yields:
      The entries, which are objects or arrays, in file order.

    Raises:
      BrokenFile: the file is truncated or malformed; raised after the last complete entry before that place.
    """
    source = _Text(stream, name, chunk_bytes, repair)
    opening = source.peek()
    if opening == "{" and (ahead := _list_inside(source, holds_entries)):
        source.advance(ahead)
        yield from _array(source)
        _leave_object(source, holds_entries)
        kind = "object"
    elif opening == "[" and _is_list_of_entries(source, 0, holds_entries, None):
        yield from _array(source)
        kind = "array"
    else:
        while source.peek() or source.bad_byte is not None:
            yield _entry(source)
        return
    if source.peek():
        raise BrokenFile(f"{name} has more after its {kind}", source.offset, source.entries, source.offset)


def _entry(source: _Text) -> Entry:
    """Parses the entry that begins at the current position and moves past it."""
    mark = source.peek()
    if mark not in ("{", "["):
        raise source.broken(f"expected an object, found {mark!r}" if mark else "")
    start = source.offset
    value, end = source.value()
    source.advance(end)
    source.entries += 1
    return Entry(None if source.last_repair >= start else start, source.offset - start, value)


def _array(source: _Text) -> Iterator[Entry]:
    """Yields the elements of the array that begins at the current position, and moves past it."""
    source.advance(1)
    mark = source.peek()
    while mark != "]":
        yield _entry(source)
        mark = source.peek()
        if mark == ",":
            source.advance(1)
            mark = source.peek()
            if mark == "]" and not source.repair:
                raise source.broken("expected an object, found ']'")
        elif mark != "]":
            raise source.broken(f"expected a comma or ], found {mark!r}" if mark else "")
    source.advance(1)


def _list_inside(source: _Text, holds_entries: HoldsEntries) -> int:
    """Returns how far ahead a list of entries begins in the object at the current position; 0 if there is none."""
    try:
        mark, ahead = source.skip_space(1)
        while mark == '"':
            key, ahead = source.value(ahead)
            mark, ahead = source.skip_space(ahead)
            if mark != ":":
                return 0
            mark, ahead = source.skip_space(ahead + 1)
            if mark == "[" and _is_list_of_entries(source, ahead, holds_entries, key):
                return ahead
            _, ahead = source.value(ahead)
            mark, ahead = source.skip_space(ahead)
            if mark == ",":
                mark, ahead = source.skip_space(ahead + 1)
    except BrokenFile:
        pass  # reading the entries reports the fault with its place
    return 0


def _is_list_of_entries(source: _Text, ahead: int, holds_entries: HoldsEntries, key: str | None) -> bool:
    """Tells whether the list `ahead` characters ahead holds entries; if unclear, a top-level list does."""
    mark, ahead = source.skip_space(ahead + 1)
    try:
        return holds_entries(key, source.value(ahead)[0]) if mark not in ("]", "") else key is None
    except BrokenFile:
        return key is None


def _leave_object(source: _Text, holds_entries: HoldsEntries) -> None:
    """Moves past the rest of the object; refuses a second list of entries."""
    while source.peek() == ",":
        source.advance(1)
        if source.peek() == "}" and source.repair:
            break
        key, end = source.value()
        source.advance(end)
        if not isinstance(key, str) or source.peek() != ":":
            raise source.broken("expected a key and a colon")
        source.advance(1)
        source.peek()
        value, end = source.value()
        if isinstance(value, list) and value and holds_entries(key, value[0]):
            raise source.broken(f"a second list of entries, under {key!r}; keep one of them")
        source.advance(end)
    if source.peek() != "}":
        raise source.broken(f"expected a comma or }}, found {source.peek()!r}" if source.peek() else "")
    source.advance(1)
