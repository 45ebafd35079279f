"""Joins the parts of ShareGPT conversations that FastChat split, by their ids."""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from eabf_jax.data.forms import TURN_LIST_KEYS, Unusable, role_of, text_of

# FastChat's splitter begins a new part if one more exchange would exceed 2,048 tokens (its default). A token has at
# least one byte, so a part and the next exchange together are longer than this.
SPLIT_BYTES = 2048

_PART_ID = re.compile(r"(.+)_(\d{1,9})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The entries with the parts of one conversation, in order.

    Attributes:
      id: id of the first part, or a digest of its content if it has no id.
      place: the id that determines the conversation's order and portion.
      entries: numbers of the entries in the index.
      starts: position of each entry's first turn in the conversation.
      tie: digest of the first and last turns, which orders conversations of equal id independently of their files.
    """

    id: str
    place: str
    entries: tuple[int, ...]
    starts: tuple[int, ...]
    tie: int


class Parts:
    """Collects facts about every entry, and joins the parts of conversations.

    FastChat's splitter names the parts of a long conversation by its id and the position of their first turn (`abc_0`,
    `abc_12`). An older splitter repeats the last answer of a part at the beginning of the next. Other datasets number
    their samples in the same way (`identity_0`, `identity_2`). Entries whose ids share the name before the number are
    therefore joined only if all of them meet all of these conditions:

    - The numbers are the positions of first turns. They begin at 0, and each part starts where the previous part ends,
      or one turn earlier if it repeats the previous part's last turn. Duplicate entries count once.
    - No part had room for the next exchange (`SPLIT_BYTES`).
    - The other values of the entries are equal.

    Joined entries are cut into separate conversations where an answer is not followed by a question.

    Attributes:
      kept_apart: number of conversations whose ids look like parts of one, but which are not joined.
    """

    def __init__(self) -> None:
        """Starts without entries."""
        self.kept_apart = 0
        self._alone: set[int] = set()
        self._ids: list[str] = []
        self._turns = array("L")
        self._bytes = array("Q")
        self._opening_bytes = array("Q")
        self._first = array("Q")
        self._last = array("Q")
        self._beside = array("Q")
        self._begins_with_question = array("B")
        self._ends_with_answer = array("B")

    def add(self, entry: Any, turns: Sequence[Any] | None) -> None:
        """Records one entry.

        Args:
          entry: the value in the file.
          turns: its turns; None for an entry that is not a conversation and therefore never a part.
        """
        identifier = entry.get("id") if isinstance(entry, dict) else None
        if isinstance(identifier, str | int) and identifier != "":
            self._ids.append(str(identifier))
        else:
            self._ids.append(f"{digest(json.dumps(entry if turns is None else turns)):016x}")
        whole = [entry] if turns is None else turns
        sizes: list[int] = []
        beside = {}
        if turns is None or _PART_ID.fullmatch(self._ids[-1]) is None:
            self._alone.add(len(self._ids) - 1)
        else:
            sizes = [_size(turn) for turn in turns]
            beside = {key: value for key, value in entry.items() if key != "id" and key not in TURN_LIST_KEYS}
        self._turns.append(len(whole))
        self._bytes.append(sum(sizes))
        # Three turns, because the first may repeat the last turn of the previous part.
        self._opening_bytes.append(sum(sizes[:3]))
        self._first.append(digest(json.dumps(whole[0])) if whole else 0)
        self._last.append(digest(json.dumps(whole[-1])) if whole else 0)
        self._beside.append(digest(json.dumps(beside, sort_keys=True)))
        self._begins_with_question.append(bool(sizes) and role_of(whole[0]) == "user")
        self._ends_with_answer.append(bool(sizes) and role_of(whole[-1]) == "assistant")

    def join(self) -> list[Conversation]:
        """Joins the parts; returns the conversations, those whose ids cannot be parts first."""
        groups: dict[str, list[tuple[int, int]]] = {}
        for entry in range(len(self._ids)):
            match = None if entry in self._alone else _PART_ID.fullmatch(self._ids[entry])
            if match is not None:
                groups.setdefault(match[1], []).append((int(match[2]), entry))
        conversations = [self._conversation([(0, entry)]) for entry in sorted(self._alone)]
        for group in groups.values():
            parts = list(self._distinct(group))
            if self._are_numbered_by_turns(parts):
                runs = list(self._runs(parts))
                # The runs may belong to one conversation, so all of them go into the same portion.
                conversations += [self._conversation(run, place=parts[0][1]) for run in runs]
            else:
                runs = [[part] for part in parts]
                conversations += [self._conversation(run) for run in runs]
            self.kept_apart += len(runs) if len(runs) > 1 else 0
        return conversations

    def _distinct(self, group: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Yields the entries of one name in order of their numbers, without duplicates."""
        ordered = sorted((start, self._turns[e], self._first[e], self._last[e], e) for start, e in group)
        previous: tuple[int, ...] = ()
        for *key, entry in ordered:
            if tuple(key) != previous:
                yield key[0], entry
            previous = tuple(key)

    def _are_numbered_by_turns(self, parts: list[tuple[int, int]]) -> bool:
        """Tells whether the entries of one name meet the conditions for joining."""
        return parts[0][0] == 0 and all(
            (next_start == start + self._turns[part] or self._overlaps(start, part, next_start, next_part))
            and self._bytes[part] + self._opening_bytes[next_part] > SPLIT_BYTES
            and self._beside[part] == self._beside[next_part]
            for (start, part), (next_start, next_part) in pairwise(parts)
        )

    def _overlaps(self, start: int, part: int, next_start: int, next_part: int) -> bool:
        """Tells whether a part begins with the last turn of the previous part."""
        end = start + self._turns[part]
        return start < next_start == end - 1 and self._first[next_part] == self._last[part]

    def _runs(self, parts: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Cuts the parts of one name where an answer is not followed by a question."""
        run = parts[:1]
        for (start, part), (next_start, next_part) in pairwise(parts):
            # If the first exchange alone is too long, the splitter writes an empty part before it.
            alternates = self._begins_with_question[next_part] and (
                self._ends_with_answer[part] or self._turns[part] == 0
            )
            if not alternates and not self._overlaps(start, part, next_start, next_part):
                yield run
                run = []
            run.append((next_start, next_part))
        yield run

    def _conversation(self, parts: list[tuple[int, int]], place: int | None = None) -> Conversation:
        first, last = parts[0][1], parts[-1][1]
        return Conversation(
            id=self._ids[first],
            place=self._ids[first if place is None else place],
            entries=tuple(entry for _, entry in parts),
            starts=tuple(start - parts[0][0] for start, _ in parts),
            tie=self._first[first] ^ self._last[last],
        )


def _size(turn: Any) -> int:
    """Returns the size of a turn's text in bytes; 0 if it has no text."""
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
    """Hashes a conversation's id uniformly into [0, 1), whatever the seed, so that disjoint ranges share no data."""
    return (digest(identifier) >> 11) / 2.0**53
