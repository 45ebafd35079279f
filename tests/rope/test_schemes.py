"""Schemes as values: named, converted to dictionaries and back, composed, and refused."""

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scheme_cases import BY_PARTS, EABF, ENTROPY_AWARE, KNOWN_TO_HF, ONLY_OURS, WITHOUT_A_NAME

from eabf_jax.errors import InputError
from eabf_jax.rope import Scheme, compose, register, scheme

# In float32, the roundings of the term added to 1 weigh about a twelfth; the sum itself is rounded by 2^-24.
TOLERANCE = 2e-7

# --- names and parameters


@pytest.mark.parametrize("s", KNOWN_TO_HF + ONLY_OURS, ids=repr)
def test_plain_values_and_back(s: Scheme) -> None:
    written = json.loads(json.dumps(s.to_dict()))
    back = Scheme.from_dict(written)
    assert back == s
    assert hash(back) == hash(s)
    assert (back.name, back.to_dict()) == (s.name, written)
    assert pickle.loads(pickle.dumps(s)) == s == copy.deepcopy(s)
    assert eval(repr(s), {"scheme": scheme}) == s


def test_plain_values_are_the_ones_given() -> None:
    assert scheme("eabf", base=500_000, pretrained_window=4096).to_dict() == EABF
    assert scheme("abf").to_dict() == {"type": "abf", "base": 500_000.0}
    assert WITHOUT_A_NAME.to_dict() == {"type": "compose", "frequencies": BY_PARTS, "logit_scale": ENTROPY_AWARE}


def test_whole_numbers_stand_for_floats_and_numpy_numbers_for_both() -> None:
    s = scheme("yarn", base=10_000, factor=4, pretrained_window=4096)
    assert s == scheme("yarn", base=np.float32(10_000), factor=np.int64(4), pretrained_window=np.int32(4096))
    assert all(type(value) in (float, int) for key, value in s.to_dict().items() if key != "type")
    assert isinstance(s.to_dict()["factor"], float)
    assert s == scheme("yarn", factor=4, pretrained_window=4096.0)
    assert type(scheme("eabf", pretrained_window=np.float32(4096)).to_dict()["pretrained_window"]) is int


def test_schemes_are_frozen_and_differ_by_their_parameters() -> None:
    s = scheme("eabf", pretrained_window=4096)
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.name = "other"  # type: ignore[misc]
    others = [
        scheme("eabf", pretrained_window=8192),
        scheme("eabf", pretrained_window=4096, unscaled_layers=0),
        scheme("abf"),
        scheme("eabf", base=1e6, pretrained_window=4096),
    ]
    assert len({s, *others}) == 5
    assert scheme("pi", factor=4) != scheme("ntk", factor=4)


# --- composition


def test_composition_takes_one_part_of_each() -> None:
    s = compose(scheme("yarn", factor=4, pretrained_window=4096), scheme("eabf", base=7e5, pretrained_window=2048))
    yarn = scheme("yarn", factor=4, pretrained_window=4096)
    np.testing.assert_array_equal(s.inverse_frequencies(64), yarn.inverse_frequencies(64))
    assert s.rotation_scale() == 0.1 * math.log(4) + 1
    np.testing.assert_allclose(s.logit_scale(jnp.array([2047, 4095]), 2), [1.0, 12 / 11], rtol=TOLERANCE)
    assert s.name == "compose"


def test_a_composition_that_has_a_name_gets_it() -> None:
    entropy_aware = {"pretrained_window": 4096}
    for logit_scale in ({"type": "eabf", **entropy_aware}, {"type": "entropy_aware", **entropy_aware}):
        s = compose({"type": "abf"}, logit_scale)
        assert s == scheme("eabf", pretrained_window=4096)
        assert s.name == "eabf"
    for none in (None, {"type": "none"}, scheme("default")):
        s = compose(scheme("eabf", pretrained_window=4096), none)
        assert s == scheme("abf")
        assert s.name == "default"
    assert compose(BY_PARTS).name == "ntk_by_parts"
    assert compose(scheme("yarn", factor=4, pretrained_window=4096)).name == "yarn"


def test_a_composition_by_type() -> None:
    written = {"type": "compose", "frequencies": BY_PARTS, "logit_scale": {**ENTROPY_AWARE, "type": "eabf"}}
    assert Scheme.from_dict(written) == WITHOUT_A_NAME
    assert Scheme.from_dict({"type": "compose", "frequencies": BY_PARTS}) == Scheme.from_dict(BY_PARTS)


