"""ShareGPT files, read in two passes: an index of byte offsets first, then single conversations in any order.

A file is a JSON array or one object after another (JSONL), of any size: neither pass holds more than one chunk of it.
"""

import codecs
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from eabf_jax.errors import InputError

CHUNK_BYTES = 1 << 20
LARGEST_ENTRY = 1 << 28

TURN_LIST_KEYS = ("conversations", "conversation", "messages")
ROLE_KEYS = ("from", "role")
TEXT_KEYS = ("value", "content")

_DECODER = json.JSONDecoder()
_WHITESPACE = re.compile(r"[ \t\r\n]*")
_PART_ID = re.compile(r"(.+)_(\d{1,9})", re.DOTALL)
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_UNFINISHED_NUMBER = re.compile(r"-?\d*(\.|[eE][+-]?)?")
# No token of JSON other than a string is longer than this, so an error further from the end is no lack of input.
_LONGEST_TOKEN = 16


class RawTurn(NamedTuple):
    """One turn as the file has it; `role` and `text` are None where they are missing or not strings."""

    role: str | None
    text: str | None


class Entry(NamedTuple):
    """One top-level object of a file: where its bytes are, and what they hold."""

    offset: int
    length: int
    value: dict[str, Any]


class BrokenFile(InputError):
    """A file that stops being JSON somewhere.

    Attributes:
      offset: byte where it does; for a file cut off, its end.
      entries: whole entries before that byte.
    """

    def __init__(self, what: str, offset: int, entries: int, entry_start: int):
        """Builds the message.

        Args:
          what: what is wrong, to be followed by the place.
          offset: byte where it is wrong.
          entries: whole entries before it.
          entry_start: byte where the first incomplete entry begins.
        """
        super().__init__(
            f"{what} at byte {offset}, in the entry that begins at byte {entry_start}; "
            f"{entries} whole entries before it (--keep-complete goes on with those)"
        )
        self.offset = offset
        self.entries = entries


