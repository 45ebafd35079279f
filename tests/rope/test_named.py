"""The named schemes: the parameters of each, and which are mathematically the same."""

import dataclasses
from typing import Any

import pytest
from scheme_cases import ENTROPY_AWARE, LONGROPE, WITHOUT_A_NAME

from eabf_jax.errors import InputError
from eabf_jax.rope import compose, from_hf, parameters_of, scheme, scheme_names, to_hf


def test_the_contract_names_and_parameters() -> None:
    by_parts = {"base", "factor", "pretrained_window", "beta_fast", "beta_slow", "truncate"}
    assert {name: set(parameters_of(name)) for name in scheme_names()} == {
        "default": {"base"},
        "pi": {"base", "factor"},
        "ntk": {"base", "factor"},
        "dynamic_ntk": {"base", "factor", "pretrained_window"},
        "ntk_by_parts": by_parts,
        "yarn": by_parts | {"attention_factor"},
        "dynamic_yarn": by_parts,
        "abf": {"base"},
        "eabf": {"base", "pretrained_window", "unscaled_layers"},
        "eabf_stair": {"base", "pretrained_window"},
        "nope": set(),
        "longrope": {"base", "factor", "short_factor", "long_factor", "pretrained_window", "attention_factor"},
        "llama3": {"base", "factor", "low_freq_factor", "high_freq_factor", "pretrained_window"},
    }


def test_types_and_defaults_are_described() -> None:
    assert dict(parameters_of("eabf")) == {
        "base": (float, 500_000.0),
        "pretrained_window": (int, dataclasses.MISSING),
        "unscaled_layers": (int, 2),
    }
    assert parameters_of("abf")["base"] == (float, 500_000.0)
    assert parameters_of("default")["base"] == (float, 10_000.0)
    assert parameters_of("yarn")["attention_factor"] == (float | None, None)
    assert parameters_of("yarn")["beta_fast"] == (float, 32.0)
    assert parameters_of("longrope")["long_factor"] == (tuple[float, ...], dataclasses.MISSING)
    with pytest.raises(InputError, match="did you mean 'yarn'"):
        parameters_of("yarm")


def test_only_the_dynamic_schemes_and_longrope_depend_on_the_length() -> None:
    window: dict[str, Any] = {"pretrained_window": 4096}
    factor: dict[str, Any] = {"factor": 4.0}
    given: dict[str, dict[str, Any]] = {"pi": factor, "ntk": factor, "default": {}, "abf": {}, "eabf": window}
    given |= {"eabf_stair": window, "nope": {}, "longrope": {**LONGROPE, **factor}}
    follows = {name for name in scheme_names() if scheme(name, **given.get(name, window | factor)).depends_on_length}
    assert follows == {"dynamic_ntk", "dynamic_yarn", "longrope"}
    assert not WITHOUT_A_NAME.depends_on_length
    assert compose(scheme("dynamic_yarn", **window), ENTROPY_AWARE).depends_on_length


def test_abf_is_default_with_its_base_under_another_name() -> None:
    assert scheme("abf") == scheme("default", base=500_000.0) == from_hf(to_hf(scheme("abf")))
    assert (scheme("abf").name, from_hf(to_hf(scheme("abf"))).name) == ("abf", "default")


def test_multipliers_that_are_mathematically_the_same_are_one() -> None:
    window = {"pretrained_window": 2048}
    logn = compose({"type": "abf"}, {"type": "logn", **window})
    assert logn == scheme("eabf", unscaled_layers=0, **window) and logn.name == "eabf"
    stair = compose({"type": "abf"}, {"type": "llama4_temperature", **window})
    assert stair == scheme("eabf_stair", **window) and stair.name == "eabf_stair"
    assert compose({"type": "pi", "factor": 2}, stair).to_dict()["logit_scale"] == {
        "type": "llama4_temperature", **window,
    }  # fmt: skip
    for beta, one_based in ((0.1, False), (None, True)):
        other = compose({"type": "abf"}, {"type": "llama4_temperature", "beta": beta, "one_based": one_based, **window})
        assert other != stair and other.name == "compose"
    with pytest.raises(InputError, match="unknown logit scale 'logn' parameter 'unscaled_layers'"):
        compose({"type": "abf"}, {"type": "logn", "unscaled_layers": 2, **window})
