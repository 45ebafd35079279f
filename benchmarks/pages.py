"""Writes what a program generated into a page, between two markers."""

from pathlib import Path

from eabf_jax.errors import InputError

END = "<!-- end -->"


def write_part(path: Path, begin: str, text: str) -> None:
    """Replaces the text between the marker `begin` and the next `END`.

    Args:
      path: a Markdown file.
      text: the new text.

    Raises:
      InputError: the file does not have exactly one such pair of markers.
    """
    written = path.read_text(encoding="utf-8")
    if written.count(begin) != 1 or END not in written.partition(begin)[2]:
        raise InputError(f"{path} has no part between {begin!r} and {END!r} to write into")
    before, _, rest = written.partition(begin)
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