class _Text:
    """The part of a file that is being parsed: decoded text, a position in it, and that position's byte offset."""

    def __init__(self, stream: IO[bytes], chunk_bytes: int, progress: Callable[[int], None] | None):
        self._stream = stream
        self._chunk_bytes = chunk_bytes
        self._progress = progress
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self.bytes_read = 0
        self._ended = False
        self.bad_byte: int | None = None
        self.text = ""
        self.position = 0
        self.offset = 0

    def extend(self) -> bool:
        """Reads on; the more text is waiting, the more, so that parsing a long entry again stays linear in total."""
        if self._ended:
            return False
        waiting = len(self.text) - self.position
        chunk = self._stream.read(max(self._chunk_bytes, waiting))
        self.bytes_read += len(chunk)
        self._ended = not chunk
        try:
            added = self._decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            self.bad_byte = self.bytes_read - len(error.object) + error.start
            added = error.object[: error.start].decode("utf-8")
            # A character that lacks its last bytes at the end of the file means a file cut off, not a wrong encoding.
            if self._ended and error.reason == "unexpected end of data":
                self.bad_byte = None
            self._ended = True
        self.text = self.text[self.position :] + added
        self.position = 0
        if self._progress is not None:
            self._progress(self.bytes_read)
        return True

    def peek(self) -> str:
        """The next character that is not white space, left in place; empty at the end of the file."""
        while True:
            self.advance(_WHITESPACE.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.extend():
                return ""

    def advance(self, end: int) -> None:
        """Moves on to character `end` of the text."""
        self.offset = self.byte_at(end)
        self.position = end

    def byte_at(self, position: int) -> int:
        """Byte offset of a character at or after the current position."""
        passed = self.text[self.position : position]
        return self.offset + (len(passed) if passed.isascii() else len(passed.encode()))


def scan(
    stream: IO[bytes],
    name: str,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Entry]:
    """Yields the entries of a JSON array or of a file of JSON objects one after another.

    Args:
      stream: the file, opened in binary mode at its beginning.
      name: what to call it in an error.
      chunk_bytes: how much to read at a time; changes nothing but speed and memory.
      progress: called with the number of bytes read so far.

    Returns:
      An iterator over the entries in file order.

    Raises:
      BrokenFile: the file is cut off or malformed; every whole entry before that place has been yielded by then.
    """
    source = _Text(stream, chunk_bytes, progress)
    entries = 0
    if source.peek() == "\ufeff":
        source.advance(source.position + 1)
    in_array = source.peek() == "["
    if in_array:
        source.advance(source.position + 1)
    while True:
        mark = source.peek()
        if in_array and entries and mark == ",":
            source.advance(source.position + 1)
            mark = source.peek()
        elif in_array and mark == "]":
            source.advance(source.position + 1)
            if source.peek():
                raise BrokenFile(f"{name} goes on after its array ends", source.offset, entries, source.offset)
            return
        elif in_array and entries and mark:
            raise _broken(source, name, f"a comma or ] was expected, {mark!r} found", entries)
        if not mark and not in_array and source.bad_byte is None:
            return
        start = source.offset
        value = _whole_object(source, name, mark, entries)
        yield Entry(start, source.offset - start, value)
        entries += 1


def _whole_object(source: _Text, name: str, mark: str, entries: int) -> dict[str, Any]:
    """Parses the object that begins at the current position and moves past it."""
    if mark != "{":
        raise _broken(source, name, f"an object was expected, {mark!r} found" if mark else "", entries)
    while True:
        try:
            value, end = _DECODER.raw_decode(source.text, source.position)
        except json.JSONDecodeError as error:
            in_string = error.msg.startswith("Unterminated string")
            if not in_string and error.pos < len(source.text) - _LONGEST_TOKEN:
                raise _broken(source, name, error.msg, entries, error.pos) from None
            if len(source.text) - source.position > LARGEST_ENTRY:
                raise _broken(
                    source, name, f"an entry does not end within {LARGEST_ENTRY} characters", entries
                ) from None
            if not source.extend():
                in_string = in_string or error.msg.startswith("Invalid \\u")
                cut = in_string or _is_unfinished(source.text[error.pos :])
                raise _broken(source, name, "" if cut else error.msg, entries, error.pos, in_string) from None
        except (RecursionError, ValueError) as error:
            raise _broken(source, name, str(error), entries) from None
        else:
            source.advance(end)
            return value


def _is_unfinished(rest: str) -> bool:
    """Whether the text from an error to the end of the file could be the beginning of something right."""
    rest = rest.strip()
    return any(word.startswith(rest) for word in _LITERALS) or _UNFINISHED_NUMBER.fullmatch(rest) is not None


def _broken(
    source: _Text, name: str, what: str, entries: int, position: int | None = None, in_string: bool = False
) -> BrokenFile:
    """Builds the error for the current entry; no `what` means that the file ends too early."""
    if source.bad_byte is not None:
        return BrokenFile(f"{name} is not UTF-8", source.bad_byte, entries, source.offset)
    if not what:
        inside = " inside a string" if in_string else ""
        return BrokenFile(f"{name} is cut off{inside}", source.bytes_read, entries, source.offset)
    offset = source.offset if position is None else source.byte_at(position)
    return BrokenFile(f"{name} is not valid JSON: {what}", offset, entries, source.offset)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Where one conversation is: the entries that hold its parts, in order.

    Attributes:
      id: id of its first part, or a digest of its text where the file gives none.
      entries: indices into the index's entries.
      starts: position of each entry's first turn in the conversation, counted from the first entry's.
      tie: digest of its beginning, which orders conversations of equal id whatever file they are in.
    """

    id: str
    entries: tuple[int, ...]
    starts: tuple[int, ...]
    tie: int


class Index:
    """What is where in a set of ShareGPT files: ids and byte offsets, no texts.

    Attributes:
      conversations: every conversation, its parts joined.
      entries: number of whole entries read.
      broken: the faults of files that `keep_complete` went on with.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        *,
        keep_complete: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
        progress: Callable[[int], None] | None = None,
    ):
        """Reads the files once and joins the parts of conversations.

        FastChat numbers the parts of a long conversation by the position of their first turn (`abc_0`, `abc_17`), and
        a part may repeat the answer that the part before it ended with. An entry is joined to the one before it where
        those positions and turns agree, so that ids which merely count conversations (`item_0`, `item_1`) join nothing.

        Args:
          paths: JSON or JSONL files.
          keep_complete: go on with the whole entries of a file that is cut off or malformed.
          chunk_bytes: how much to read at a time.
          progress: called with the number of bytes read so far, over all files.

        Raises:
          InputError: a file that is missing, empty, broken (unless `keep_complete`) or holds something else.
        """
        self.paths = tuple(Path(path) for path in paths)
        self.broken: list[BrokenFile] = []
        self._file = array("H")
        self._offset = array("Q")
        self._length = array("Q")
        parts = _Parts()
        bytes_before = 0
        for number, path in enumerate(self.paths):

            def report(read: int, before: int = bytes_before) -> None:
                if progress is not None:
                    progress(before + read)

            entries_before = len(self._offset)
            try:
                with path.open("rb") as stream:
                    for entry in scan(stream, str(path), chunk_bytes, report):
                        parts.add(entry, path, len(self._offset) - entries_before)
                        self._file.append(number)
                        self._offset.append(entry.offset)
                        self._length.append(entry.length)
            except BrokenFile as fault:
                if not keep_complete:
                    raise
                self.broken.append(fault)
            except OSError as error:
                raise InputError(
                    f"cannot read {path}: {error.strerror}; a ShareGPT JSON or JSONL file is needed"
                ) from None
            if len(self._offset) == entries_before:
                raise InputError(f"{path} holds no whole entry: a ShareGPT JSON array or JSONL file is needed")
            bytes_before += path.stat().st_size
        self.entries = len(self._offset)
        self.conversations = parts.join()

    def read(self, conversation: Conversation) -> list[RawTurn]:
        """Reads one conversation's turns from its files.

        Args:
          conversation: one of `conversations`.

        Returns:
          The turns in order, each once.

        Raises:
          InputError: the file has changed since it was indexed.
        """
        turns: list[RawTurn] = []
        for entry, start in zip(conversation.entries, conversation.starts, strict=True):
            path = self.paths[self._file[entry]]
            try:
                with path.open("rb") as stream:
                    stream.seek(self._offset[entry])
                    value = json.loads(stream.read(self._length[entry]))
                part = _turn_list(value)
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{path} changed while it was being read: {error}") from None
            turns += [_raw_turn(turn) for turn in part[len(turns) - start :]]
        return turns


