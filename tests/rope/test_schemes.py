"""Names, composition, refusals, and the spelling of schemes in Hugging Face's config.json."""

import copy
import dataclasses
import json
import math
import pickle
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eabf_jax.errors import InputError
from eabf_jax.rope import (
    Scheme,
    compose,
    from_hf,
    needs_remote_code,
    parameters_of,
    scheme,
    scheme_names,
    to_hf,
)

EABF = {"type": "eabf", "base": 500_000.0, "pretrained_window": 4096, "unscaled_layers": 2}
BY_PARTS = {
    "type": "ntk_by_parts",
    "base": 10_000.0,
    "factor": 4.0,
    "pretrained_window": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
ENTROPY_AWARE = {"type": "entropy_aware", "pretrained_window": 4096, "unscaled_layers": 2}

WITHOUT_A_NAME = compose(frequencies=BY_PARTS, logit_scale=ENTROPY_AWARE)
KNOWN_TO_HF = [
    scheme("default"),
    scheme("default", base=500_000.0),
    scheme("abf"),
    scheme("pi", factor=4),
    scheme("dynamic_ntk", factor=2.5, pretrained_window=4096),
    scheme("ntk_by_parts", factor=4, pretrained_window=4096),
    scheme("ntk_by_parts", factor=4, pretrained_window=4096, beta_fast=64, beta_slow=2),
    scheme("yarn", factor=8, pretrained_window=4096),
    scheme("yarn", factor=8, pretrained_window=4096, attention_factor=0.875),
    scheme("yarn", factor=8, pretrained_window=4096, attention_factor=1),
    scheme("yarn", factor=8, pretrained_window=4096, truncate=False),
    scheme("ntk_by_parts", factor=4, pretrained_window=4096, truncate=False),
    *(scheme("pi", factor=0.5), scheme("yarn", factor=0.5, pretrained_window=4096)),
    scheme("llama3", base=500_000, factor=8, pretrained_window=8192),
]
ONLY_OURS = [
    scheme("eabf", pretrained_window=4096),
    scheme("eabf", base=1e6, pretrained_window=8192, unscaled_layers=0),
    scheme("dynamic_yarn", factor=8, pretrained_window=4096),
    scheme("dynamic_yarn", factor=8, pretrained_window=4096, truncate=False),
    scheme("ntk", factor=4),
    WITHOUT_A_NAME,
    compose(scheme("dynamic_ntk", factor=4, pretrained_window=512), ENTROPY_AWARE),
]

# --- names and parameters


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
    with pytest.raises(InputError, match="did you mean 'yarn'"):
        parameters_of("yarm")


def test_only_the_dynamic_schemes_depend_on_the_length() -> None:
    window: dict[str, Any] = {"pretrained_window": 4096}
    factor: dict[str, Any] = {"factor": 4.0}
    given: dict[str, dict[str, Any]] = {"pi": factor, "ntk": factor, "default": {}, "abf": {}, "eabf": window}
    follows = {name for name in scheme_names() if scheme(name, **given.get(name, window | factor)).depends_on_length}
    assert follows == {"dynamic_ntk", "dynamic_yarn"}
    assert not WITHOUT_A_NAME.depends_on_length
    assert compose(scheme("dynamic_yarn", **window), ENTROPY_AWARE).depends_on_length


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


def test_abf_is_default_with_its_base_under_another_name() -> None:
    assert scheme("abf") == scheme("default", base=500_000.0) == from_hf(to_hf(scheme("abf")))
    assert (scheme("abf").name, from_hf(to_hf(scheme("abf"))).name) == ("abf", "default")


# --- composition


def test_composition_takes_one_part_of_each() -> None:
    s = compose(scheme("yarn", factor=4, pretrained_window=4096), scheme("eabf", base=7e5, pretrained_window=2048))
    yarn = scheme("yarn", factor=4, pretrained_window=4096)
    np.testing.assert_array_equal(s.inverse_frequencies(64), yarn.inverse_frequencies(64))
    assert s.rotation_scale() == 0.1 * math.log(4) + 1
    np.testing.assert_allclose(s.logit_scale(jnp.array([2047, 4095]), 2), [1.0, 12 / 11], rtol=2e-7)
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


# --- refusals: each names the thing, what was found, what would be right


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


# --- Hugging Face's config.json


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("s", KNOWN_TO_HF, ids=repr)
def test_what_transformers_knows_round_trips_without_remote_code(s: Scheme, spelling: str) -> None:
    keys = to_hf(s, spelling=spelling)
    assert not needs_remote_code(keys)
    assert from_hf(json.loads(json.dumps(keys))) == s


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("s", ONLY_OURS, ids=repr)
def test_everything_else_round_trips_through_our_own_key(s: Scheme, spelling: str) -> None:
    keys = to_hf(s, spelling=spelling)
    assert needs_remote_code(keys)
    assert keys["eabf_scheme"] == s.to_dict()
    assert from_hf(json.loads(json.dumps(keys))) == s
    base = dict(s.frequencies.parameters)["base"]
    assert (keys["rope_theta"] if spelling == "rope_scaling" else keys["rope_parameters"]["rope_theta"]) == base


@settings(max_examples=60, deadline=None)
@given(
    base=st.floats(1_000.0, 1e7),
    factor=st.floats(1.0, 32.0),
    window=st.integers(64, 131_072),
    attention_factor=st.one_of(st.none(), st.floats(0.5, 2.0)),
    spelling=st.sampled_from(["rope_scaling", "rope_parameters"]),
)
def test_any_parameters_round_trip(
    base: float, factor: float, window: int, attention_factor: float | None, spelling: str
) -> None:
    for s in (
        scheme("default", base=base),
        scheme("pi", base=base, factor=factor),
        scheme("dynamic_ntk", base=base, factor=factor, pretrained_window=window),
        scheme("ntk_by_parts", base=base, factor=factor, pretrained_window=window),
        scheme("yarn", base=base, factor=factor, pretrained_window=window, attention_factor=attention_factor),
        scheme("llama3", base=base, factor=factor, pretrained_window=window),
        scheme("eabf", base=base, pretrained_window=window),
    ):
        assert from_hf(to_hf(s, spelling=spelling)) == s


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("s", [*KNOWN_TO_HF, scheme("ntk", factor=4)], ids=repr)
def test_transformers_computes_our_frequencies_from_our_keys(s: Scheme, spelling: str) -> None:
    d = 64
    keys = {"max_position_embeddings": 32_768} | to_hf(s, head_dim=d, spelling=spelling)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rotary = LlamaRotaryEmbedding(
            LlamaConfig(hidden_size=2 * d, num_attention_heads=2, head_dim=d, **copy.deepcopy(keys))
        )
    # transformers works in float32: see test_frequencies.py for this bound.
    np.testing.assert_allclose(rotary.inv_freq.numpy(), s.inverse_frequencies(d), rtol=5 * 32 * 2.0**-24)
    assert rotary.attention_scaling == pytest.approx(s.rotation_scale(), rel=1e-15)


@pytest.mark.parametrize("s", KNOWN_TO_HF, ids=repr)
def test_what_transformers_writes_is_read_back(s: Scheme) -> None:
    keys = {"max_position_embeddings": 32_768} | to_hf(s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = LlamaConfig(**copy.deepcopy(keys)).to_dict()
    assert saved["rope_parameters"]["rope_theta"]
    assert from_hf(saved) == s


def test_ntk_becomes_a_changed_base_where_the_head_size_is_known() -> None:
    # 10,000 * 4^(4/2)
    assert to_hf(scheme("ntk", factor=4), head_dim=4) == {"rope_theta": 160_000.0, "rope_scaling": None}
    with pytest.raises(InputError, match="head_dim 2"):
        to_hf(scheme("ntk", factor=4), head_dim=2)


def test_the_keys_by_hand() -> None:
    assert to_hf(scheme("abf")) == {"rope_theta": 500_000.0, "rope_scaling": None}
    assert to_hf(scheme("abf"), spelling="rope_parameters") == {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}
    }
    assert to_hf(scheme("pi", factor=4)) == {
        "rope_theta": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    # dynamic takes the pretrained window from max_position_embeddings, yarn the extended one
    assert to_hf(scheme("dynamic_ntk", factor=2, pretrained_window=4096))["max_position_embeddings"] == 4096
    keys = to_hf(Scheme.from_dict(BY_PARTS), spelling="rope_parameters")
    assert keys["max_position_embeddings"] == 16_384
    assert keys["rope_parameters"]["attention_factor"] == 1.0
    assert to_hf(scheme("eabf", pretrained_window=4096)) == {
        "rope_theta": 500_000.0,
        "rope_scaling": None,
        "eabf_scheme": EABF,
    }
    with pytest.raises(InputError, match="did you mean 'rope_scaling'"):
        to_hf(scheme("abf"), spelling="rope_scalings")


LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
}
YARN_LLAMA_2 = {
    "max_position_embeddings": 65536,
    "rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True},
}
QWEN_2_5_LONG = {
    "max_position_embeddings": 32768,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    "rope_theta": 1000000.0,
}
QWEN_3_NEW = {"max_position_embeddings": 40960, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}}
DEEPSEEK_LIKE = {
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA_3_1, scheme("llama3", base=500_000, factor=8, pretrained_window=8192)),
        (YARN_LLAMA_2, scheme("yarn", factor=16, pretrained_window=4096)),
        (QWEN_2_5_LONG, scheme("yarn", base=1e6, factor=4, pretrained_window=32_768)),
        (QWEN_3_NEW, scheme("default", base=1e6)),
        ({}, scheme("default", base=10_000)),
        ({"rope_theta": 1e5, "rope_scaling": None}, scheme("default", base=1e5)),
        ({"rope_theta": 1e5, "rope_parameters": None}, scheme("default", base=1e5)),
        ({"rope_theta": 1e5, "rope_parameters": {"type": "linear", "factor": 2}}, scheme("pi", base=1e5, factor=2)),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}}, scheme("pi", factor=2)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 8}},
            scheme("pi", factor=2),
        ),
        (
            {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            scheme("dynamic_ntk", factor=2, pretrained_window=2048),
        ),
        (
            {"max_position_embeddings": 2048, "rope_scaling": {"type": "yarn", "factor": 2.0}},
            scheme("yarn", factor=2, pretrained_window=2048),
        ),
        (
            {
                "max_position_embeddings": 8192,
                "original_max_position_embeddings": 1024,
                "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 2048},
            },
            scheme("yarn", factor=8, pretrained_window=1024),
        ),
        (
            {
                "max_position_embeddings": 8192,
                "partial_rotary_factor": 1.0,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 2048,
                    "attention_factor": 1.0,
                    "truncate": True,
                    "beta_fast": 0,
                },
            },
            scheme("ntk_by_parts", factor=4, pretrained_window=2048),
        ),
    ],
)
def test_published_configs_are_read(config: dict[str, Any], expected: Scheme) -> None:
    before = copy.deepcopy(config)
    found = from_hf(config)
    assert found == expected
    assert found.name == expected.name
    assert config == before


