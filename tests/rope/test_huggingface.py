"""The spelling of schemes in Hugging Face's config.json, against transformers and published files."""

import copy
import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheme_cases import BY_PARTS, EABF, KNOWN_TO_HF, LONGROPE, ONLY_OURS
from transformers import LlamaConfig, Ministral3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eabf_jax.errors import InputError
from eabf_jax.rope import Scheme, compose, from_hf, needs_remote_code, scheme, to_hf


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
    base = dict(s.frequencies.parameters).get("base", 10_000.0)
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
    # transformers works in float32; test_frequencies.py derives this bound.
    np.testing.assert_allclose(rotary.inv_freq.numpy(), s.inverse_frequencies(d), rtol=5 * 32 * 2.0**-24)
    assert rotary.attention_scaling == pytest.approx(s.rotation_scale(), rel=1e-15, abs=0)  # float64; also there


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


PHI_3 = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {**{key: LONGROPE[key] for key in ("long_factor", "short_factor")}, "type": "su"},
}


MINISTRAL_3 = {
    "max_position_embeddings": 262144,
    "model_type": "ministral3",
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 16.0,
        "llama_4_scaling_beta": 0.1,
        "max_position_embeddings": 262144,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0,
        "type": "yarn",
    },
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PHI_3, scheme("longrope", factor=32, **LONGROPE)),
        (
            MINISTRAL_3,
            compose(
                {"type": "ntk_by_parts", "base": 1e6, "factor": 16, "pretrained_window": 16384},
                {"type": "llama4_temperature", "beta": 0.1, "pretrained_window": 16384},
            ),
        ),
        # LLaMA ignores the key.
        ({**MINISTRAL_3, "model_type": "llama"}, scheme("ntk_by_parts", base=1e6, factor=16, pretrained_window=16384)),
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
    # Two logarithms, products and sums and a quotient in float64, each rounded by 2^-53 relative at most.
    assert s.rotation_scale() == pytest.approx(rotary.attention_scaling, rel=1e-15, abs=0)
    assert s.rotation_scale() == pytest.approx((0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1), rel=1e-15, abs=0)
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
        *(
            {"rope_type": "longrope", "short_factor": [1, 1.5] * 8, "long_factor": [2.5, 3] * 8, **more}
            for more in ({}, {"factor": 0.5}, {"factor": 8}, {"factor": 8, "attention_factor": 1.25})
        ),
    ],
    ids=str,
)
def test_unusual_values_are_read_as_transformers_reads_them(section: dict[str, Any], spelling: str) -> None:
    given = {"original_max_position_embeddings": 512, **section, "rope_theta": 10_000.0}
    config = {"max_position_embeddings": 2048, "rope_theta": 10_000.0, spelling: given}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = LlamaConfig(hidden_size=64, num_attention_heads=2, **copy.deepcopy(config))
    length = 8192  # beyond the window, where the frequencies of `dynamic` have changed
    values, scale = ROPE_INIT_FUNCTIONS[section["rope_type"]](hf, "cpu", seq_len=length)
    s = from_hf(config)
    # transformers works in float32; test_frequencies.py derives this bound.
    np.testing.assert_allclose(s.inverse_frequencies(32, length), values.numpy(), rtol=5 * 32 * 2.0**-24)
    assert s.rotation_scale(length) == pytest.approx(scale, rel=1e-15, abs=0)  # float64; also there


def test_a_window_with_a_point_is_a_whole_number() -> None:
    section = {"type": "dynamic", "factor": 2}
    assert from_hf({"max_position_embeddings": 32.0, "rope_scaling": section}) == scheme(
        "dynamic_ntk", factor=2, pretrained_window=32
    )


def test_our_own_key_is_read_first() -> None:
    assert from_hf({**LLAMA_3_1, "eabf_scheme": EABF}) == Scheme.from_dict(EABF)
    assert needs_remote_code({**LLAMA_3_1, "eabf_scheme": EABF})
    assert not needs_remote_code({**LLAMA_3_1, "eabf_scheme": None})
    assert from_hf({**LLAMA_3_1, "eabf_scheme": None}).name == "llama3"


