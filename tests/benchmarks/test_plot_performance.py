import json
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from pages import END

from eabf_jax.errors import InputError

RAN = {
    "out_of_memory": False,
    "length": 16_384,
    "tokens_per_second": 11_300.4,
    "mfu": 0.6004,
    "peak_gib": 131.25,
    "limit_gib": 135.6,
    "planned_gib": 128.04,
    "seconds": [1.0, 1.02, 0.98],
    "compute": {"remat": "dots:12,qkv", "optimizer_memory": "host"},
    "microbatches": 2,
    "compile_seconds": 31.5,
    "strongest_peer": "default/compiled/liger/checkpointed/bfloat16",
    "ratio_to_strongest_peer": 1.387,
    "strongest_float32_peer": None,
    "ratio_to_strongest_float32_peer": None,
}
PEER = {
    "out_of_memory": False,
    "tokens_per_second": 8149.0,
    "mfu": 0.433,
    "peak_gib": 60.6,
    "microbatches": 2,
    "seconds": [2.0, 2.5],
}
FULL = {"out_of_memory": True, "error": "CUDA out of memory.", "microbatches": 2}
PEERS = {
    "default/compiled/liger/checkpointed/bfloat16": PEER,
    "default/eager/none/checkpointed/bfloat16": PEER | {"tokens_per_second": 5000.0},
    "default/compiled/liger/checkpointed/autocast": FULL,
}
ALONE = {"strongest_peer": None, "ratio_to_strongest_peer": None, "peers": {}}
RUN = {
    "benchmark": "train_step",
    "name": "llama2_7b_eabf_16k",
    "device": "NVIDIA H200",
    "devices": 1,
    "commit": "0123abc",
    "sources": {},
}


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("plot_performance")


@pytest.fixture
def results(tmp_path):
    """A run, a sweep in which the peer runs out of memory, another device, and another benchmark's file."""
    folder = tmp_path / "results"
    folder.mkdir()

    def write(name, report):
        (folder / name).write_text(json.dumps(report))

    write("one.json", {**RUN, **RAN, "date": "2024-01-02", "peers": PEERS})
    far = {**RAN, "length": 65_536, "tokens_per_second": 5000.0, "peak_gib": 135.6}
    far |= {"strongest_peer": None, "ratio_to_strongest_peer": None, "peers": {next(iter(PEERS)): FULL}}
    sweep = [{**RAN, "tokens_per_second": 9000.0, "peers": PEERS}, far]
    write("sweep.json", {**RUN, **sweep[0], "date": "2024-01-01", "lengths": sweep})
    whole = {"steps": 6, "total_seconds": 299.6, "total_seconds_without_compile": 268.1}
    cost = {"seconds_with": [1.0, 1.0], "seconds_without": [1.0, 1.0], "ratio": 0.0042}
    other = {**RUN, **RAN, "device": "NVIDIA H100", "devices": 2, "date": "2024-01-03", **ALONE}
    write("recipe.json", {**other, "recipe": whole, "multiplier_cost": cost})
    write("tiny_recipe.json", {"device": "NVIDIA H100", "runs": []})
    return folder


