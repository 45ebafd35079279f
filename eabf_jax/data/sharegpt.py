"""Joins the parts of ShareGPT conversations that FastChat split, by their ids."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from eabf_jax.data.forms import TURN_LIST_KEYS, Unusable, role_of, text_of

# FastChat's splitter begins a new part when one more exchange would exceed 2,048 tokens (its default), and a token has
# at least one byte. A conversation that it split is therefore longer than this.
SPLIT_BYTES = 2048

_PART_ID = re.compile(r"(.+)_(\d{1,9})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The entries that hold the parts of one conversation, in order."""

    id: str  # id of its first part, or a digest of its text if the file has no id
    place: str  # the id that decides its place in the order, and its portion
    entries: tuple[int, ...]  # indices into the index's entries
    starts: tuple[int, ...]  # position of each entry's first turn in the conversation
    tie: int  # digest of its beginning, which orders conversations of equal id whatever file they are in


class _Part(NamedTuple):
    """An entry whose id looks like that of a part. Parts of one id sort by the fields up to `entry`."""

    start: int  # the number in its id: the position of its first turn
    turns: int
    first: int  # digest of its first turn
    last: int  # digest of its last turn
    entry: int
    id: str
    bytes: int
    opening_bytes: int  # of three turns, because the first may repeat the last turn of the previous part
    beside: int  # digest of the entry's other values
    begins_with_question: bool
    ends_with_answer: bool

    @property
    def end(self) -> int:
        return self.start + self.turns


class Parts:
    """Collects what joining needs to know of every entry, and joins them by one rule.

    FastChat's splitter gives the parts of a long conversation its id and the position of their first turn (`abc_0`,
    `abc_12`). An older splitter repeats the last answer of a part at the beginning of the next. Other datasets number
    their samples in the same way (`identity_0`, `identity_2`). The entries whose ids share the name before the number
    are therefore joined only if all of the following hold for all of them, and are kept apart otherwise:

    - The numbers are the positions of first turns. They begin at 0, and each part starts where the previous part ends,
      or one turn earlier if it repeats the previous part's last turn. Duplicate entries count once.
    - No part could have held the next exchange too (`SPLIT_BYTES`).
    - The other values of the entries are equal.

    Where an answer is not followed by a question, the entries are cut into separate conversations.

    Attributes:
      kept_apart: number of conversations whose ids look like parts of one, but which the rule does not join.
    """

    def __init__(self) -> None:
        self.kept_apart = 0
        self._added = 0
        self._alone: list[Conversation] = []
        self._groups: dict[str, list[_Part]] = {}

    def add(self, entry: Any, turns: Sequence[Any] | None) -> None:
        """Records one entry.

        Args:
          entry: the value in the file.
          turns: its turns; None for an entry that is not a conversation, which is never a part.
        """
        number = self._added
        self._added += 1
        given = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(given, str | int) and given != "":
            identifier = str(given)
        else:
            identifier = f"{digest(json.dumps(entry if turns is None else turns)):016x}"
        whole = [entry] if turns is None else turns
        first, last = (digest(json.dumps(whole[place])) if whole else 0 for place in (0, -1))
        match = None if turns is None else _PART_ID.fullmatch(identifier)
        if match is None:
            self._alone.append(Conversation(identifier, identifier, (number,), (0,), first ^ last))
            return
        sizes = [_size(turn) for turn in whole]
        beside = {key: value for key, value in entry.items() if key != "id" and key not in TURN_LIST_KEYS}
        part = _Part(
            start=int(match[2]),
            turns=len(whole),
            first=first,
            last=last,
            entry=number,
            id=identifier,
            bytes=sum(sizes),
            opening_bytes=sum(sizes[:3]),
            beside=digest(json.dumps(beside, sort_keys=True)),
            begins_with_question=bool(whole) and role_of(whole[0]) == "user",
            ends_with_answer=bool(whole) and role_of(whole[-1]) == "assistant",
        )
        self._groups.setdefault(match[1], []).append(part)

    def join(self) -> list[Conversation]:
        """Applies the rule.

        Returns:
          The conversations, single entries first.
        """
        conversations = list(self._alone)
        for group in self._groups.values():
            # Entries of one number with equal first and last turns are duplicates.
            parts = [next(same) for _, same in groupby(sorted(group), key=lambda part: part[:4])]
            is_one = _are_numbered_by_turns(parts)
            runs = list(_runs(parts)) if is_one else [[part] for part in parts]
            for run in runs:
                # Runs of one id may still be one conversation, so they all go into the same portion.
                place = parts[0].id if is_one else run[0].id
                entries = tuple(part.entry for part in run)
                starts = tuple(part.start - run[0].start for part in run)
                conversations.append(Conversation(run[0].id, place, entries, starts, run[0].first ^ run[-1].last))
            self.kept_apart += len(runs) if len(runs) > 1 else 0
        return conversations


def _are_numbered_by_turns(parts: list[_Part]) -> bool:
    """Tells whether the numbers of one id are positions of turns and its entries were too long for one part."""
    return parts[0].start == 0 and all(
        (after.start == part.end or _overlap(part, after))
        and part.bytes + after.opening_bytes > SPLIT_BYTES
        and part.beside == after.beside
        for part, after in pairwise(parts)
    )


def _overlap(part: _Part, after: _Part) -> bool:
    """Tells whether a part begins with the last turn of the previous part."""
    return part.start < after.start == part.end - 1 and after.first == part.last


def _runs(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Cuts the parts of one id where an answer is not followed by a question."""
    run = parts[:1]
    for part, after in pairwise(parts):
        # The splitter writes an empty part before a first exchange that alone is too long.
        alternates = after.begins_with_question and (part.ends_with_answer or part.turns == 0)
        if not alternates and not _overlap(part, after):
            yield run
            run = []
        run.append(after)
    yield run


def _size(turn: Any) -> int:
    """Returns the bytes of a turn's text; 0 if it has no text."""
    try:
        return len(text_of(turn).encode("utf-8", "surrogatepass")) if isinstance(turn, dict) else 0
    except Unusable:
        return 0


def digest(text: str) -> int:
    """Computes a stable 64-bit digest of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def order_key(seed: int, conversation: Conversation) -> tuple[int, int]:
    """Returns a sort key for an order that depends on the seed and the ids, not on files or their order."""
    return digest(f"{seed}:{conversation.place}"), conversation.tie


def fraction(identifier: str) -> float:
    """Hashes an id uniformly into [0, 1), independent of the seed, so that disjoint ranges are disjoint data."""
    return (digest(identifier) >> 11) / 2.0**53
