"""The schemes of this package: one call of `register` for each, with its spelling in Hugging Face's config.json.

If two schemes are mathematically equal, compositions and imported models get the name of the first one.
"""

import math
from collections.abc import Mapping
from typing import Any

from eabf_jax.errors import InputError
from eabf_jax.fields import typed
from eabf_jax.rope import frequencies as frequency_rules
from eabf_jax.rope import logit_scale as logit_rules
from eabf_jax.rope.registry import HFSpelling, register

ABF_BASE = 500_000.0

_Values = Mapping[str, Any]
_HFKeys = tuple[dict[str, Any], dict[str, Any]]


def _needed(place: _Values, key: str) -> Any:
    if place.get(key) is None:
        raise InputError(f"config.json: {key!r} is missing; the rotary scheme needs it")
    return place[key]


def _number(name: str, value: Any) -> Any:
    number = typed(float, value, "config.json: key", name)
    if number <= 0:
        raise InputError(f"config.json: {name} must be a number above 0, found {value!r}")
    return number


def _window(config: _Values, section: _Values) -> Any:
    """Returns the pretrained window of yarn, longrope and llama3, from the first place where transformers finds it."""
    for place in (config, section):
        if place.get("original_max_position_embeddings") is not None:
            return place["original_max_position_embeddings"]
    return _needed(config, "max_position_embeddings")


_PLAIN = HFSpelling("default", lambda parameters, head_dim: ({}, {}), lambda config, section: {})
register("default", frequency_rules.default, hf=_PLAIN)

_LINEAR = HFSpelling(
    "linear",
    lambda parameters, head_dim: ({"factor": parameters["factor"]}, {}),
    lambda config, section: {"factor": _needed(section, "factor")},
)
register("pi", frequency_rules.pi, hf=_LINEAR)


def _write_ntk(parameters: _Values, head_dim: int | None) -> _HFKeys | None:
    if head_dim is None:
        return None
    return {"rope_theta": frequency_rules.ntk_base(head_dim, parameters["base"], parameters["factor"])}, {}


register("ntk", frequency_rules.ntk, hf=HFSpelling("default", _write_ntk))


def _write_dynamic(parameters: _Values, head_dim: int | None) -> _HFKeys:
    return {"factor": parameters["factor"]}, {"max_position_embeddings": parameters["pretrained_window"]}


def _read_dynamic(config: _Values, section: _Values) -> dict[str, Any]:
    return {"factor": _needed(section, "factor"), "pretrained_window": _needed(config, "max_position_embeddings")}


register("dynamic_ntk", frequency_rules.dynamic_ntk, hf=HFSpelling("dynamic", _write_dynamic, _read_dynamic))


def _write_yarn(parameters: _Values, head_dim: int | None) -> _HFKeys:
    section = {
        "factor": parameters["factor"],
        "original_max_position_embeddings": parameters["pretrained_window"],
        "beta_fast": parameters["beta_fast"],
        "beta_slow": parameters["beta_slow"],
    }
    if not parameters["truncate"]:
        section["truncate"] = False
    if parameters["attention_factor"] is not None:
        section["attention_factor"] = parameters["attention_factor"]
    return section, {"max_position_embeddings": round(parameters["factor"] * parameters["pretrained_window"])}


def _read_extension(config: _Values, section: _Values) -> tuple[Any, Any]:
    """Returns the pretrained window and the factor of yarn and longrope."""
    window = _number("original_max_position_embeddings", _window(config, section))
    factor = section.get("factor")
    if factor is None:
        factor = _number("max_position_embeddings", _needed(config, "max_position_embeddings")) / window
    return window, factor


def _read_yarn(config: _Values, section: _Values) -> dict[str, Any]:
    window, factor = _read_extension(config, section)
    attention_factor = section.get("attention_factor")
    mscale, mscale_all_dim = section.get("mscale"), section.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all_dim:
        growth = 0.1 * math.log(max(_number("factor", factor), 1.0))
        attention_factor = (_number("mscale", mscale) * growth + 1.0) / (
            _number("mscale_all_dim", mscale_all_dim) * growth + 1.0
        )
    return {
        "factor": factor,
        "pretrained_window": window,
        # transformers takes 0 for "not set" here, and null for false in `truncate`.
        "beta_fast": section.get("beta_fast") or 32.0,
        "beta_slow": section.get("beta_slow") or 1.0,
        "truncate": section.get("truncate", True) or False,
        "attention_factor": attention_factor,
    }


register("ntk_by_parts", frequency_rules.yarn, fixed={"attention_factor": 1.0})
register("yarn", frequency_rules.yarn, hf=HFSpelling("yarn", _write_yarn, _read_yarn))
register("dynamic_yarn", frequency_rules.dynamic_yarn)
register("abf", frequency_rules.default, defaults={"base": ABF_BASE})
register("eabf", frequency_rules.default, logit_rules.entropy_aware, defaults={"base": ABF_BASE})
register(
    "eabf_stair",
    frequency_rules.default,
    logit_rules.llama4_temperature,
    defaults={"base": ABF_BASE},
    fixed={"beta": None, "one_based": False},
)
register("nope", frequency_rules.nope)


_LLAMA3_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")


def _write_llama3(parameters: _Values, head_dim: int | None) -> _HFKeys:
    section = {name: parameters[name] for name in _LLAMA3_FACTORS}
    return section | {"original_max_position_embeddings": parameters["pretrained_window"]}, {}


def _read_llama3(config: _Values, section: _Values) -> dict[str, Any]:
    factors = {name: _needed(section, name) for name in _LLAMA3_FACTORS}
    return factors | {"pretrained_window": _window(config, section)}


register("llama3", frequency_rules.llama3, hf=HFSpelling("llama3", _write_llama3, _read_llama3))


_LONGROPE_LISTS = ("short_factor", "long_factor")


def _write_longrope(parameters: _Values, head_dim: int | None) -> _HFKeys:
    window = parameters["pretrained_window"]
    section = {"factor": parameters["factor"], "original_max_position_embeddings": window}
    section |= {name: list(parameters[name]) for name in _LONGROPE_LISTS}
    if parameters["attention_factor"] is not None:
        section["attention_factor"] = parameters["attention_factor"]
    # transformers 4.51 reads only the outer window, and takes the factor from the two outer keys.
    longest = round(parameters["factor"] * window)
    return section, {"max_position_embeddings": longest, "original_max_position_embeddings": window}


def _read_longrope(config: _Values, section: _Values) -> dict[str, Any]:
    window, factor = _read_extension(config, section)
    return {
        "factor": factor,
        "pretrained_window": window,
        "attention_factor": section.get("attention_factor"),
        **{name: _needed(section, name) for name in _LONGROPE_LISTS},
    }


register("longrope", frequency_rules.longrope, hf=HFSpelling("longrope", _write_longrope, _read_longrope))