def test_page_and_pictures_are_written_from_results(program, results, tmp_path, monkeypatch):
    path = tmp_path / "performance.md"
    begin, readme = program.BEGIN.format, tmp_path / "README.md"
    path.write_text(f"# Speed\n\nBefore.\n\n{begin('performance')}\n\nold table\n\n{END}\n\nAfter.\n")
    readme.write_text("\n".join(f"{begin(part)}\n{END}" for part in ("training", "generation")))
    monkeypatch.setattr("sys.argv", ["plot", "--results", str(results), "--page", str(path), "--readme", str(readme)])
    program.main()
    text = path.read_text()
    assert text.startswith("# Speed\n\nBefore.\n") and text.endswith("\n\nAfter.\n")
    assert "old table" not in text
    link = "[one.json](../benchmarks/results/one.json) 2024-01-02 0123abc"
    # The median step takes a second for 11,300 tokens, the slowest 1.02 s, the fastest 0.98 s.
    ours = "11,300 (11,079–11,531, 3 steps) | 60.0% | 131.2 | 128.0 | 2 | keeps dots:12,qkv, state on host"
    assert f"| 16,384 | eabf-jax | {ours} | – | {link} |" in text
    told = "default/compiled/liger/checkpointed/bfloat16"
    theirs = f"8,149 (7,334–9,168, 2 steps) | 43.3% | 60.6 | – | 2 | {told} | 1.39 ×"
    assert f"| 16,384 | strongest peer | {theirs} | {link} |" in text
    masters = told.replace("bfloat16", "autocast")
    full = f"out of memory | – | – | – | – | {masters} | –"
    assert f"| 16,384 | peer, float32 state | {full} | {link} |" in text
    assert f"| 65,536 | strongest peer | out of memory | – | – | – | – | {told} | – | [sweep.json]" in text
    assert "| 65,536 | eabf-jax | 5,000 (4,902–5,102, 3 steps) | 60.0% | 135.6, the limit |" in text
    # Every setting has a row, the fastest first.
    tried = [line for line in text.splitlines() if line.startswith("| 16,384 | default/") and "one.json" in line]
    assert [line.split(" | ")[1].split("/")[1] for line in tried] == ["compiled", "eager", "compiled"]
    assert "| llama2_7b_eabf_16k | 2 × NVIDIA H100 | 16,384 | 6 | 300 | 268 | [recipe.json]" in text
    assert "| llama2_7b_eabf_16k | 2 × NVIDIA H100 | 16,384 | 2 | +0.42% | [recipe.json]" in text
    assert text.index("| 16,384 | eabf-jax | 9,000 ") < text.index("| 65,536 | eabf-jax | 5,000 ")
    pictures = sorted(picture.name for picture in (tmp_path / "performance").iterdir())
    assert pictures == ["llama2_7b_eabf_16k_1x_nvidia_h200.png", "llama2_7b_eabf_16k_2x_nvidia_h100.png"]
    assert all(f"](performance/{name})" in text for name in pictures)
    program.main()
    assert path.read_text() == text  # the same results give the same page
    cells = "llama2_7b_eabf_16k | 1 × NVIDIA H200 | 16,384 | 11,300 | 60.0%"
    peer = "8,149 with compiled layers, Liger kernels: ours is 1.39 ×"
    assert f"| {cells} | {peer} | out of memory |" in readme.read_text()


