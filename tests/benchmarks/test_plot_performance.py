import json
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes

from eabf_jax.errors import InputError

RAN = {
    "out_of_memory": False,
    "length": 16_384,
    "tokens_per_second": 11_300.4,
    "mfu": 0.6004,
    "peak_gib": 131.25,
    "planned_gib": 128.04,
    "compute": {"remat": "dots:12,qkv", "optimizer_memory": "host"},
    "microbatches": 2,
    "compile_seconds": 31.5,
    "ratio_to_eager_peer": 1.638,
    "ratio_to_compiled_peer": 1.387,
}
PEER = {
    "out_of_memory": False,
    "tokens_per_second": 8149.0,
    "mfu": 0.433,
    "peak_gib": 60.6,
    "precision": "bfloat16",
    "microbatches": 2,
    "first_step_seconds": 13.3,
}
FULL = {"out_of_memory": True, "error": "CUDA out of memory."}
RUN = {"benchmark": "train_step", "name": "llama2_7b_eabf_16k", "device": "NVIDIA H200", "devices": 1}


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

    write("one.json", {**RUN, **RAN, "date": "2024-01-02", "peers": {"compiled": PEER}})
    far = {**RAN, "length": 65_536, "tokens_per_second": 5000.0, "ratio_to_compiled_peer": None}
    sweep = [{**RAN, "tokens_per_second": 9000.0, "peers": {"compiled": PEER}}, {**far, "peers": {"compiled": FULL}}]
    write("sweep.json", {**RUN, **sweep[0], "date": "2024-01-01", "lengths": sweep})
    whole = {"steps": 6, "total_seconds": 299.6, "total_seconds_without_compile": 268.1}
    cost = {"seconds_with": [1.0, 1.0], "seconds_without": [1.0, 1.0], "ratio": 0.0042}
    other = {**RUN, **RAN, "device": "NVIDIA H100", "devices": 2, "date": "2024-01-03", "peers": {}}
    write("recipe.json", {**other, "recipe": whole, "multiplier_cost": cost})
    write("tiny_recipe.json", {"device": "NVIDIA H100", "runs": []})
    return folder


def test_page_and_pictures_are_written_from_results(program, results, tmp_path, monkeypatch):
    path = tmp_path / "performance.md"
    path.write_text(f"# Speed\n\nBefore.\n\n{program.BEGIN}\n\nold table\n\n{program.END}\n\nAfter.\n")
    monkeypatch.setattr("sys.argv", ["plot", "--results", str(results), "--page", str(path)])
    program.main()
    text = path.read_text()
    assert text.startswith("# Speed\n\nBefore.\n") and text.endswith("\n\nAfter.\n")
    assert "old table" not in text
    link = "[one.json](../benchmarks/results/one.json)"
    ours = "11,300 | 60.0% | 131.2 | 128.0 | 2 | 31.5 | keeps dots:12,qkv, state on host"
    assert f"| 16,384 | eabf-jax | {ours} | – | {link} |" in text
    assert (
        f"| 16,384 | transformers, compiled | 8,149 | 43.3% | 60.6 | – | 2 | 13.3 | bfloat16 | 1.39 × | {link} |"
        in text
    )
    assert "| 65,536 | transformers, compiled | out of memory | – | – | – | – | – | – | – | [sweep.json]" in text
    assert "| llama2_7b_eabf_16k | 2 × NVIDIA H100 | 16,384 | 6 | 300 | 268 | recipe.json |" in text
    assert "| llama2_7b_eabf_16k | 2 × NVIDIA H100 | 16,384 | 2 | +0.42% | recipe.json |" in text
    assert text.index("| 16,384 | eabf-jax | 9,000 |") < text.index("| 65,536 | eabf-jax | 5,000 |")
    pictures = sorted(picture.name for picture in (tmp_path / "performance").iterdir())
    assert pictures == ["llama2_7b_eabf_16k_1x_nvidia_h200.png", "llama2_7b_eabf_16k_2x_nvidia_h100.png"]
    assert all(f"](performance/{name})" in text for name in pictures)
    program.main()
    assert path.read_text() == text  # from the same results the same page


