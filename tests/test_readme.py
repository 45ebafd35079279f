"""The README's table is the file that `make demo` wrote."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEN = ("trained", "untrained")


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


def test_speeds_of_generation_are_those_of_the_committed_run() -> None:
    files = [f"benchmarks/results/llama2_7b_generate{kind}_h100.json" for kind in ("", "_int8")]
    plain, int8 = (json.loads((ROOT / file).read_text()) for file in files)
    lines = (ROOT / "README.md").read_text().splitlines()
    for name, told, form in (("short", "128 tokens", ".1f"), ("long", "16,384", ".1f"), ("batch", "2,048", ",.0f")):
        ours, other, theirs = (
            report["runs"][name]["tokens_per_second"] for report in (plain, int8, plain["peer"])
        )  # fmt: skip
        cells = f" | {ours:{form}} | {other:{form}} | {theirs:{form}} (ours {ours / theirs:.2f} ×) |"
        assert [line for line in lines if line.endswith(cells) and told in line], cells
    first, mfu = plain["runs"]["long"]["first_token_seconds"], plain["prefill_mfu"]
    assert any(f"(the first token in {first:.2f} s, {100 * mfu:.1f} % MFU)" in line for line in lines)


def test_retrieval_is_that_of_the_committed_files() -> None:
    tasks = [json.loads((ROOT / f"docs/retrieval/{task}.json").read_text()) for task in ("passkey", "line_retrieval")]
    table = (ROOT / "docs/evaluation.md").read_text().splitlines()
    for label in tasks[0]["cells"]:
        found = [task["short_and_long"][label][part] for task in tasks for part in ("short", "long")]
        cells = [f"{c['hits'] / c['total']:.0%} ({c['low']:.0%}–{c['high']:.0%})".replace("%", "") for c in found]
        assert " | ".join([f"| {label}", *cells]) + " |" in table
    long = {label: both["long"]["hits"] for label, both in tasks[0]["short_and_long"].items()}
    text = " ".join((ROOT / "README.md").read_text().split())
    trained, untrained = ([long[f"{name}, {when}"] for name in ("EABF", "ABF", "YaRN", "PI")] for when in WHEN)
    assert (long["untouched"], trained[3], untrained[3]) == (0, 0, 0)
    assert "it answers 0 of 100 passkey questions untouched" in text
    assert "{} with EABF, {} with ABF, {} with YaRN and none with PI".format(*trained) in text
    assert "no training at all, {}, {} and {}, and none".format(*untrained) in text
    assert max(cell["hits"] for row in tasks[1]["cells"].values() for cell in row) == 2


def test_files_that_the_readme_links_to_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link.partition("#")[0]).exists()] == []