def test_mscale_becomes_the_attention_factor_that_transformers_derives() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rotary = LlamaRotaryEmbedding(
            LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, **copy.deepcopy(DEEPSEEK_LIKE))
        )
    s = from_hf(DEEPSEEK_LIKE)
    assert s.name == "yarn"
    assert s.rotation_scale() == pytest.approx(rotary.attention_scaling, rel=1e-15)
    assert s.rotation_scale() == pytest.approx((0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1), rel=1e-15)
    equal = copy.deepcopy(DEEPSEEK_LIKE)
    equal["rope_scaling"]["mscale"] = 1.0  # type: ignore[index]
    assert from_hf(equal).name == "ntk_by_parts"


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "section",
    [
        {"rope_type": "linear", "factor": 0.5},
        {"rope_type": "dynamic", "factor": 0.5},
        {"rope_type": "llama3", "factor": 0.5, "low_freq_factor": 1, "high_freq_factor": 4},
        *({"rope_type": "yarn", "factor": 0.5}, {"rope_type": "yarn", "factor": 0.5, "mscale": 2, "mscale_all_dim": 1}),
        *({"rope_type": "yarn", "factor": 4, "truncate": truncate} for truncate in (True, False, None)),
        {"rope_type": "yarn", "factor": 4, "truncate": False, "original_max_position_embeddings": 32.0},
    ],
    ids=str,
)
def test_unusual_values_are_read_as_transformers_reads_them(section: dict[str, Any], spelling: str) -> None:
    given = {"original_max_position_embeddings": 512, **section, "rope_theta": 10_000.0}
    config = {"max_position_embeddings": 2048, "rope_theta": 10_000.0, spelling: given}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = LlamaConfig(hidden_size=64, num_attention_heads=2, **copy.deepcopy(config))
    length = 8192  # beyond the window: the frequencies of `dynamic` have moved
    values, scale = ROPE_INIT_FUNCTIONS[section["rope_type"]](hf, "cpu", seq_len=length)
    s = from_hf(config)
    # transformers works in float32: see test_frequencies.py for this bound.
    np.testing.assert_allclose(s.inverse_frequencies(32, length), values.numpy(), rtol=5 * 32 * 2.0**-24)
    assert s.rotation_scale(length) == pytest.approx(scale, rel=1e-15)


