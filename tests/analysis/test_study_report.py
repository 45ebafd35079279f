"""Tables, tests and verdicts of made-up cells, against Student's t by hand; the page has all of it."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats
from studies import WINDOW, study_values, write_inputs, write_study

from eabf_jax.analysis.measures import QUANTITIES
from eabf_jax.analysis.study import Side, Study, configurations, load_study, measured_cells, tuning_cells
from eabf_jax.analysis.study_report import (
    as_json,
    claims_table,
    estimate,
    improvement,
    main_window,
    paper_tables,
    read_results,
    tables,
    tuning_table,
    verdicts,
    write_report,
)
from eabf_jax.errors import InputError
from eabf_jax.evaluation import longbench
from eabf_jax.training.recipe import dump_config

DOCUMENTS = 8
LEVELS = {"PI": 3.0, "YaRN": 2.0, "EABF": 1.9}
ORIGIN = {"command": "c", "date": "2026-01-01T00:00:00+00:00", "device": "cpu", "devices": 2, "commit": "abc"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def build(inputs: Path, tmp_path: Path) -> Callable[..., Study]:
    def load(**changes: Any) -> Study:
        data = {
            "0": [],
            "8": [{"directory": "a", "samples": 8}],
            "all": [{"directory": "a"}],
            "all, more": [{"directory": "a"}, {"directory": "b"}],
        }
        settings = {"methods": {name: {} for name in LEVELS}, "data": data, "seeds": [0, 1, 2], **changes}
        settings.setdefault("only", {"all, more": ["EABF"]} if "data" not in changes else {})
        return load_study(str(write_study(tmp_path / "s.yaml", study_values(inputs, tmp_path / "out", **settings))))

    return load


def loss(method: str, data: str, seed: int | None, quantity: str, window: int) -> np.ndarray:
    """Draws a value for each document: that of the document, shared by all methods, and a little for each cell."""
    shared = np.random.default_rng(window).normal(0, 0.5, DOCUMENTS)
    own = np.random.default_rng([window, len(data), *method.encode(), 0 if seed is None else seed])
    found = LEVELS[method] + shared + own.normal(0, 0.02, DOCUMENTS) + (0.2 if data == "0" else 0.0)
    return (found < 1.9).astype(float) if QUANTITIES[quantity].bounds else found


def fill(
    study: Study, values: Callable[..., np.ndarray] = loss, skip: Callable[[Any], bool] = lambda cell: False
) -> None:
    """Writes a file for every cell."""
    for cell in measured_cells(study):
        if skip(cell):
            continue
        seed = cell.seed if study.data[cell.data] else None
        columns = [
            {**c._asdict(), "values": list(loss(cell.method, cell.data, seed, c.quantity, c.window))}
            for c in study.columns
        ]
        settings = {"documents": "d", "windows": list(study.evaluate.windows), "measures": {}}
        config = [yaml.safe_load(dump_config(config)) for config in configurations(study, cell, {})]
        record = {"method": cell.method, "data": cell.data, "seed": seed, "settings": settings, "values": columns}
        record |= {"tuned": {}, "config": config}
        units = {c.quantity: [f"t{n}" for n in range(DOCUMENTS)] for c in study.columns}
        write(study, cell.name, {**record, "units": units, **ORIGIN, "versions": {"jax": "1"}})


def write(study: Study, name: str, record: Mapping[str, Any]) -> None:
    path = study.directory / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def test_an_estimate_is_over_documents_and_seeds(build: Callable[..., Study]) -> None:
    study = build()
    fill(study)
    column = study.column_of("loss", WINDOW)
    found = estimate(read_results(study), Side("EABF", "all", column))
    assert found is not None
    values = np.stack([loss("EABF", "all", seed, "loss", WINDOW) for seed in range(3)])
    assert found.mean == pytest.approx(values.mean())
    by_document, by_seed = values.mean(0), values.mean(1)
    parts = (
        (stats.t.ppf(0.975, 7), by_document.var(ddof=1) / 8),
        (stats.t.ppf(0.975, 2), by_seed.var(ddof=1) / 3),
    )
    assert found.half_width == pytest.approx(math.sqrt(sum(t**2 * variance for t, variance in parts)))


def test_an_improvement_is_paired_by_document_and_seed(build: Callable[..., Study]) -> None:
    study = build()
    fill(study)
    results, column = read_results(study), study.column_of("loss", WINDOW)
    better, worse = Side("EABF", "all", column), Side("YaRN", "all", column)
    found = improvement(results, better, worse)
    assert found is not None and (found.seeds, found.units) == (3, DOCUMENTS)
    pairs = [[loss(m, "all", seed, "loss", WINDOW) for m in ("YaRN", "EABF")] for seed in range(3)]
    differences = np.array([yarn - eabf for yarn, eabf in pairs])
    assert found.mean == pytest.approx(differences.mean())
    # The documents' own 0.5 has gone from the differences.
    assert found.half_width < 0.1 < 0.3 < estimate(results, better).half_width  # type: ignore[union-attr]
    opposite = improvement(results, worse, better)
    assert opposite is not None and opposite.mean == pytest.approx(-found.mean)


def test_an_untrained_model_is_compared_with_every_seed(build: Callable[..., Study]) -> None:
    study = build()
    fill(study)
    results, column = read_results(study), study.column_of("loss", WINDOW)
    trained, untrained = Side("EABF", "all", column), Side("EABF", "0", column)
    found, back = improvement(results, trained, untrained), improvement(results, untrained, trained)
    assert found is not None and back is not None and found.seeds == back.seeds == 3
    alone = loss("EABF", "0", None, "loss", WINDOW)
    expected = np.mean([alone - loss("EABF", "all", seed, "loss", WINDOW) for seed in range(3)])
    assert found.mean == pytest.approx(expected) and back.mean == pytest.approx(-expected)
    both = improvement(results, untrained, Side("PI", "0", column))
    assert both is not None and both.seeds == 1
    assert improvement(results, trained, Side("PI", "all, more", column)) is None


def test_only_seeds_that_both_sides_have_are_compared(build: Callable[..., Study]) -> None:
    study = build()
    fill(study, skip=lambda cell: (cell.method, cell.seed) in (("EABF", 0), ("PI", 2)))
    column = study.column_of("loss", WINDOW)
    found = improvement(read_results(study), Side("EABF", "all", column), Side("PI", "all", column))
    assert found is not None and found.seeds == 1
    shown = {row[0][0]: row[1][0] for row in tables(read_results(study))["methods"][0].rows}
    assert [name for name, text in shown.items() if text.endswith(" (2 of 3 seeds)")] == ["PI", "EABF"]
    expected = loss("PI", "all", 1, "loss", WINDOW) - loss("EABF", "all", 1, "loss", WINDOW)
    assert found.mean == pytest.approx(expected.mean())


def test_a_share_is_better_if_it_is_higher(build: Callable[..., Study]) -> None:
    claim = {"text": "c", "better": "EABF", "worse": "PI", "measure": "passkey", "margin": 0.25}
    study = build(evaluate={**_evaluate(), "measures": {"passkey": {}}}, claims=[claim])
    fill(study)
    results, column = read_results(study), study.column_of("passkey", WINDOW)
    found = improvement(results, Side("EABF", "all", column), Side("PI", "all", column))
    assert found is not None and found.mean > 0
    shown = tables(results)["methods"][0]
    assert shown.figures == ["passkey", "passkey loss"]
    best = {row[0][0]: row[1][0].startswith("[bold]") for row in shown.rows}
    assert best["EABF"] and not best["PI"]
    share = np.mean([loss("EABF", "all", seed, "passkey", WINDOW) for seed in range(3)])
    assert shown.rows[2][1][0].startswith(f"[bold]{100 * share:.1f}[/bold] ± ")
    [(_, told)] = claims_table(verdicts(results)).rows
    assert told[1].startswith(f"{100 * found.mean:+.1f} ± ") and told[2] == "25"


def _evaluate() -> dict[str, Any]:
    return {"documents": {"directory": "t"}, "windows": [16, WINDOW, 64], "measures": {"loss": {}}}


def test_the_tables_have_the_papers_form(build: Callable[..., Study]) -> None:
    study = build()
    fill(study)
    assert main_window(study) == WINDOW
    found = tables(read_results(study))
    [methods] = found["methods"]
    assert methods.figures == ["loss 0–32", "loss 0–16", "loss 16–32"] and [r[0] for r in methods.rows] == [
        ["PI"], ["YaRN"], ["EABF"],
    ]  # fmt: skip
    assert [table.figures for table in found["data efficiency"]] == [["0", "8", "all"]] * 2
    assert "window 32" in found["data efficiency"][0].title and "window 64" in found["data efficiency"][1].title
    [robustness] = found["robustness"]
    assert robustness.figures == ["16 (0–16)", "32 (16–32)", "64 (32–64)"]
    [curricula] = found["curricula"]
    assert [row[0] for row in curricula.rows] == [["EABF", label] for label in ("0", "8", "all", "all, more")]
    [tests] = found["tests"]
    assert [row[0] for row in tests.rows] == [["PI"], ["YaRN"]] and "Holm's for 6 tests" in tests.title
    plain = [
        improvement(read_results(study), Side("EABF", "all", column), Side(method, "all", column))
        for method in ("PI", "YaRN")
        for column in (study.column_of("loss", window) for window in study.evaluate.windows)
    ]
    probabilities = [found.p for found in plain if found is not None]
    own, ranked = probabilities[4], sorted(probabilities)
    corrected = max((6 - rank) * p for rank, p in enumerate(ranked[: ranked.index(own) + 1]))
    assert tests.rows[1][1][1].endswith(f"p {corrected:.3f}[/bold]") and 0.001 < corrected < 0.05


def test_a_method_without_the_main_data_is_shown_with_what_it_has(build: Callable[..., Study]) -> None:
    study = build(only={"8": ["YaRN", "EABF"], "all": ["YaRN", "EABF"], "all, more": ["EABF"]})
    fill(study)
    found = tables(read_results(study))
    for table in (found["methods"][0], found["robustness"][0]):
        assert [row[0] for row in table.rows] == [["PI (data 0)"], ["YaRN"], ["EABF"]]
    assert [row[0] for row in found["tests"][0].rows] == [["PI (data 0)"], ["YaRN"]]
    assert [row[1][1:] for row in found["data efficiency"][0].rows if row[0] == ["PI"]] == [["", ""]]


CLAIMS = [
    {"text": "EABF beats PI", "better": "EABF", "worse": "PI", "measure": "loss"},
    {"text": "PI beats EABF", "better": "PI", "worse": "EABF", "measure": "loss"},
    {"text": "EABF beats YaRN by 0.1", "better": "EABF", "worse": "YaRN", "measure": "loss", "margin": 0.1},
    {"text": "8 do", "better": {"method": "EABF", "data": "8"}, "worse": "EABF", "measure": "loss", "margin": -0.1},
    {"text": "unknown yet", "better": "YaRN", "worse": "PI", "measure": "loss"},
]


def test_claims_hold_do_not_hold_or_are_undecided(build: Callable[..., Study]) -> None:
    study = build(claims=CLAIMS)
    fill(study)
    judged = {verdict.claim.text: verdict for verdict in verdicts(read_results(study))}
    assert judged["EABF beats PI"].verdict == "holds"
    assert judged["PI beats EABF"].verdict == "does not hold"
    assert judged["8 do"].verdict == "holds"
    close = judged["EABF beats YaRN by 0.1"]
    assert close.verdict == "undecided" and close.found is not None and close.p > 0.05
    assert "documents" in close.decide
    found = judged["EABF beats PI"].found
    assert found is not None and found.mean == pytest.approx(1.1, abs=0.05)
    # All five have p-values; the least is multiplied by five.
    assert judged["EABF beats PI"].p <= 5 * found.p * 1.0001
    table = claims_table(list(judged.values()))
    assert table.rows[0][1][0] == "[bold]holds[/bold]" and table.rows[2][1][2] == "0.1"


def test_a_claim_has_no_verdict_before_all_its_cells_are_finished(build: Callable[..., Study]) -> None:
    study = build(claims=CLAIMS[:1] + CLAIMS[-1:])
    for skip, found in ((lambda cell: cell.method in ("YaRN", "EABF"), 0), (lambda cell: cell.seed == 2, 2)):
        fill(study, skip=skip)
        for verdict in verdicts(read_results(study)):
            assert (verdict.verdict, math.isnan(verdict.p)) == ("not finished", True)
            assert (verdict.found.seeds if verdict.found else 0) == found
            assert verdict.decide.startswith("all cells of ")
        for path in (study.directory / "cells").iterdir():
            path.unlink()
    # A claim that waits counts in the correction of the others.
    fill(study, skip=lambda cell: cell.method == "YaRN")
    first, waiting = verdicts(read_results(study))
    assert first.verdict == "holds" and first.found is not None and waiting.verdict == "not finished"
    assert first.p == pytest.approx(2 * first.found.p)


def test_cells_of_another_configuration_are_refused(build: Callable[..., Study]) -> None:
    fill(build())
    other = build(methods={**{name: {} for name in LEVELS}, "YaRN": {"rope.base": 77}})
    with pytest.raises(InputError, match=r"^YaRN, .* was made with rope.base 20000.0, which is now 77.0: .*--replace"):
        read_results(other)


def test_the_papers_figures_stand_apart_with_their_source() -> None:
    by_window, by_samples, curricula = paper_tables()
    assert "paper, LLaMA-2-7B-Chat, LongBench macro average" in by_window.title
    assert {row[0][0]: row[1] for row in by_window.rows}["EABF"] == ["36.3", "38.1", "39.1", "39.1"]
    assert by_samples.figures == ["32", "100", "1,000", "3,500"]
    assert [row[0][0] for row in by_samples.rows] == list(longbench.PAPER_BY_SAMPLES)
    assert curricula.rows[0][1] == ["30.84", "0.0", "76.0", "0.0"]


@pytest.fixture
def tuned(build: Callable[..., Study]) -> Study:
    values = {"recipe.learning_rate": [1e-4, 2e-4, 4e-4], "rope.base": {"methods": ["EABF"], "values": [1e4, 2e4]}}
    tune = {"values": values, "data": "all", "documents": {"directory": "h"}}
    study = build(tune=tune, claims=CLAIMS)
    fill(study)
    for cell in tuning_cells(study):
        tried = dict(cell.tried or ())
        if cell.method == "YaRN" and tried["recipe.learning_rate"] == 4e-4:
            continue
        level = abs(math.log(tried["recipe.learning_rate"] / (1e-4 if cell.method == "PI" else 2e-4)))
        record: dict[str, Any] = {"tuned": tried, "values": [{"values": [level + 1, level + 3]}]}
        if cell.method == "PI" and tried["recipe.learning_rate"] == 4e-4:
            record = {"tuned": tried, "values": [], "diverged": "not finite"}
        write(study, cell.name, record)
    return study


def test_what_tuning_chose_is_told_and_whether_it_is_at_the_edge(tuned: Study) -> None:
    table = tuning_table(read_results(tuned))
    assert table is not None and table.figures == ["recipe.learning_rate", "rope.base", "loss, nats per token"]
    assert [(row[0], row[1]) for row in table.rows] == [
        (["PI"], ["0.0001 (at the edge of those tried)", "", "2.0000 (1 of 3 runs diverged)"]),
        (["YaRN"], ["", "", "2 of 3 runs are finished"]),
        (["EABF"], ["0.0002", "10000 (at the edge of those tried)", "2.0000"]),
    ]


def test_the_page_has_tables_pictures_claims_settings_and_failures(tuned: Study) -> None:
    finished, cell = measured_cells(tuned)[-2:]
    (tuned.directory / f"{cell.name}.json").unlink()
    # A kill can leave this beside the result that came later.
    write(tuned, f"{finished.name}.failed", {"method": "m", "data": "d", "reason": "earlier"})
    write(tuned, f"{cell.name}.failed", {"method": cell.method, "data": cell.data, "reason": "out of memory"})
    results = read_results(tuned)
    path = write_report(results)
    page = path.read_text()
    for part in (
        "# Study out", "| EABF beats PI | **holds** |", "## Data efficiency", "## Robustness", "## Curricula",
        "paper, LLaMA-2-7B-Chat, LongBench macro average", "![loss by window", "(loss_by_data.png)",
        f"- {cell.label}: out of memory", "0.0001 (at the edge of those tried)", "2 x cpu, commit abc", "jax 1",
    ):  # fmt: skip
        assert part in page, part
    for name in ("loss_by_window.png", "loss_by_data.png"):
        assert (path.parent / name).read_bytes().startswith(b"\x89PNG")
    found = json.loads(json.dumps(as_json(results)))
    assert found["claims"][0]["verdict"] == "holds" and found["claims"][0]["better_by"]["half_width"] > 0
    assert found["failed"] == {cell.label: "out of memory"} and found["cells"] == len(measured_cells(tuned))
    assert found["tables"]["methods"][0]["rows"][2][0] == "EABF"


def test_a_study_without_finished_cells_has_no_tables(build: Callable[..., Study]) -> None:
    results = read_results(build(claims=CLAIMS))
    assert not any(tables(results).values()) and {v.verdict for v in verdicts(results)} == {"not finished"}


def test_cells_of_different_documents_are_not_mixed(build: Callable[..., Study]) -> None:
    study = build()
    fill(study)
    path = study.directory / f"{measured_cells(study)[-1].name}.json"
    record = json.loads(path.read_text())
    record["settings"]["documents"] = "others"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"differ in documents: .* has d, .* has others; start the study"):
        read_results(study)


def test_a_measure_added_to_the_file_needs_its_cells_again(build: Callable[..., Study]) -> None:
    fill(build())
    study = build(evaluate={**_evaluate(), "measures": {"loss": {}, "passkey": {}}})
    with pytest.raises(InputError, match="was not measured for passkey at window 16; start the study with --replace"):
        read_results(study)
