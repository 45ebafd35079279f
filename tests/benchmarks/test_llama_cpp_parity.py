"""The committed comparison with llama.cpp: its figures are within the limits, and could have failed."""

import copy
import json
from typing import Any

import llama_cpp_parity as program
import pytest
from provenance import ROOT

from eabf_jax.interop.architectures import ARCHITECTURES, OWN_TYPE
from eabf_jax.interop.gguf_architectures import GGUF_ARCHITECTURES

RESULT = ROOT / "benchmarks/results/llama_cpp_parity_cpu.json"


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8"))


@pytest.mark.document_check
def test_both_compute_the_same_inside_and_beyond_the_window(figures: dict[str, Any]) -> None:
    assert {model["model"] for model in figures["models"]} == {"tiny", "smollm2-135m"}
    assert figures["equal"] and figures["limit"] == program.LIMIT
    page = (ROOT / "docs/gguf.md").read_text(encoding="utf-8")
    largest = max(max(row["difference"]) for model in figures["models"] for row in model["schemes"].values())
    assert largest <= 0.00006 and "differ by at most 0.00006" in page
    for model in figures["models"]:
        assert program.agrees(model) and model["lines"] > 0
        assert model["schemes"].keys() == program.schemes(512, 10_000.0, 2.0).keys()
        beyond = [position >= model["window"] for position in model["positions"]]
        assert 0 < sum(beyond) < len(beyond)
        for name, row in model["schemes"].items():
            assert len(row["difference"]) == len(beyond)
            if name != "default":  # a scheme that llama.cpp ignored would show
                assert max(row["difference_to_default"]) > 10 * program.LIMIT


@pytest.mark.document_check
def test_every_architecture_computes_the_same(figures: dict[str, Any]) -> None:
    others = figures["family"]
    assert program.agrees(others) and others["models"].keys() == program.family(128, 128).keys()
    assert {row["model_type"] for row in others["models"].values()} == ARCHITECTURES.keys() - {OWN_TYPE}
    assert {row["architecture"] for row in others["models"].values()} == GGUF_ARCHITECTURES.keys()
    page = (ROOT / "docs/gguf.md").read_text(encoding="utf-8")
    largest = max(max(row["difference"]) for row in others["models"].values())
    assert largest <= 0.0001 and "those of the random models by at most 0.0001" in page


@pytest.mark.document_check
def test_each_figure_can_fail_the_comparison(figures: dict[str, Any]) -> None:
    model = figures["models"][0]
    for spoil in (
        lambda found: found["schemes"]["pi"]["difference"].append(0.02),
        lambda found: found["schemes"]["abf"]["same_tokens"].append(model["new_tokens"] - 1),
        lambda found: found.update(same_lines=found["lines"] - 1),
    ):
        spoilt = copy.deepcopy(model)
        spoil(spoilt)
        assert not program.agrees(spoilt)
