"""Writes the table of architectures in docs/architectures.md from the tests that show its cells.

    python benchmarks/architecture_table.py

A test with the marker `shows(column)` shows that column for the architecture of its case, or for those that the marker
lists. No test runs here; an architecture without a test for each column is an error.
"""

import argparse
import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from pages import write_part

from eabf_jax.cli import ArgumentParser, run
from eabf_jax.errors import InputError
from eabf_jax.interop.architectures import ARCHITECTURES, OWN_TYPE

ROOT = Path(__file__).parents[1]
PAGE, TESTS = ROOT / "docs/architectures.md", "tests/interop"
BEGIN = "<!-- begin: written by benchmarks/architecture_table.py -->"
COLUMNS = ("import", "export", "train", "decode", "LoRA", "EABF export", "GGUF in", "GGUF out")


class Shown:
    """A plugin of pytest that notes, for each cell, the tests that show it."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], set[str]] = defaultdict(set)

    def pytest_collection_modifyitems(self, items: Iterable[pytest.Item]) -> None:
        for item in items:
            for marker in item.iter_markers("shows"):
                column, *listed = marker.args
                case = getattr(item, "callspec", None)
                own = [value for value in case.params.values() if isinstance(value, str)] if case else []
                for kind in listed[0] if listed else own:
                    where = item.path.relative_to(ROOT / "tests")
                    self.cells[kind, column].add(f"`{getattr(item, 'originalname', item.name)}` in `{where}`")


def collected() -> Shown:
    """Collects the tests; raises InputError if pytest cannot."""
    shown, printed = Shown(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = pytest.main(["--collect-only", "-qq", "--rootdir", str(ROOT), str(ROOT / TESTS)], plugins=[shown])
    if status != pytest.ExitCode.OK:
        raise InputError(f"pytest cannot collect {TESTS}:\n{printed.getvalue()}")
    return shown


def table(shown: Shown) -> str:
    """Returns the table and the tests of each column.

    Raises:
      InputError: an architecture has no test for a column.
    """
    kinds = [kind for kind in ARCHITECTURES if kind != OWN_TYPE]
    untested = [f"{kind}: {column}" for kind in kinds for column in COLUMNS if not shown.cells.get((kind, column))]
    if untested:
        raise InputError(f"no test shows {', '.join(untested)}")
    lines = [f"| `model_type` | {' | '.join(COLUMNS)} |", "| --- |" + " :-: |" * len(COLUMNS)]
    lines += [f"| `{kind}` |" + " ✓ |" * len(COLUMNS) for kind in kinds]
    lines += ["", "| column | test, which has a case for each architecture |", "| --- | --- |"]
    for column in COLUMNS:
        tests = set.union(*(shown.cells[kind, column] for kind in kinds))
        lines.append(f"| {column} | {', '.join(sorted(tests))} |")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(
        "architecture_table.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the markers (default: %(default)s)")
    options = parser.parse_args()
    write_part(options.page, BEGIN, table(collected()))
    print(f"page: {options.page}")


if __name__ == "__main__":
    run(main)
