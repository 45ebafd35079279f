"""The table in docs/architectures.md is that of the tests' markers."""

import subprocess
import sys
from pathlib import Path

import pytest

from eabf_jax.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.mark.document_check
def test_the_page_is_that_of_the_tests(tmp_path: Path) -> None:
    """In a separate process, because pytest collects there."""
    page, written = tmp_path / "page.md", (ROOT / "docs/architectures.md").read_text(encoding="utf-8")
    page.write_text(written, encoding="utf-8")
    command = [sys.executable, "benchmarks/architecture_table.py", "--page", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert page.read_text(encoding="utf-8") == written


def test_an_architecture_without_a_test_is_an_error(load_program) -> None:
    program = load_program("architecture_table")
    shown = program.Shown()
    for kind in program.ARCHITECTURES:
        for column in program.COLUMNS:
            if (kind, column) != ("phi3", "decode"):
                shown.cells[kind, column].add("`test_it` in `it.py`")
    with pytest.raises(InputError, match=r"^no test shows phi3: decode$"):
        program.table(shown)