def test_a_window_with_a_point_is_a_whole_number() -> None:
    section = {"type": "dynamic", "factor": 2}
    assert from_hf({"max_position_embeddings": 32.0, "rope_scaling": section}) == scheme(
        "dynamic_ntk", factor=2, pretrained_window=32
    )


def test_dynamic_yarn_reached_a_factor_is_yarn_of_that_factor() -> None:
    dynamic = scheme("dynamic_yarn", pretrained_window=512, truncate=False)
    yarn = scheme("yarn", factor=4, pretrained_window=512, truncate=False)
    np.testing.assert_array_equal(dynamic.inverse_frequencies(64, 2048), yarn.inverse_frequencies(64))
    traced = dynamic.inverse_frequencies(64, jnp.int32(2048))
    np.testing.assert_allclose(traced, yarn.inverse_frequencies(64), rtol=6 * 2.0**-24)  # as in test_frequencies.py


def test_our_own_key_is_read_first() -> None:
    assert from_hf({**LLAMA_3_1, "eabf_scheme": EABF}) == Scheme.from_dict(EABF)
    assert needs_remote_code({**LLAMA_3_1, "eabf_scheme": EABF})
    assert not needs_remote_code({**LLAMA_3_1, "eabf_scheme": None})
    assert from_hf({**LLAMA_3_1, "eabf_scheme": None}).name == "llama3"


