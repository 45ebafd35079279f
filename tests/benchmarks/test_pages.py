"""What a program generated replaces what stood between the markers, and nothing else."""

import pytest
from pages import END, write_part

from eabf_jax.errors import InputError

BEGIN = "<!-- begin: one -->"


def test_only_the_part_between_the_markers_changes(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"Before.\n\n{BEGIN}\n\nold\n\n{END}\n\nAfter.\n<!-- begin: two -->\nkept\n{END}\n")
    write_part(path, BEGIN, "\nnew\n")
    found = path.read_text()
    assert found == f"Before.\n\n{BEGIN}\n\nnew\n\n{END}\n\nAfter.\n<!-- begin: two -->\nkept\n{END}\n"


@pytest.mark.parametrize("text", ["# Speed\n", f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_a_page_without_one_pair_of_markers_is_left_alone(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(InputError, match="no part between"):
        write_part(path, BEGIN, "tables")
    assert path.read_text() == text