class _Parts:
    """What joining needs to know of every entry, until it is done."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._turns = array("L")
        self._first = array("Q")
        self._last = array("Q")

    def add(self, entry: Entry, path: Path, number: int) -> None:
        """Notes one entry's id, number of turns, and digests of its first and last turn."""
        try:
            turns = _turn_list(entry.value)
        except TypeError as error:
            raise InputError(f"entry {number} of {path} (byte {entry.offset}) {error}") from None
        identifier = entry.value.get("id")
        if isinstance(identifier, str | int) and identifier != "":
            self._ids.append(str(identifier))
        else:
            self._ids.append(f"{_digest(json.dumps(turns)):016x}")
        self._turns.append(len(turns))
        self._first.append(_digest(json.dumps(turns[0])) if turns else 0)
        self._last.append(_digest(json.dumps(turns[-1])) if turns else 0)

    def join(self) -> list[Conversation]:
        """Groups the entries by the part of the id before the number, and chains those that follow on."""
        groups: dict[str, list[tuple[int, int]]] = {}
        alone: list[int] = []
        for entry, identifier in enumerate(self._ids):
            match = _PART_ID.fullmatch(identifier)
            if match is None:
                alone.append(entry)
            else:
                groups.setdefault(match[1], []).append((int(match[2]), entry))
        conversations = [self._conversation([(0, entry)]) for entry in alone]
        for group in groups.values():
            conversations += self._chains(group)
        return conversations

    def _chains(self, group: list[tuple[int, int]]) -> Iterator[Conversation]:
        """Cuts the entries of one id into runs in which each continues the one before it."""
        ordered = sorted((start, self._turns[e], self._first[e], self._last[e], e) for start, e in group)
        chain: list[tuple[int, int]] = []
        previous: tuple[int, ...] = ()
        for start, turns, first, last, entry in ordered:
            if (start, turns, first, last) == previous:
                continue
            if chain and not self._follows(chain[-1], start, first):
                yield self._conversation(chain)
                chain = []
            chain.append((start, entry))
            previous = (start, turns, first, last)
        yield self._conversation(chain)

    def _follows(self, before: tuple[int, int], start: int, first: int) -> bool:
        """Whether a part that begins at `start` continues the part before it."""
        end = before[0] + self._turns[before[1]]
        return start == end or (start == end - 1 and start > before[0] and first == self._last[before[1]])

    def _conversation(self, chain: list[tuple[int, int]]) -> Conversation:
        begin = chain[0][0]
        return Conversation(
            id=self._ids[chain[0][1]],
            entries=tuple(entry for _, entry in chain),
            starts=tuple(start - begin for start, _ in chain),
            tie=self._first[chain[0][1]] ^ self._last[chain[-1][1]],
        )


def _turn_list(entry: Any) -> list[Any]:
    """The list of turns of an entry; TypeError where it has none."""
    for key in TURN_LIST_KEYS:
        if isinstance(entry.get(key), list):
            return entry[key]
    found = ", ".join(map(repr, list(entry)[:6])) or "none"
    raise TypeError(f"has no list of turns under {' or '.join(map(repr, TURN_LIST_KEYS))}; keys found: {found}")


def _raw_turn(turn: Any) -> RawTurn:
    if not isinstance(turn, dict):
        return RawTurn(None, None)
    return RawTurn(_first_string(turn, ROLE_KEYS), _first_string(turn, TEXT_KEYS))


def _first_string(turn: dict[str, Any], keys: Sequence[str]) -> str | None:
    return next((turn[key] for key in keys if isinstance(turn.get(key), str)), None)


def _digest(text: str) -> int:
    """A stable 64-bit digest of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def order_key(seed: int, conversation: Conversation) -> tuple[int, int]:
    """Sorts conversations into an order that depends on the seed and the ids, not on files or their order.

    Args:
      seed: any integer.
      conversation: the conversation to place.

    Returns:
      A key to sort by.
    """
    return _digest(f"{seed}:{conversation.id}"), conversation.tie


def fraction(identifier: str) -> float:
    """Places an id in [0, 1), evenly and whatever the seed, so that disjoint ranges are disjoint data.

    Args:
      identifier: a conversation's id.

    Returns:
      A number in [0, 1).
    """
    return (_digest(identifier) >> 11) / 2.0**53