# --- refusals: each names the key, the value found and what is expected


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("eafb", {}, r"unknown rotary scheme 'eafb': did you mean 'eabf'\? known: abf, compose, default"),
        ("pi", {"facter": 4}, r"unknown rope 'pi' parameter 'facter': did you mean 'factor'\? known: base, factor"),
        ("ntk_by_parts", {"attention_factor": 1.0}, "unknown rope 'ntk_by_parts' parameter 'attention_factor'"),
        ("default", {"factor": 4}, "unknown rope 'default' parameter 'factor'"),
        ("pi", {}, "rope 'pi' parameter 'factor' is missing; a finite number is needed"),
        ("eabf", {}, "rope 'eabf' parameter 'pretrained_window' is missing; an integer is needed"),
        ("pi", {"factor": "four"}, "rope 'pi' parameter 'factor' is 'four'; a finite number is needed$"),
        ("abf", {"base": "500000"}, "'base' is '500000'; a finite number is needed, without quotes"),
        ("pi", {"factor": None}, "'factor' is None; a finite number is needed"),
        ("pi", {"factor": True}, "'factor' is True; a finite number is needed"),
        ("pi", {"factor": [4]}, r"'factor' is \[4\]; a finite number is needed"),
        ("eabf", {"pretrained_window": 4096.5}, "'pretrained_window' is 4096.5; an integer is needed"),
        ("eabf", {"pretrained_window": math.inf}, "'pretrained_window' is inf; an integer is needed"),
        ("eabf", {"pretrained_window": True}, "'pretrained_window' is True; an integer is needed"),
        ("eabf", {"pretrained_window": 4096, "unscaled_layers": 1.5}, "'unscaled_layers' is 1.5; an integer is needed"),
        ("pi", {"factor": math.nan}, "'factor' is nan; a finite number is needed"),
        ("abf", {"base": math.inf}, "'base' is inf; a finite number is needed"),
        ("default", {"base": 1.0}, "base must be more than 1, found base 1.0"),
        ("default", {"base": -5}, "base must be more than 1, found base -5.0"),
        ("pi", {"factor": 0}, "factor must be more than 0, found factor 0.0"),
        ("yarn", {"factor": 4, "pretrained_window": 4096, "truncate": 1}, "'truncate' is 1; true or false is needed"),
        ("dynamic_ntk", {"pretrained_window": 1}, "pretrained_window must be at least 2 tokens"),
        ("eabf", {"pretrained_window": 4096, "unscaled_layers": -1}, "unscaled_layers must be at least 0"),
        (
            "yarn",
            {"factor": 4, "pretrained_window": 4096, "beta_fast": 1},
            "beta_fast must be more than beta_slow, found beta_fast 1.0, beta_slow 1.0",
        ),
        ("dynamic_yarn", {"pretrained_window": 4096, "beta_slow": 0}, "beta_slow must be more than 0"),
        (
            "yarn",
            {"factor": 4, "pretrained_window": 4096, "attention_factor": 0},
            "attention_factor must be more than 0, found attention_factor 0.0",
        ),
        ("yarn", {"factor": 4, "pretrained_window": 6}, "pretrained_window must be at least 2 pi beta_slow"),
        (
            "ntk_by_parts",
            {"factor": 4, "pretrained_window": 4096, "base": 2},
            r"pretrained_window must be less than 2 pi beta_fast base\^2",
        ),
        (
            "llama3",
            {"factor": 8, "pretrained_window": 8192, "low_freq_factor": 4},
            "high_freq_factor must be more than low_freq_factor",
        ),
        ("llama3", {"factor": 8, "pretrained_window": 8192, "low_freq_factor": 0}, "low_freq_factor must be more than"),
        ("eabf_stair", {"pretrained_window": 2**31}, r"at least 2 tokens and less than 2\^31, found"),
        (
            "longrope",
            {"factor": 2, "pretrained_window": 8, "short_factor": [1.0]},
            "'long_factor' is missing; a list of finite numbers",
        ),
        ("nope", {"base": 10_000}, "unknown rope 'nope' parameter 'base'"),
        ("compose", {}, "rope 'compose' parameter 'frequencies' is missing"),
        ("compose", {"frequency": {}}, "unknown rope 'compose' parameter 'frequency': did you mean 'frequencies'"),
        ("compose", {"frequencies": "pi"}, "rotary scheme: expected an object with a 'type', found 'pi'"),
        (
            "compose",
            {"frequencies": BY_PARTS, "logit_scale": {"type": "entropy"}},
            "unknown logit scale 'entropy': did you mean 'entropy_aware'",
        ),
        (
            "compose",
            {"frequencies": BY_PARTS, "logit_scale": {"type": "eabf"}},
            "logit scale 'eabf' parameter 'pretrained_window' is missing",
        ),
        (
            "compose",
            {"frequencies": BY_PARTS, "logit_scale": {"type": "eabf", "pretrained_window": 1}},
            "logit scale 'eabf': pretrained_window must be at least 2 tokens",
        ),
        (
            "compose",
            {"frequencies": BY_PARTS, "logit_scale": {"type": "ssmax"}},
            "'ssmax' parameter 'scaling' is missing; a finite number",
        ),
        (
            "compose",
            {"frequencies": BY_PARTS, "logit_scale": {"type": "none", "pretrained_window": 4096}},
            "unknown logit scale 'none' parameter 'pretrained_window'",
        ),
    ],
)
def test_bad_parameters_are_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        scheme(name, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"base": 1e4}, "rotary scheme: 'type' must be the name of one, found None"),
        ({"type": 7}, "'type' must be the name of one, found 7"),
        ([], r"expected an object with a 'type', found \[\]"),
        ({"type": "dynamc_ntk"}, "did you mean 'dynamic_ntk'"),
    ],
)
def test_bad_dictionaries_are_refused(written: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scheme.from_dict(written)


# --- methods


def test_dynamic_yarn_reached_a_factor_is_yarn_of_that_factor() -> None:
    dynamic = scheme("dynamic_yarn", pretrained_window=512, truncate=False)
    yarn = scheme("yarn", factor=4, pretrained_window=512, truncate=False)
    np.testing.assert_array_equal(dynamic.inverse_frequencies(64, 2048), yarn.inverse_frequencies(64))
    traced = dynamic.inverse_frequencies(64, jnp.int32(2048))
    np.testing.assert_allclose(traced, yarn.inverse_frequencies(64), rtol=6 * 2.0**-24)  # as in test_frequencies.py


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.inverse_frequencies(64.0), "head_dim 64.0: rotary embedding here needs an even head size"),
        (lambda s: s.inverse_frequencies("64"), "head_dim '64': rotary"),
        (lambda s: s.inverse_frequencies(64, 8192.0), "length is 8192.0; a whole number, at least 0, is needed"),
        (lambda s: s.inverse_frequencies(64, -1), "length is -1; a whole number"),
        (lambda s: s.rotation_scale(jnp.float32(4)), r"length is float32 of shape \[\]; an integer scalar is needed"),
        (lambda s: s.rotation_scale(np.array([1, 2])), r"length is int64 of shape \[2\]; an integer scalar"),
        (lambda s: s.logit_scale(jnp.array([0.5]), 2), "positions are float32; integers counted from 0 are needed"),
        (lambda s: s.logit_scale([True], 2), "positions are bool; integers"),
        (lambda s: s.logit_scale(np.array([1]), -1), "layer is -1; a whole number"),
        (lambda s: s.logit_scale(np.array([1]), "2"), "layer is '2'; a whole number"),
    ],
)
def test_methods_refuse_what_is_no_whole_number(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(compose(scheme("dynamic_yarn", pretrained_window=4096), ENTROPY_AWARE))


def test_positions_may_be_a_list() -> None:
    s = scheme("eabf", pretrained_window=4096)
    np.testing.assert_allclose(s.logit_scale([4095, 8191], 2), [1.0, 13 / 12], rtol=TOLERANCE)


# --- a user's own rules, at their first use


def fine(head_dim, *, factor: float = 1.0):
    return np.ones(head_dim // 2), factor


def one_frequency(head_dim, *, factor: float = 1.0):
    return np.ones(1), 1.0


def always_following(head_dim, length, *, pretrained_window: int):
    return np.ones(head_dim // 2) * (1.0 if length is None else 1.0 / length), 1.0


def branching(head_dim, length, *, pretrained_window: int):
    return np.ones(head_dim // 2) * (2.0 if length is not None and length > pretrained_window else 1.0), 1.0


def of_the_layer(positions, layer):
    return positions * 1.0 if layer < 2 else positions * 2.0


def without_shape(positions, layer):
    return 1.0


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((one_frequency,), r"one_frequency returns arrays of shape \(1,\) and \(\) for head_dim 16; .* \[8\] and one"),
        ((always_following,), "always_following changes with the length inside pretrained_window"),
        (
            (branching,),
            r"branching fails for head_dim 16 where JAX traces its arguments \(write jnp.where for if\): TracerBool",
        ),
        ((fine, of_the_layer), "of_the_layer fails where JAX traces its arguments"),
        ((fine, without_shape), r"without_shape returns shape \(\) for positions of shape \(2, 3\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_a_model_could_not_use_is_refused_at_its_first_use(
    user_schemes: Path, rules: tuple[Any, ...], message: str
) -> None:
    register("mine", *rules)
    window = {"pretrained_window": 16} if rules[0] in (always_following, branching) else {}
    s = scheme("mine", **window)
    with pytest.raises(InputError, match=message) as caught:
        s.inverse_frequencies(16) if len(rules) == 1 else s.logit_scale(jnp.arange(4), 0)
    assert "\n" not in str(caught.value)


def of_one_size(head_dim, *, factor: float = 1.0):
    return np.ones(head_dim // 2) / np.arange(1, 7), factor


def test_a_table_for_one_head_size(user_schemes: Path) -> None:
    register("mine", of_one_size)
    s = scheme("mine", factor=3.0)
    assert s.rotation_scale() == 3.0 and s.inverse_frequencies(12)[1] == 0.5
    with pytest.raises(InputError, match="of_one_size fails for head_dim 16: ValueError"):
        s.inverse_frequencies(16)
