import dataclasses
import json
import re
import shlex

import pytest

from eabf_jax.hardware import DEVICES, GIB
from eabf_jax.model.config import LlamaConfig
from eabf_jax.parallel.mesh import axis_sizes
from eabf_jax.parallel.topology import tpu_slice
from eabf_jax.training.plan import plan
from eabf_jax.training.recipe import load_config


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("tpu_table")


@pytest.fixture(scope="module")
def results(program):
    return json.loads(program.RESULTS.read_text())


def figures(results, model, window, name):
    (row,) = (row for row in results["rows"] if (row["model"], row["window"]) == (model, window))
    return results["cells"][row["compiled_gib"][name]["command"]]


def test_every_model_and_window_has_its_smallest_slice(program, results):
    assert {(row["model"], row["window"]) for row in results["rows"]} == {
        (model, window) for model in program.MODELS for window in program.WINDOWS
    }
    names = [slice_.name for slice_ in program.V4]
    for row in results["rows"]:
        found = figures(results, row["model"], row["window"], row["smallest"])
        assert found["hbm_gib_per_chip"] <= 30.75
        number = names.index(row["smallest"])
        if number:  # the compiler refused the next smaller one
            assert "needs more memory" in figures(results, row["model"], row["window"], names[number - 1])["error"]


@pytest.mark.parametrize(
    ("model", "window", "name", "limit"),
    [
        ("7B", 16_384, "v4-8", 32),
        ("7B", 16_384, "v4-16", 22),
        ("7B", 16_384, "v4-32", 15),
        ("7B", 131_072, "v4-32", 32),
        ("70B", 16_384, "v4-128", 32),
        ("7B, LoRA", 16_384, "v4-8", 14),
    ],
)
def test_what_was_asked_for_fits(results, model, window, name, limit):
    assert figures(results, model, window, name)["hbm_gib_per_chip"] <= limit


def test_the_planner_is_within_a_tenth_of_the_compiler(results):
    """The prediction is within a tenth of what the compiler used, or says that it would need."""
    for line, cell in results["cells"].items():
        _, _, _, name, *settings = shlex.split(line)
        config = load_config(settings)
        mesh = axis_sizes(config.mesh, tpu_slice(name).chips)
        model = dataclasses.replace(LlamaConfig.from_fields(config.model.shape), rope=config.scheme)
        needed = cell.get("hbm_gib_per_chip") or float(re.search(r"([\d.]+) GiB of 30.75", cell["error"])[1])
        assert plan(config, model, mesh, DEVICES["v4"]).total / GIB == pytest.approx(needed, rel=0.1), line


@pytest.mark.document_check
def test_the_page_shows_the_results(program, results):
    assert program.tables(results) in program.PAGE.read_text()


def test_meshes_are_tried_the_simplest_first_and_then_the_one_that_needs_least(program):
    first, least = program.preferred("7B", 16_384, 16)
    assert dict(first.mesh) == {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}
    assert least.total < first.total
    # Four chips hold 16 bytes per parameter and little else. Rows split over two just fit; over all, they need least.
    first, least = program.preferred("7B", 16_384, 4)
    assert dict(first.mesh) == {"data": 1, "fsdp": 2, "context": 2, "tensor": 1}
    assert dict(least.mesh) == {"data": 1, "fsdp": 1, "context": 4, "tensor": 1}
    # If nothing fits, the mesh that needs least is tried, and must be refused.
    (only,) = program.preferred("7B", 65_536, 4)
    assert not only.fits


def test_what_is_known_is_not_compiled_again(program, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    line = program.command("7B", 16_384, "v4-32", {"data": 1, "fsdp": 16, "context": 1, "tensor": 1})
    path.write_text(json.dumps({"cells": {" ".join(line): {"hbm_gib_per_chip": 1.0}}}))
    monkeypatch.setattr(program.subprocess, "run", lambda *_, **__: pytest.fail("compiled"))
    assert program.Cells(path).compile(line) == {"hbm_gib_per_chip": 1.0}
    assert program.Cells(path, ["70b", "v4-32"]).cells == {}
    assert len(program.Cells(path, ["70b"]).cells) == 1


def test_a_refusal_is_kept_as_the_command_tells_it(program, tmp_path):
    refused = program.Cells(tmp_path / "table.json").compile(["eabf", "compile", "--topology", "v4-8"])
    assert refused["error"].startswith("the following arguments are required: --config_path")


def test_every_cell_says_when_and_of_which_commit_it_is(results):
    for line, cell in results["cells"].items():
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", cell["date"]), line
        assert re.fullmatch(r"[0-9a-f]{7}", cell["commit"]), line