def test_the_picture_has_every_measurement_of_the_table_and_its_line_the_fastest(
    program, results, tmp_path, monkeypatch
):
    # The newest run is slower, so the line does not go through it.
    newest = {**RUN, **RAN, "tokens_per_second": 10_731.0, "date": "2024-01-05", "peers": {}}
    (results / "newest.json").write_text(json.dumps(newest))
    [(group, reports)] = [item for item in program.grouped(program.read_results(results)).items() if item[0][2] == 1]
    curves = program.curves(reports)
    rates = {length: figures["tokens_per_second"] for length, figures in curves["ours"].items()}
    assert rates == {16_384: 11_300.4, 65_536: 5000.0} == program.fastest(reports)
    assert curves["peer"][65_536]["out_of_memory"]
    points = set()
    plot = Axes.plot

    def record(self, x, y, *arguments, **options):
        points.update(zip(x, y, strict=True))
        return plot(self, x, y, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", record)
    program.draw(group, reports, tmp_path / "picture.png")
    assert points >= {(16_384, rate) for rate in (11_300.4, 9000.0, 10_731.0)} | {(65_536, 5000.0)}


def test_a_figure_whose_code_has_changed_is_marked(program, load_program):
    report = {"file": "one.json", "date": "2024-01-02T03:04:05+00:00", "commit": "0123abc"}
    link = "[one.json](../benchmarks/results/one.json)"
    same = load_program("provenance").digest(program.ROOT / "eabf_jax/model/llama.py")
    sources = {"eabf_jax/model/llama.py": same}
    assert program.source({**report, "sources": sources}) == f"{link} 2024-01-02 0123abc"
    told = program.source({**report, "sources": {**sources, "eabf_jax/model/attention.py": "0" * 16}})
    assert told == f"{link} 2024-01-02 0123abc **stale**: attention.py changed since"
    assert "**stale**" in program.source(report)


def test_several_devices_are_held_against_one_of_their_kind(program, results):
    assert program.scaling_table(program.grouped(program.read_results(results))) == []  # one H100 has no figure
    two = {**RUN, **RAN, "devices": 2, "tokens_per_second": 21_470.76, "date": "2024-01-04", **ALONE}
    (results / "two.json").write_text(json.dumps(two))
    text = "\n".join(program.scaling_table(program.grouped(program.read_results(results))))
    # Against the faster run on one device: 21,470.76 / (2 x 11,300.4)
    assert "| llama2_7b_eabf_16k | 2 × NVIDIA H200 | 16,384 | 21,471 | 11,300 | 95.0% |" in text
    # A result without a record of its code is left out.
    (results / "two.json").write_text(json.dumps({**two, "sources": None}))
    assert program.scaling_table(program.grouped(program.read_results(results))) == []


def test_generation_is_held_against_the_strongest_peer(program):
    def timed(rate, *seconds, **more):
        return {
            "first_token_seconds": 0.4554,
            "tokens_per_second": rate,
            "spread": 0.1,
            "seconds": {"decode": seconds},
        } | more

    sizes = {"batch": 1, "prompt": 16_384}, {"batch": 16, "prompt": 2048}, {"batch": 1, "prompt": 128}
    long = timed(124.04, 2.0, 2.5, 1.6, **sizes[0], bandwidth_share=0.8081)
    full = {**sizes[1], "out_of_memory": True, "error": "RESOURCE_EXHAUSTED"}
    peer = {
        "long": {"static cache": timed(80.0, 4.0, 4.0, 5.0, bandwidth_share=0.5234), "dynamic cache": timed(40.0, 9.0)},
        "batch": {"static cache": {"out_of_memory": True, "error": "CUDA out of memory."}},
    }
    report = {"shape": "llama2_7b", "device": "NVIDIA H100", "cache": "model", "file": "new.json", "sources": {}}
    report |= {"runs": {"long": long, "batch": full}, "peer": peer, "prefill_mfu": 0.6277}
    report |= {"strongest_peer": {"long": "static cache", "batch": None}, "ratio_to_strongest_peer": {"long": 1.5505}}
    text = "\n".join(program.generation_table([{**report, "date": "2024-01-02T10:00", "commit": "abc"}, RUN]))
    row, link = "llama2_7b, NVIDIA H100 | bfloat16", "[new.json](../benchmarks/results/new.json) 2024-01-02 abc"
    ours, theirs = "124.0 (99.2–155.1, 3 runs) | 80.8%", "80.0 (64.0–80.0, 3 runs): static cache | 52.3%"
    assert f"| {row} | 1 × 16,384 | 0.455 | 62.8% | {ours} | {theirs} | 1.55 × | {link} |" in text
    peer["long"]["float8 cache"] = {"left_out": "the time was up"}
    cut = "\n".join(program.generation_table([{**report, "date": "2024-01-02T10:00", "commit": "abc"}]))
    assert "static cache (2 of 3 settings tried) | 52.3%" in cut
    assert f"| {row} | 16 × 2,048 | – | – | out of memory | – | – | – | – | {link} |" in text
    # Another run's faster peer counts, whichever of the two files comes first.
    faster = {**peer, "long": {"static cache": timed(100.0, 4.0)}}
    other = {**report, "peer": faster, "file": "other.json", "date": "2024-01-01T10:00", "commit": "abc"}
    both = [{**report, "date": "2024-01-02T10:00", "commit": "abc"}, other]
    for order in (both, both[::-1]):
        old, new = program.generation_reports(order)
        assert old["date"] < new["date"] and new["ratio_to_strongest_peer"]["long"] == pytest.approx(1.2404)
        (row,) = [line for line in program.readme_generation(order) if "16,384" in line]
        assert "100.0 with static cache (2 of 3 settings tried): ours is 1.24 ×" in row
    assert program.generation_table([RUN]) == []
    # An older file has no strongest peer, so no ratio is shown.
    old = {"first_token_seconds": 0.02, "tokens_per_second": 192.55}
    before = {"shape": "llama2_7b", "device": "NVIDIA H100", "cache": "int8", "file": "old.json"}
    before |= {
        "runs": {"short": sizes[2] | old},
        "peer": {"runs": {"short": sizes[2] | old | {"tokens_per_second": 36.0}}},
    }
    (line,) = [x for x in program.generation_table([before]) if "int8" in x]
    assert line.startswith("| llama2_7b, NVIDIA H100 | int8 | 1 × 128 | 0.020 | – | 192.6 | – | – | – | – | [old.json]")
    assert "**stale**" in line and line.endswith("; best run only |")


def test_other_benchmarks_have_tables_of_their_own(program):
    seen = {"file": "one.json", "date": "2024-01-02T10:00", "commit": "abc", "sources": {}}
    link = "[one.json](../benchmarks/results/one.json) 2024-01-02 abc"
    run = {**seen, "benchmark": "whole_run", "name": "llama2_7b", "card": "NVIDIA H100, 700 W", "host_gib": 90.44}
    run |= {"total_seconds": 500.4, "before_first_step_seconds": 80.2, "compile_seconds": 11.0, "steps_seconds": 300.0}
    run |= {"after_last_step_seconds": 60.0, "export_seconds": 60.2, "planned_host_gib": 74.12}
    cells = "500 | 80 | 11 | 300 | 60 | 60 | 90.4 (74.1)"
    assert f"| llama2_7b, NVIDIA H100 | {cells} | {link} |" in program.whole_run_table([run, RUN])
    compared = [
        {"path": path, "error": error, "limit": 0.02, "within": error <= 0.02}
        for path, error in (
            ("decode, cudnn, token 1", 0.01),
            ("decode, cudnn, token 2", 0.03),
            ("prefill, cudnn", 0.002),
        )
    ]
    numerics = {**seen, "benchmark": "gpu_numerics", "device": "NVIDIA H100", "comparisons": compared}
    lines = program.numerics_table([numerics, RUN])
    assert f"| decode, cudnn | NVIDIA H100 | 2 | 150% | 1 | {link} |" in lines
    assert f"| prefill, cudnn | NVIDIA H100 | 1 | 10% | 0 | {link} |" in lines
    for table in (program.whole_run_table, program.numerics_table):
        assert table([RUN]) == []


def test_torchtitan_is_a_peer_like_the_others(program, results):
    fast = {"tokens_per_second": 9000.0, "mfu": 0.478, "peak_gib": 61.3, "seconds": [4.0], "device": "NVIDIA H200"}
    modes = {"none": {**fast, "out_of_memory": False}, "full": {"out_of_memory": True, "error": "CUDA out of memory."}}
    report = {"benchmark": "torchtitan_step", "name": RUN["name"], "length": 16_384, "microbatches": 4, "modes": modes}
    report |= {"date": "2024-01-09", "commit": "789abcd", "sources": {}}
    (results / "titan.json").write_text(json.dumps(report))
    groups = program.grouped(program.read_results(results))
    text = program.page(groups)
    link = "[titan.json](../benchmarks/results/titan.json) 2024-01-09 789abcd"
    # By hand: 11,300.4 / 9,000.
    row = "9,000 (9,000–9,000, 1 step) | 47.8% | 61.3 | – | 4 | torchtitan/none/bfloat16 | 1.26 ×"
    assert f"| 16,384 | strongest peer | {row} | {link} |" in text
    assert "| 16,384 | torchtitan/full/bfloat16 | out of memory | – | 4 | titan.json |" in text
    [told] = [row for row in program.readme_training(groups) if "| 1 × NVIDIA H200 | 16,384 |" in row]
    assert "9,000 with torchtitan, no checkpointing: ours is 1.26 ×" in told
    # It is not compared with another length, or with two devices.
    two = {group: reports for group, reports in groups.items() if group[2] == 2}
    assert "65,536 | torchtitan" not in text and "titan" not in program.page(two)
    modes = {"none": {**fast, "tokens_per_second": 8000.0}}
    (results / "titan.json").write_text(json.dumps({**report, "modes": modes}))
    slower = program.readme_training(program.grouped(program.read_results(results)))
    assert any("8,149 with compiled layers, Liger kernels: ours is 1.39 ×" in row for row in slower)


def test_the_peers_of_every_run_on_the_device_count(program, results):
    """A slower run with other settings adds its peers to the comparison of all runs."""
    settings = {"*/kept/bfloat16": 10_000.0, "*/kept/autocast": 9000.0, "*/checkpointed/bfloat16": 12_000.0}
    peers = {name.replace("*", "cudnn/eager/liger"): PEER | {"tokens_per_second": x} for name, x in settings.items()}
    kept, masters, tried = peers
    other = RUN | RAN | {"tokens_per_second": 11_000.0, "date": "2024-01-06", "commit": "4567abc", "peers": peers}
    # The third was only tried on fewer microbatches, so its rate does not make it the strongest.
    other |= {"strongest_peer": kept, "ratio_to_strongest_peer": 1.1}
    other |= {"strongest_float32_peer": masters, "ratio_to_strongest_float32_peer": 1.2222}
    (results / "other.json").write_text(json.dumps(other))
    (results / "two.json").write_text(json.dumps({**other, "devices": 2, "device": "NVIDIA H200"}))
    reports = program.read_results(results)
    entries = {report["file"]: report for report in reports}
    keys = ("strongest_peer", "strongest_float32_peer", "ratio_to_strongest_peer", "ratio_to_strongest_float32_peer")
    # By hand: 11,300.4 / 10,000 and / 9,000.
    expected = (kept, masters, pytest.approx(1.13004), pytest.approx(1.2556))
    assert tuple(entries["one.json"][key] for key in keys) == expected
    assert tuple(entries["other.json"][key] for key in keys) == (kept, masters, pytest.approx(1.1), 11 / 9)
    assert tried not in entries["one.json"]["peers"]
    rows = [row for row in program.settings_table(reports) if "| 10,000 (" in row]
    assert len([row for row in rows if "other.json" in row]) == 1
    text = program.page(program.grouped(reports))
    assert f"{kept} | 1.13 × | [other.json](../benchmarks/results/other.json) 2024-01-06 4567abc |" in text


def test_the_readme_has_todays_code_before_faster_older_code(program, results):
    row = "| 1 × NVIDIA H200 | 16,384 |"
    old = {
        **RUN,
        **RAN,
        "tokens_per_second": 12_000.0,
        "date": "2023-01-01",
        "peers": PEERS,
        "sources": {"gone.py": "0"},
    }
    (results / "old.json").write_text(json.dumps(old))
    [told] = [line for line in program.readme_training(program.grouped(program.read_results(results))) if row in line]
    assert "| 11,300 |" in told
    for path in ("one.json", "sweep.json"):
        (results / path).unlink()
    [told] = [line for line in program.readme_training(program.grouped(program.read_results(results))) if row in line]
    assert "| 12,000 † |" in told
    (results / "old.json").write_text(json.dumps({**old, "sources": None}))
    assert not [line for line in program.readme_training(program.grouped(program.read_results(results))) if row in line]


@pytest.mark.filterwarnings("error")  # matplotlib warns if its layout fails
def test_picture_shows_both_stacks(program, results, tmp_path):
    [(group, reports)] = [item for item in program.grouped(program.read_results(results)).items() if item[0][2] == 1]
    program.draw(group, reports, tmp_path / "picture.svg")
    text = "".join(ElementTree.parse(tmp_path / "picture.svg").getroot().itertext())
    comments = (tmp_path / "picture.svg").read_text()
    for word in ("eabf-jax", "strongest peer", "16k", "64k", "1 × NVIDIA H200"):
        assert word in text + comments
    assert not list(tmp_path.glob(".picture*"))


def test_no_results_is_one_line(program, tmp_path):
    with pytest.raises(InputError, match="holds no result"):
        program.read_results(tmp_path)


@pytest.mark.document_check
def test_the_committed_pages_are_those_of_the_results_and_of_todays_code(program):
    """A change to measured code makes its figures stale, and the pages must say so."""
    for part, text in program.parts(program.ROOT / "benchmarks/results").items():
        written = (program.ROOT / ("docs/performance.md" if part == "performance" else "README.md")).read_text()
        found = written.partition(program.BEGIN.format(part))[2].partition(END)[0]
        assert found.strip() == text.strip(), "run python benchmarks/plot_performance.py"