def test_the_picture_has_every_measurement_of_the_table_and_its_line_the_fastest(
    program, results, tmp_path, monkeypatch
):
    # Measured last, and slower: the line does not fall back to it.
    newest = {**RUN, **RAN, "tokens_per_second": 10_731.0, "date": "2024-01-05", "peers": {}}
    (results / "newest.json").write_text(json.dumps(newest))
    [(group, reports)] = [item for item in program.grouped(program.read_results(results)).items() if item[0][2] == 1]
    curves = program.curves(reports)
    rates = {length: figures["tokens_per_second"] for length, figures in curves["ours"].items()}
    assert rates == {16_384: 11_300.4, 65_536: 5000.0} == program.fastest(reports)
    assert curves["compiled"][65_536]["out_of_memory"]
    points = set()
    plot = Axes.plot

    def record(self, x, y, *arguments, **options):
        points.update(zip(x, y, strict=True))
        return plot(self, x, y, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", record)
    program.draw(group, reports, tmp_path / "picture.png")
    assert points >= {(16_384, rate) for rate in (11_300.4, 9000.0, 10_731.0, 8149.0)} | {(65_536, 5000.0)}


def test_several_devices_are_held_against_one_of_their_kind(program, results):
    assert program.scaling_table(program.grouped(program.read_results(results))) == []  # the two are of another kind
    two = {**RUN, **RAN, "devices": 2, "tokens_per_second": 21_470.76, "date": "2024-01-04", "peers": {}}
    (results / "two.json").write_text(json.dumps(two))
    text = "\n".join(program.scaling_table(program.grouped(program.read_results(results))))
    # Of the faster of the runs alone: 21,470.76 / (2 x 11,300.4)
    assert "| llama2_7b_eabf_16k | 2 × NVIDIA H200 | 16,384 | 21,471 | 11,300 | 95.0% |" in text


def test_generation_is_held_against_the_peer_of_its_run(program):
    run = {"batch": 1, "prompt": 16_384, "first_token_seconds": 0.4554, "tokens_per_second": 124.04}
    batch = {**run, "batch": 16, "prompt": 2048, "tokens_per_second": 1381.2}
    report = {"shape": "llama2_7b", "device": "NVIDIA H100", "cache": "model", "file": "generate.json"}
    runs = {"long": run, "batch": batch}
    peer = {"runs": {"long": {**run, "tokens_per_second": 40.0}, "batch": None}}  # out of memory
    text = "\n".join(program.generation_table([{**report, "prefill_mfu": 0.6277, "runs": runs, "peer": peer}, RUN]))
    link = "[generate.json](../benchmarks/results/generate.json)"
    row = "llama2_7b, NVIDIA H100 | bfloat16"
    assert f"| {row} | 1 × 16,384 | 0.455 | 62.8% | 124.0 | 40.0 | 3.10 × | {link} |" in text
    assert f"| {row} | 16 × 2,048 | 0.455 | – | 1,381.2 | – | – | {link} |" in text
    assert program.generation_table([RUN]) == []


@pytest.mark.filterwarnings("error")  # matplotlib warns of a layout that it gave up
def test_picture_shows_both_stacks(program, results, tmp_path):
    [(group, reports)] = [item for item in program.grouped(program.read_results(results)).items() if item[0][2] == 1]
    program.draw(group, reports, tmp_path / "picture.svg")
    text = "".join(ElementTree.parse(tmp_path / "picture.svg").getroot().itertext())
    comments = (tmp_path / "picture.svg").read_text()
    for word in ("eabf-jax", "transformers, compiled", "16k", "64k", "1 × NVIDIA H200"):
        assert word in text + comments
    assert not list(tmp_path.glob(".picture*"))


def test_a_page_without_markers_is_left_alone(program, tmp_path):
    path = tmp_path / "performance.md"
    path.write_text("# Speed\n")
    with pytest.raises(InputError, match="no part between"):
        program.write_page(path, "tables")
    assert path.read_text() == "# Speed\n"


def test_no_results_is_one_line(program, tmp_path):
    with pytest.raises(InputError, match="holds no result"):
        program.read_results(tmp_path)


def test_the_committed_page_has_its_markers(program, tmp_path):
    path = tmp_path / "performance.md"
    path.write_text((program.ROOT / "docs/performance.md").read_text())
    program.write_page(path, "tables\n")
    assert "tables" in path.read_text()