def longrope_config(**section: Any) -> dict[str, Any]:
    lists = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}
    return {"max_position_embeddings": 64, "rope_scaling": {"type": "longrope", **lists, **section}}


def stair_config(**section: Any) -> dict[str, Any]:
    own = {"rope_type": "default", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 2048}
    return {"model_type": "ministral3", "rope_parameters": {**own, **section}}


def yarn_config(**section: Any) -> dict[str, Any]:
    return {
        "max_position_embeddings": 8192,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, **section},
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"rope_scaling": {"type": "axial"}},
            "rope type 'axial' is not supported; supported: default, linear, dynamic, yarn, llama3, longrope",
        ),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "su", "short_factor": [1.0]}}, "'long_factor' is"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "'max_position_embedd"),
        (longrope_config(short_factor=1.5), r"'short_factor' is 1.5; a list of finite numbers is needed"),
        (longrope_config(long_factor=[1.0, "2"]), r"'long_factor' is \[1.0, '2'\]; a list of finite numbers is needed"),
        (longrope_config(long_factor=[]), r"long_factor must be numbers above 0, found long_factor \(\)"),
        (longrope_config(long_factor=[0, 1]), r"long_factor must be numbers above 0, found long_factor \(0.0, 1.0\)"),
        (stair_config(llama_4_scaling_beta=None), "'llama_4_scaling_beta' is missing in rope_parameters; ministral3"),
        (stair_config(original_max_position_embeddings=None), "'original_max_position_embeddings' is missing in rope_"),
        (stair_config(original_max_position_embeddings="2k"), "'original_max_position_embeddings' is '2k'; an integer"),
        (stair_config(original_max_position_embeddings=1), "pretrained_window must be at least 2 tokens"),
        (stair_config(llama_4_scaling_beta="0.1"), "'beta' is '0.1'; a finite number or null is needed"),
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


TEMPERATURE = {"type": "llama4_temperature", "beta": 0.125, "pretrained_window": 64}


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "s",
    [
        scheme("eabf_stair", pretrained_window=4096),
        *(
            compose({"type": name, "factor": 4, **more}, TEMPERATURE)
            for name, more in (
                *(("pi", {}), ("dynamic_ntk", {"pretrained_window": 32})),
                *((name, {"pretrained_window": 64}) for name in ("ntk_by_parts", "yarn", "llama3")),
                ("longrope", {**LONGROPE, "pretrained_window": 64}),
            )
        ),
    ],
    ids=repr,
)
def test_ministral3_needs_no_remote_code_for_a_stair(s: Scheme, spelling: str) -> None:
    keys = {"model_type": "ministral3", **to_hf(s, spelling=spelling, model_type="ministral3")}
    assert not needs_remote_code(keys)
    assert from_hf(json.loads(json.dumps(keys))) == s
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = Ministral3Config(head_dim=64, **{"max_position_embeddings": 256, **copy.deepcopy(keys)}).to_dict()
    back = from_hf(saved)
    assert (back, back.name) == (s, s.name)
    assert needs_remote_code(to_hf(s, spelling=spelling))


@pytest.mark.parametrize(
    "s",
    [
        scheme("eabf", pretrained_window=64),
        scheme("abf"),  # the architecture has no keys for the multiplier 1
        compose({"type": "abf"}, {**TEMPERATURE, "one_based": True}),
        compose({"type": "yarn", "factor": 4, "pretrained_window": 32}, TEMPERATURE),  # one key for both windows
        compose({"type": "nope"}, TEMPERATURE),
    ],
    ids=repr,
)
def test_what_ministral3_cannot_express_has_our_own_key(s: Scheme) -> None:
    keys = to_hf(s, spelling="rope_parameters", model_type="ministral3")
    assert needs_remote_code(keys) and from_hf(keys) == s and "llama_4_scaling_beta" not in keys["rope_parameters"]
