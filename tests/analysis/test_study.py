"""The file of a study: which cells it has, each cell's configuration, and refusals in one line."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from studies import BEYOND, WINDOW, study_values, write_inputs, write_study

from eabf_jax.analysis.measures import MEASURES
from eabf_jax.analysis.study import (
    Cell,
    Documents,
    Study,
    configurations,
    grid,
    load_study,
    measured_cells,
    sides,
    tuning_cells,
)
from eabf_jax.errors import InputError

Build = Callable[..., Study]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def build(inputs: Path, tmp_path: Path) -> Build:
    def load(**changes: Any) -> Study:
        return load_study(str(write_study(tmp_path / "s.yaml", study_values(inputs, tmp_path / "out", **changes))))

    return load


@pytest.fixture
def tune(inputs: Path) -> dict[str, Any]:
    documents = {"directory": str(inputs / "train"), "count": 2}
    values = {"recipe.learning_rate": ["1e-4", 0.01], "rope.base": {"methods": ["EABF"], "values": [3e4, 4e4]}}
    return {"values": values, "data": "8", "documents": documents}


def test_every_method_has_every_amount_and_seed_but_only_one_untrained_cell(build: Build) -> None:
    found = [(cell.method, cell.data, cell.seed) for cell in measured_cells(build(seeds=[3, 5]))]
    untrained = [("PI", "0", 3), ("EABF", "0", 3)]
    assert found == [*untrained, ("PI", "8", 3), ("EABF", "8", 3), ("PI", "8", 5), ("EABF", "8", 5)]


def test_only_leaves_out_other_methods_for_one_data(build: Build) -> None:
    found = [(cell.method, cell.data) for cell in measured_cells(build(only={"8": ["EABF"]}))]
    assert found == [("PI", "0"), ("EABF", "0"), ("EABF", "8")]


def test_a_cells_configuration_is_the_file_then_settings_method_tuned_and_stage(build: Build, inputs: Path) -> None:
    rope = {"type": "yarn", "base": 10_000, "factor": 2, "pretrained_window": 16}
    study = build(
        settings={"recipe.epochs": 3, "recipe.learning_rate": "3e-3", "recipe.warmup_steps": 1},
        methods={"YaRN": {"rope": rope, "recipe.epochs": 4}},
        data={"two": [{"directory": str(inputs / "train")}, {"directory": "x", "split": "y", "recipe.epochs": 5}]},
    )
    first, second = configurations(study, Cell("YaRN", "two", 9), {"recipe.learning_rate": 0.5, "rope.factor": 4})
    assert first.scheme.to_dict() == {**rope, "factor": 4.0, "base": 10_000.0, "beta_fast": 32.0, "beta_slow": 1.0}
    assert (first.recipe.epochs, second.recipe.epochs, first.recipe.warmup_steps) == (4, 5, 1)
    assert first.recipe.learning_rate == second.recipe.learning_rate == 0.5
    assert (first.recipe.seed, first.recipe.batch_size) == (9, 8)
    assert (first.data.directory, second.data.directory, second.data.split) == (str(inputs / "train"), "x", "y")
    assert first.output != second.output
    assert study.methods["YaRN"]["rope"] == rope  # the study's own mapping is not changed


def test_tuning_tries_every_combination_and_the_same_for_every_method(build: Build, tune: dict[str, Any]) -> None:
    study = build(tune=tune)
    assert grid(study, "PI") == [(("recipe.learning_rate", 1e-4),), (("recipe.learning_rate", 0.01),)]
    assert {dict(tried)["rope.base"] for tried in grid(study, "EABF")} == {3e4, 4e4}
    assert [cell.method for cell in tuning_cells(study)] == ["PI"] * 2 + ["EABF"] * 4
    assert len({cell.name for cell in tuning_cells(study)}) == 6


def test_a_claims_sides_have_the_largest_amount_the_trained_window_and_its_last_band(build: Build) -> None:
    plain = {"text": "t", "better": "EABF", "worse": "PI", "measure": "loss"}
    full = {**plain, "window": BEYOND, "band": [0, BEYOND], "worse": {"method": "EABF", "data": 0, "window": 16}}
    study = build(claims=[plain, {**full, "worse": {**full["worse"], "band": [0, 16]}}])
    (first, second), (third, fourth) = (sides(study, claim) for claim in study.claims)
    assert (first.method, second.method, first.data) == ("EABF", "PI", "8")
    assert first.column == second.column == ("loss", WINDOW, (16, WINDOW))
    assert third.column == ("loss", BEYOND, (0, BEYOND))
    assert fourth == ("EABF", "0", ("loss", 16, (0, 16)))


def changed(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        *parents, leaf = key.split("/")
        for parent in parents:
            values = values[parent]
        values[leaf] = value

    return change


CLAIM = {"text": "c", "better": "EABF", "worse": "PI", "measure": "loss"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("method", {}), "unknown study key 'method': did you mean 'methods'"),
        (changed("methods", {}), "study key 'methods' is empty; at least one is needed"),
        (changed("data", {}), "study key 'data' is empty"),
        (changed("seeds", []), "study key 'seeds' is empty"),
        (changed("seeds", [1, 1]), r"study key 'seeds' is \[1, 1\]; different numbers"),
        (changed("seeds", "one"), "study key 'seeds' is 'one'; a list of integers is needed"),
        (changed("methods/PI", "pi"), "study key 'methods.PI' is 'pi'; a mapping of configuration keys"),
        (changed("methods/PI", {"recipe": {"epochs": 2}}), "has a mapping for recipe; write its keys as recipe.KEY"),
        (changed("methods/PI", {"recipe.seed": 2}), "has recipe.seed, which the study sets itself"),
        (changed("data/8", {}), r"study key 'data.8' is {}; a list of training stages is needed, \[\] for none"),
        (changed("data/8", [{"samples": 3}]), "a mapping with a directory is needed"),
        (changed("evaluate/windows", []), r"study key 'evaluate.windows' is \[\]; ascending"),
        (changed("evaluate/windows", [32, 16]), r"study key 'evaluate.windows' is \[32, 16\]; ascending"),
        (changed("evaluate/measures", {}), "needs at least one of measures"),
        (changed("evaluate/measures", {"lss": {}}), "unknown study key 'evaluate.measures.lss': did you mean 'evalua"),
        (changed("evaluate/measures/loss", {"band": []}), "did you mean 'evaluate.measures.loss.bands'"),
        (changed("evaluate/measures/loss", {"bands": [0, 32]}), "bands 0,32 have no edge at the window 16"),
        (changed("evaluate/documents", {}), "study key 'evaluate.documents.directory' is missing"),
        (changed("evaluate/documents/count", 0), "'evaluate.documents' has first 0, count 0"),
        (changed("only", {"8": ["YaRN"]}), "unknown name in study key 'only.8' 'YaRN': known: EABF, PI"),
        (changed("only", {"5": []}), "unknown name in study key 'only' '5'"),
        (changed("reference", "YaRN"), "unknown name in study key 'reference' 'YaRN'"),
        (changed("claims", [{**CLAIM, "better": ["EABF"]}]), "claim 'c': key 'method' is"),
        (changed("claims", [{**CLAIM, "better": {"method": "EABF", "band": 5}}]), "claim 'c': key 'band' is 5"),
        (changed("seeds", [2**32]), "different numbers from 0, below"),
        (changed("claims", [{**CLAIM, "worse": "YaRN"}]), "claim 'c': unknown name in study key 'claims' 'YaRN'"),
        (changed("claims", [{**CLAIM, "measure": "ruler"}]), "claim 'c': unknown measure of this study 'ruler'"),
        (changed("claims", [{**CLAIM, "window": 48}]), "claim 'c': loss has no column with window 48"),
        (changed("claims", [{**CLAIM, "band": [0, 8]}]), r"no column with window 32 and band \[0, 8\]"),
        (changed("claims", [{**CLAIM, "better": {"methd": "PI"}}]), "claim 'c': unknown key 'methd'"),
        (changed("tune", {"values": {}, "data": "8", "documents": {"directory": "x"}}), "'tune.values' is empty"),
        (changed("tune", {"values": {}, "data": "0", "documents": {"directory": "x"}}), "data with one stage"),
        (
            changed("tune", {"values": {"recipe.epochs": []}, "data": "8", "documents": {"directory": "x"}}),
            "study key 'tune.values.recipe.epochs' is .*; a list of numbers to try is needed",
        ),
    ],
)
def test_mistakes_in_the_file_are_one_line(
    change: Callable[[dict[str, Any]], None], message: str, inputs: Path, tmp_path: Path
) -> None:
    values = study_values(inputs, tmp_path / "out")
    change(values)
    path = str(write_study(tmp_path / "s.yaml", values))
    with pytest.raises(InputError, match=message) as error:
        load_study(path)
    assert "\n" not in str(error.value)


def test_labels_whose_files_would_have_one_name_are_refused(build: Build) -> None:
    with pytest.raises(InputError, match="has 'a b' and 'a/b', whose files would have the same name"):
        build(methods={"a b": {}, "a/b": {}})
    with pytest.raises(InputError, match="the cells 'a__b, c, seed 0' and 'a, b__c, seed 0' would have the same file"):
        build(methods={"a__b": {}, "a": {}}, data={"c": [], "b__c": []})


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not YAML"):
        load_study(str(tmp_path / "s.yaml"))


def test_an_unknown_configuration_key_names_the_cell(build: Build) -> None:
    study = build(methods={"PI": {"recipe.stepz": 3}})
    with pytest.raises(InputError, match=r"PI, 0, seed 0: unknown configuration key 'recipe.stepz': did you mean"):
        configurations(study, measured_cells(study)[0], {})


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_in_the_repository_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(str(path))
    assert study.output == f"studies/{path.stem}"
    for cell in (*tuning_cells(study), *measured_cells(study)):
        assert {config.window for config in configurations(study, cell, dict(cell.tried or ()))} == {
            study.trained_window
        }
    assert study.trained_window * 2 in study.evaluate.windows


@pytest.mark.document_check
def test_the_file_in_the_documentation_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/studies.md").read_text(), re.DOTALL)
    (tmp_path / "s.yaml").write_text(text)
    study = load_study(str(tmp_path / "s.yaml"))
    named = {*study.evaluate.measures, *(f.name for kind in (Study, Documents) for f in dataclasses.fields(kind))}
    page = (ROOT / "docs/studies.md").read_text()
    named |= {f.name for measure in MEASURES.values() for f in dataclasses.fields(measure.settings)}
    assert [name for name in sorted(named) if not re.search(rf"`?{name}\b", page)] == []
