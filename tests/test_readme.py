"""The README's table is the file that `make demo` wrote."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_table_is_that_of_the_committed_demo() -> None:
    bands = json.loads((ROOT / "docs/demo/loss_by_position.json").read_text())["bands"]
    lines = (ROOT / "README.md").read_text().splitlines()
    for label, row in bands.items():
        assert f"| {label} | " + " | ".join(f"{band['mean']:.3f}" for band in row) + " |" in lines


def test_the_negative_result_is_that_of_the_committed_figures() -> None:
    bands = json.loads((ROOT / "docs/demo/all_methods.json").read_text())["bands"]
    yarn, ours = ([band["mean"] for band in bands[f"{name}, 6 steps"]] for name in ("YaRN", "EABF"))
    assert f"({yarn[3]:.3f} against {ours[3]:.3f}," in (ROOT / "README.md").read_text()
    assert yarn[3] < ours[3]
    assert all(theirs > mine for theirs, mine in zip(yarn[:3], ours[:3], strict=True))


def test_files_that_the_readme_links_to_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []
