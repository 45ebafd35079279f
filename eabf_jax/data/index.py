"""Indexes files by the ids and offsets of their entries, so that conversations can be read in any order."""

import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from eabf_jax.data.forms import AUTO, FORMS, SHAREGPT, Content, Form, Unusable, conversation, find_form, turn_list
from eabf_jax.data.json_stream import CHUNK_BYTES, BrokenFile, Entry
from eabf_jax.data.sharegpt import Conversation, Parts
from eabf_jax.data.sources import files_of, read_entries
from eabf_jax.errors import InputError


class Index:
    """The conversations (or documents) of a set of files."""

    def __init__(
        self,
        paths: Sequence[Path | str],
        *,
        form: str = AUTO,
        keep_complete: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
        progress: Callable[[int], None] = lambda read: None,
    ):
        """Reads the files once and joins the parts of conversations.

        Args:
          paths: files, or directories of files.
          form: one of `forms.FORMATS`; with `auto`, the form of a file is that of its first entry with a known form.
          keep_complete: accepts trailing commas, and uses the complete entries of a truncated or malformed file.
          chunk_bytes: bytes to read at a time.
          progress: called with the number of bytes read so far, over all files.

        Raises:
          InputError: a file is missing, empty, without usable entries, or (unless `keep_complete`) broken.
        """
        self.paths, self.skipped = files_of([Path(path) for path in paths])
        self.entries = 0  # complete ones
        self.forms: Counter[str] = Counter()  # entries per form
        self.unusable: Counter[str] = Counter()  # unusable entries by reason
        self.broken: list[BrokenFile] = []  # faults of files whose complete entries are used
        self._file = array("L")
        self._offset = array("Q")
        self._length = array("Q")
        self._is_copied = array("B")
        self._forms: list[Form] = []
        # Copies of entries that cannot be read again from their file: compressed, repaired, or not JSON.
        self._copies = tempfile.TemporaryFile(prefix="eabf-prepare-")  # noqa: SIM115
        parts = Parts()
        bytes_before = 0
        for path in self.paths:

            def report(read: int, before: int = bytes_before) -> None:
                progress(before + read)

            entries = read_entries(path, form, chunk_bytes, keep_complete, report)
            self._add_file(path, entries, form, parts, keep_complete)
            bytes_before += path.stat().st_size
            report(0, bytes_before)
        self.conversations = parts.join()
        self.kept_apart = parts.kept_apart

    def _add_file(self, path: Path, entries: Iterator[Entry], wanted: str, parts: Parts, keep_complete: bool) -> None:
        """Records the entries of one file, and refuses a file without usable entries."""
        name = None
        read = used = 0
        unclaimed = ""
        reasons: Counter[str] = Counter()
        claimed_by: Counter[str] = Counter()
        try:
            for entry in entries:
                read += 1
                found = find_form(entry.value, wanted)
                name = name or found
                try:
                    if name is None or not FORMS[name].claims(entry.value):
                        claimed_by[found or ""] += 1
                        unclaimed = unclaimed or _describe(entry, read - 1)
                        raise Unusable(f"not of the form {name}" if name else "of no known form")
                    parts.add(entry.value, turn_list(entry.value) if name == SHAREGPT else None)
                except Unusable as fault:
                    reasons[fault.reason] += 1
                else:
                    used += 1
                    self._note(len(self._forms), entry)
        except BrokenFile as fault:
            if not keep_complete:
                fault.args = (f"{fault} (--keep-complete uses those)",)
                raise
            self.broken.append(fault)
        self.entries += read
        self.unusable += reasons
        if read == 0:
            raise InputError(f"{path} holds no whole entry")
        if name is None:
            raise _unknown(path, wanted, unclaimed)
        for other, count in claimed_by.items():
            if other and count > used:
                raise InputError(
                    f"{path}: the first entry with known keys is of the form {name}, {count} others are of the form "
                    f"{other}; --format {other} reads those"
                )
        if used == 0:
            told = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
            raise InputError(f"{path}: none of {read} entries can be used ({told})")
        self.forms[name] += used
        self._forms.append(FORMS[name])

    def read(self, found: Conversation) -> Content:
        """Reads one of `conversations` from its files.

        Returns:
          Its turns in order, without repeats; or a passage.

        Raises:
          Unusable: the conversation cannot become training text.
          InputError: a file has changed since it was indexed.
        """
        first, *others = [self._value(entry) for entry in found.entries]
        if not others:
            return self.form_of(found).read(first)
        turns = list(turn_list(first))
        for value, start in zip(others, found.starts[1:], strict=True):
            turns += turn_list(value)[len(turns) - start :]
        return conversation(first, turns)

    def form_of(self, found: Conversation) -> Form:
        """Returns the form of a conversation's entries."""
        return self._forms[self._file[found.entries[0]]]

    def _note(self, number: int, entry: Entry) -> None:
        """Records an entry's place; copies the entry if it cannot be read again from its file."""
        offset, length = entry.offset, entry.length
        self._is_copied.append(offset is None)
        if offset is None:
            data = json.dumps(entry.value).encode()
            offset, length = self._copies.tell(), len(data)
            try:
                self._copies.write(data)
            except OSError as error:
                raise InputError(
                    f"cannot keep {self.paths[number]} uncompressed in {tempfile.gettempdir()}: {error.strerror}; "
                    "free some space, or set TMPDIR to a directory with more"
                ) from None
        self._file.append(number)
        self._offset.append(offset)
        self._length.append(length)

    def _value(self, entry: int) -> object:
        """Reads one entry again."""
        path = self.paths[self._file[entry]]
        offset, length = self._offset[entry], self._length[entry]
        try:
            if self._is_copied[entry]:
                self._copies.seek(offset)
                return json.loads(self._copies.read(length))
            with path.open("rb") as stream:
                stream.seek(offset)
                value = json.loads(stream.read(length))
            if not self._forms[self._file[entry]].claims(value):
                raise ValueError("an entry of another form is there")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} changed while it was being read: {error}") from None
        return value


def _describe(entry: Entry, number: int) -> str:
    keys = ", ".join(map(repr, list(entry.value)[:6])) if isinstance(entry.value, dict) else "a list"
    place = "" if entry.offset is None else f" (byte {entry.offset})"
    return f"entry {number}{place} has the keys {keys or 'of an empty object'}"


def _unknown(path: Path, form: str, found: str) -> InputError:
    known = FORMS.items() if form == AUTO else [(form, FORMS[form])]
    needed = "; ".join(f"{name}: {known_form.needs}" for name, known_form in known)
    return InputError(f"{path} holds no entry of a known form: {found}; expected one of {needed}")