def yarn_config(**section: Any) -> dict[str, Any]:
    return {
        "max_position_embeddings": 8192,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, **section},
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope type 'longrope' is not supported; supported: default, linear, dynamic, yarn, llama3",
        ),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope type 'proportional'"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"rope type \['yarn'\] is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null, found 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1 .*found 0.5"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "partial_rotary_factor must be 1 .*found 0.25",
        ),
        (yarn_config(truncate="no"), "'truncate' is 'no'; true or false is needed"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "one rotary scheme for all layers is supported, found one for 'full_attention'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "'factor' is '4'; a finite number is needed"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'max_position_embeddings' is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'max_position_embeddings' is missing"),
        (
            {"max_position_embeddings": 8192, "rope_scaling": {"type": "llama3", "factor": 8.0}},
            "'low_freq_factor' is missing",
        ),
        (
            yarn_config(factor="4", mscale=1.0, mscale_all_dim=0.5),
            "'factor' is '4'; a finite number is needed, without quotes",
        ),
        (yarn_config(mscale="x", mscale_all_dim=0.5), "'mscale' is 'x'; a finite number is needed"),
        (
            yarn_config(original_max_position_embeddings="2k"),
            "'original_max_position_embeddings' is '2k'; a finite number is needed",
        ),
        (yarn_config(factor=0), "factor must be more than 0, found factor 0.0"),
        ({"rope_theta": "10000"}, "'base' is '10000'; a finite number is needed"),
        ({"eabf_scheme": "eabf"}, "expected an object with a 'type', found 'eabf'"),
        ({"eabf_scheme": {"type": "eabf"}}, "parameter 'pretrained_window' is missing"),
    ],
)
def test_configs_that_no_scheme_represents_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        from_hf(config)
    assert "\n" not in str(caught.value)


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
    np.testing.assert_allclose(s.logit_scale([4095, 8191], 2), [1.0, 13 / 12], rtol=2e-7)
