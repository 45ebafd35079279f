"""Rotary schemes by name, their composition, and their spelling in Hugging Face's config.json.

A scheme is two independent choices: a frequency rule and a rule for the multiplier of the attention logits, each with
its parameters. `SCHEMES` names the pairs that have a name. To add one, write its rule in `frequencies.py` or
`logit_scale.py` and add its line here; names, types and defaults of its parameters are read from the rule's signature.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.fields import check, typed
from eabf_jax.rope import frequencies as frequency_rules
from eabf_jax.rope import logit_scale as logit_rules
from eabf_jax.rope.frequencies import LLAMA2_BASE, Frequencies, Length

ABF_BASE = 500_000.0
HF_SPELLINGS = ("rope_scaling", "rope_parameters")
OWN_KEY = "eabf_scheme"

# The rotation scale is the same for every head size; a rule is asked for one of this size to learn it.
_ANY_HEAD_DIM = 128


@dataclass(frozen=True)
class Rule:
    """A rule of `frequencies.py` or `logit_scale.py` with its parameters bound.

    Attributes:
      function: the rule.
      parameters: pairs of name and value, in the order of the rule's signature.
    """

    function: Callable[..., Any]
    parameters: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments, **dict(self.parameters))


@dataclass(frozen=True)
class _Entry:
    """A line of the table: the two rules of a named scheme, and what the name changes or fixes in their parameters."""

    frequencies: Callable[..., Any]
    logit_scale: Callable[..., Any] = logit_rules.none
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


# Where two lines are the same mathematics, compositions and what is read from Hugging Face get the first one's name.
# Every frequency rule has a line without a multiplier: compositions are written down by its name.
SCHEMES: Mapping[str, _Entry] = MappingProxyType(
    {
        "default": _Entry(frequency_rules.default),
        "pi": _Entry(frequency_rules.pi),
        "ntk": _Entry(frequency_rules.ntk),
        "dynamic_ntk": _Entry(frequency_rules.dynamic_ntk),
        "ntk_by_parts": _Entry(frequency_rules.yarn, fixed={"attention_factor": 1.0}),
        "yarn": _Entry(frequency_rules.yarn),
        "dynamic_yarn": _Entry(frequency_rules.dynamic_yarn),
        "abf": _Entry(frequency_rules.default, defaults={"base": ABF_BASE}),
        "eabf": _Entry(frequency_rules.default, logit_rules.entropy_aware, defaults={"base": ABF_BASE}),
        "llama3": _Entry(frequency_rules.llama3),
    }
)

LOGIT_SCALES: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"none": logit_rules.none, "entropy_aware": logit_rules.entropy_aware, "eabf": logit_rules.entropy_aware}
)

# What the exported modeling file computes: the parameters that it knows for each type, as `to_dict` writes them. A rule
# that is added here without being added there would be exported and give other logits.
_BY_PARTS = ("base", "factor", "pretrained_window", "beta_fast", "beta_slow", "truncate")
EXPORTED_FREQUENCIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": ("base",),
        "abf": ("base",),
        "pi": ("base", "factor"),
        "ntk": ("base", "factor"),
        "dynamic_ntk": ("base", "factor", "pretrained_window"),
        "ntk_by_parts": _BY_PARTS,
        "yarn": (*_BY_PARTS, "attention_factor"),
        "dynamic_yarn": _BY_PARTS,
        "llama3": ("base", "factor", "low_freq_factor", "high_freq_factor", "pretrained_window"),
    }
)
EXPORTED_LOGIT_SCALES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict.fromkeys(("entropy_aware", "eabf"), ("pretrained_window", "unscaled_layers")) | {"none": ()}
)

# What the values of parameters must satisfy, by parameter name, whichever rule takes them.
_REQUIREMENTS: tuple[tuple[tuple[str, ...], Callable[..., bool], str], ...] = (
    (("base",), lambda base: base > 1, "base must be more than 1"),
    (("factor",), lambda factor: factor > 0, "factor must be more than 0"),
    (("pretrained_window",), lambda window: window >= 2, "pretrained_window must be at least 2 tokens"),
    (("unscaled_layers",), lambda layers: layers >= 0, "unscaled_layers must be at least 0"),
    (("attention_factor",), lambda scale: scale is None or scale > 0, "attention_factor must be more than 0"),
    (("beta_slow",), lambda slow: slow > 0, "beta_slow must be more than 0"),
    (("beta_fast", "beta_slow"), lambda fast, slow: fast > slow, "beta_fast must be more than beta_slow"),
    (("low_freq_factor",), lambda low: low > 0, "low_freq_factor must be more than 0"),
    (
        ("high_freq_factor", "low_freq_factor"),
        lambda high, low: high > low,
        "high_freq_factor must be more than low_freq_factor",
    ),
    # Outside these two bounds every frequency is on one side of the ramp, and implementations disagree on which.
    (
        ("pretrained_window", "beta_slow"),
        lambda window, slow: window >= 2 * math.pi * slow,
        "pretrained_window must be at least 2 pi beta_slow, so that some frequency turns beta_slow times inside it",
    ),
    (
        ("pretrained_window", "beta_fast", "base"),
        lambda window, fast, base: window < 2 * math.pi * fast * base**2,
        "pretrained_window must be less than 2 pi beta_fast base^2, so that some frequency can be interpolated",
    ),
)


@dataclass(frozen=True, repr=False)
class Scheme:
    """A rotary scheme: inverse frequencies, rotation scale and logit multiplier, pure functions of static parameters.

    Build one with `scheme` or `compose`. Schemes are hashable, and equal when their rules and parameters are, whatever
    they were called: `abf` equals `default` with the same base.

    Attributes:
      frequencies: the frequency rule with its parameters.
      logit_multiplier: the rule for the multiplier of the attention logits, with its parameters.
      name: the name in the table, or "compose"; not part of the comparison.
    """

    frequencies: Rule
    logit_multiplier: Rule
    name: str = field(compare=False)

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies or rotation scale follow the current length."""
        return "length" in inspect.signature(self.frequencies.function).parameters

    def inverse_frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        """Computes the inverse frequencies.

        Args:
          head_dim: size of an attention head, even (at least 4 for the NTK-aware schemes).
          length: current length in tokens for the schemes that follow it, otherwise not used; may be a traced integer,
            and mapped over with `jax.vmap`. None stands for a length within the pretrained window.

        Returns:
          Radians per token, float32 [head_dim // 2].

        Raises:
          InputError: head_dim does not suit the scheme, or a length that is no whole number.
        """
        return self._rotation(head_dim, length)[0]

    def rotation_scale(self, length: Length = None) -> float | Float32[Array, ""]:
        """Computes the factor that multiplies cos and sin, 1.0 but for the YaRN schemes.

        Args:
          length: as for `inverse_frequencies`.

        Returns:
          A float; a float32 scalar where the scheme follows the length and the length is traced.

        Raises:
          InputError: a length that is no whole number.
        """
        return self._rotation(_ANY_HEAD_DIM, length)[1]

    def logit_scale(self, positions: Int[Array, " *shape"], layer: int | Int[Array, ""]) -> Float32[Array, " *shape"]:
        """Computes the multiplier of the attention logits of each query; it may be folded into the query (not the key).

        Args:
          positions: 0-based positions of the queries, integers of any shape.
          layer: 0-based layer index; may be a traced integer.

        Returns:
          Multipliers, float32, shape of `positions`; exactly 1 within the pretrained window.

        Raises:
          InputError: positions or a layer that are no whole numbers, or a negative layer.
        """
        positions = positions if isinstance(positions, jax.Array) else np.asarray(positions)
        if not jnp.issubdtype(positions.dtype, jnp.integer):
            raise InputError(f"positions are {positions.dtype}; integers counted from 0 are needed")
        _check_whole("layer", layer)
        return self.logit_multiplier(positions, layer)

    def to_dict(self) -> dict[str, Any]:
        """Returns the scheme as plain values, for config files: `{"type": name, parameter: value, ...}`.

        Returns:
          A dictionary that `Scheme.from_dict` turns back into an equal scheme. Optional parameters at None and switches
          at their default are absent.
        """
        if self.name == "compose":
            return {
                "type": "compose",
                "frequencies": compose(self).to_dict(),
                "logit_scale": _logit_scale_told(self.logit_multiplier),
            }
        bound = {**_told(self.frequencies), **_told(self.logit_multiplier)}
        fixed = SCHEMES[self.name].fixed
        return {"type": self.name} | {name: value for name, value in bound.items() if name not in fixed}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Scheme":
        """Builds the scheme that `to_dict` or a config file describes.

        Args:
          values: `{"type": name, parameter: value, ...}`; the parameters of "compose" are those of `compose`.

        Returns:
          The scheme.

        Raises:
          InputError: as `scheme`.
        """
        name, parameters = _split_type(values, "rotary scheme")
        return scheme(name, **parameters)

    def __repr__(self) -> str:
        values = self.to_dict()
        arguments = "".join(f", {name}={value!r}" for name, value in values.items() if name != "type")
        return f"scheme({values['type']!r}{arguments})"

    def _rotation(self, head_dim: int, length: Length) -> tuple[Frequencies, float | Float32[Array, ""]]:
        if length is not None:
            _check_whole("length", length)
        return self.frequencies(head_dim, length) if self.depends_on_length else self.frequencies(head_dim)


def _check_whole(name: str, value: Any) -> None:
    """Refuses what is neither a whole number from 0 nor an integer scalar of an array's kind."""
    if isinstance(value, jax.Array | np.ndarray):
        if not jnp.issubdtype(value.dtype, jnp.integer) or value.ndim:
            raise InputError(f"{name} is {value.dtype} of shape {list(value.shape)}; an integer scalar is needed")
    elif not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise InputError(f"{name} is {value!r}; a whole number, at least 0, is needed")


def scheme(name: str, /, **parameters: Any) -> Scheme:
    """Builds a rotary scheme by its name.

    Args:
      name: a name in `scheme_names()`.
      **parameters: the scheme's parameters, see `parameters_of`; windows in tokens.

    Returns:
      The scheme.

    Raises:
      InputError: unknown scheme or parameter, missing parameter, value of a wrong type or out of range.
    """
    if name == "compose":
        return _compose_from(parameters)
    expected = parameters_of(name)
    values = _checked(f"rope {name!r}", expected, parameters) | dict(SCHEMES[name].fixed)
    entry = SCHEMES[name]
    return Scheme(_bind(entry.frequencies, values), _bind(entry.logit_scale, values), name)


def compose(frequencies: Scheme | Mapping[str, Any], logit_scale: Scheme | Mapping[str, Any] | None = None) -> Scheme:
    """Builds a scheme from the frequencies of one and the logit multiplier of another.

    Args:
      frequencies: the scheme whose frequencies and rotation scale are taken, or that scheme as a dictionary.
      logit_scale: the scheme whose logit multiplier is taken; or a dictionary of type "entropy_aware" (or "eabf") with
        `pretrained_window` in tokens and `unscaled_layers`; None or type "none" for no multiplier.

    Returns:
      The scheme, under the name of the table's line that has the same two rules, if there is one.

    Raises:
      InputError: as `scheme`.
    """
    rotation = (frequencies if isinstance(frequencies, Scheme) else Scheme.from_dict(frequencies)).frequencies
    multiplier = logit_scale.logit_multiplier if isinstance(logit_scale, Scheme) else _logit_rule(logit_scale)
    return Scheme(rotation, multiplier, _name_of(rotation, multiplier))


def scheme_names() -> tuple[str, ...]:
    """Returns the names that `scheme` knows by its table (not "compose", whose parameters are schemes themselves)."""
    return tuple(SCHEMES)


@cache
def parameters_of(name: str) -> Mapping[str, tuple[Any, Any]]:
    """Describes the parameters of a named scheme.

    Args:
      name: a name in `scheme_names()`.

    Returns:
      For each parameter its type (`float`, `int` or `float | None`) and its default, `dataclasses.MISSING` for none.

    Raises:
      InputError: unknown scheme.
    """
    if name not in SCHEMES:
        raise unknown_name("rotary scheme", name, [*SCHEMES, "compose"])
    entry = SCHEMES[name]
    described = _parameters_of_rule(entry.frequencies) | _parameters_of_rule(entry.logit_scale)
    return MappingProxyType(
        {
            parameter: (kind, entry.defaults.get(parameter, default))
            for parameter, (kind, default) in described.items()
            if parameter not in entry.fixed
        }
    )


def from_hf(config: Mapping[str, Any]) -> Scheme:
    """Reads the rotary scheme of a Hugging Face config.json.

    Our own key `eabf_scheme` is read first, then either spelling: `rope_theta` beside `rope_scaling` (whose kind is
    under `rope_type` or `type`), or `rope_parameters` with `rope_theta` inside. As in transformers, `rope_scaling` goes
    first where both have content, a missing base is 10,000, and keys that the kind does not use are ignored. YaRN with
    an attention factor of 1.0 is `ntk_by_parts`.

    Args:
      config: the whole config.json; `dynamic` needs its `max_position_embeddings`, and `yarn` and `llama3` fall back on
        it where they name no `original_max_position_embeddings`.

    Returns:
      The scheme.

    Raises:
      InputError: a kind of scaling or a setting that no scheme here can represent, or a missing or invalid value.
    Source: transformers, `modeling_rope_utils.py`.
    """
    own = config.get(OWN_KEY)
    if own is not None:
        return Scheme.from_dict(own)
    section = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(section, Mapping):
        raise InputError(f"config.json: rope_scaling must be an object or null, found {section!r}")
    _refuse_unrepresentable(config, section)
    kind = section.get("rope_type") or section.get("type") or "default"
    if not isinstance(kind, str) or kind not in _HF_READERS:
        raise InputError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(_HF_READERS)}")
    bases = (section.get("rope_theta"), config.get("rope_theta"), LLAMA2_BASE)
    return _HF_READERS[kind](config, section, next(base for base in bases if base is not None))


def to_hf(s: Scheme, head_dim: int | None = None, spelling: str = "rope_scaling") -> dict[str, Any]:
    """Writes a rotary scheme as keys of a Hugging Face config.json.

    What transformers can express becomes its own keys: `default` and `abf` a base, `pi` linear, `dynamic_ntk` dynamic,
    `ntk_by_parts` yarn with attention factor 1.0, `yarn`, `llama3`, and `ntk` (given `head_dim`) a changed base.
    Everything else keeps its base and adds `eabf_scheme`, which our exported model code reads (`needs_remote_code`);
    what that code does not know is refused.

    Where transformers derives the scheme from `max_position_embeddings`, that key is returned too and must go into the
    file. `dynamic` takes the pretrained window from it, in every release. For yarn it is the extended window: releases
    4.51 to 4.55 take the factor as its ratio to `original_max_position_embeddings` (later ones take `factor`). Up to
    4.50, `original_max_position_embeddings` is not read and the ramp is laid over the extended window: a yarn export
    needs transformers 4.51 or later. `truncate` false is written for the releases that read it; older ones round.

    Args:
      s: the scheme.
      head_dim: size of an attention head; only `ntk` depends on it.
      spelling: "rope_scaling" (read by every transformers release) or "rope_parameters" (5.x only).

    Returns:
      Keys and values for config.json, in place of all rotary keys that it had.

    Raises:
      InputError: unknown spelling, a head_dim that does not suit the scheme, or a rule or parameter that the exported
        model code does not know.
    """
    if spelling not in HF_SPELLINGS:
        raise unknown_name("spelling of the rotary scheme", spelling, HF_SPELLINGS)
    parameters = dict(s.frequencies.parameters)
    writer = _HF_WRITERS.get(s.frequencies.function)
    section: dict[str, Any] | None = None
    outer: dict[str, Any] = {}
    if s.logit_multiplier.function is logit_rules.none and writer is not None:
        section, outer = writer(parameters, head_dim)
    if section is None:
        section, outer = {"rope_type": "default", "rope_theta": parameters["base"]}, {OWN_KEY: _exported(s)}
    if spelling == "rope_parameters":
        return {"rope_parameters": section} | outer
    base = section.pop("rope_theta")
    return {"rope_theta": base, "rope_scaling": None if section == {"rope_type": "default"} else section} | outer


def needs_remote_code(keys: Mapping[str, Any]) -> bool:
    """Tells whether a config needs our exported model code to mean what it says.

    Args:
      keys: what `to_hf` returned, or a whole config.json.

    Returns:
      True where the scheme is one that transformers cannot express.
    """
    return keys.get(OWN_KEY) is not None


def _exported(s: Scheme) -> dict[str, Any]:
    """The scheme as a dictionary, if the exported modeling file computes all of it."""
    for known, part in (
        (EXPORTED_FREQUENCIES, compose(s).to_dict()),
        (EXPORTED_LOGIT_SCALES, _logit_scale_told(s.logit_multiplier)),
    ):
        kind = part.pop("type")
        if kind not in known:
            raise InputError(f"the exported model code does not know {kind!r}; it knows {', '.join(known)}")
        for name in part:
            if name not in known[kind]:
                raise InputError(
                    f"the exported model code does not know the parameter {name!r} of {kind!r}; "
                    f"it knows {', '.join(known[kind])}"
                )
    return s.to_dict()


@cache
def _parameters_of_rule(rule: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    hints = get_type_hints(rule)
    return {
        parameter.name: (hints[parameter.name], MISSING if parameter.default is parameter.empty else parameter.default)
        for parameter in inspect.signature(rule).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _told(rule: Rule) -> dict[str, Any]:
    """The parameters of a rule that are written down: all but optional ones at None and switches at their default."""
    defaults = {name: default for name, (_, default) in _parameters_of_rule(rule.function).items()}
    return {
        name: value
        for name, value in rule.parameters
        if value is not None and not (isinstance(value, bool) and value is defaults[name])
    }


def _logit_scale_told(rule: Rule) -> dict[str, Any]:
    return {"type": next(name for name, known in LOGIT_SCALES.items() if known is rule.function), **_told(rule)}


def _bind(rule: Callable[..., Any], values: Mapping[str, Any]) -> Rule:
    return Rule(rule, tuple((name, values[name]) for name in _parameters_of_rule(rule)))


def _checked(owner: str, expected: Mapping[str, tuple[Any, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    types = {name: kind for name, (kind, _) in expected.items()}
    defaults = {name: default for name, (_, default) in expected.items() if default is not MISSING}
    values = defaults | check(
        given, types, f"{owner} parameter", required=[name for name in types if name not in defaults]
    )
    for names, holds, requirement in _REQUIREMENTS:
        if all(name in values for name in names) and not holds(*(values[name] for name in names)):
            found = ", ".join(f"{name} {values[name]!r}" for name in names)
            raise InputError(f"{owner}: {requirement}, found {found}")
    return values


def _split_type(values: Any, kind: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(values, Mapping):
        raise InputError(f"{kind}: expected an object with a 'type', found {values!r}")
    if not isinstance(values.get("type"), str):
        raise InputError(f"{kind}: 'type' must be the name of one, found {values.get('type')!r}")
    return values["type"], {name: value for name, value in values.items() if name != "type"}


def _compose_from(parameters: Mapping[str, Any]) -> Scheme:
    types = {"frequencies": Any, "logit_scale": Any}
    check(parameters, types, "rope 'compose' parameter", required=["frequencies"])
    return compose(**parameters)


def _logit_rule(values: Mapping[str, Any] | None) -> Rule:
    if values is None:
        return Rule(logit_rules.none)
    name, parameters = _split_type(values, "logit scale")
    if name not in LOGIT_SCALES:
        raise unknown_name("logit scale", name, LOGIT_SCALES)
    rule = LOGIT_SCALES[name]
    return _bind(rule, _checked(f"logit scale {name!r}", _parameters_of_rule(rule), parameters))


def _name_of(frequencies: Rule, logit_multiplier: Rule) -> str:
    rules = (frequencies.function, logit_multiplier.function)
    bound = dict(frequencies.parameters)
    for name, entry in SCHEMES.items():
        if (entry.frequencies, entry.logit_scale) == rules and entry.fixed.items() <= bound.items():
            return name
    return "compose"


def _refuse_unrepresentable(config: Mapping[str, Any], section: Mapping[str, Any]) -> None:
    partial = section.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and _number("partial_rotary_factor", partial) != 1:
        raise InputError(f"config.json: partial_rotary_factor must be 1 (the whole head is rotated), found {partial!r}")
    for name, value in section.items():
        if isinstance(value, Mapping):
            raise InputError(f"config.json: one rotary scheme for all layers is supported, found one for {name!r}")


def _window(config: Mapping[str, Any], section: Mapping[str, Any]) -> Any:
    """Returns the pretrained window of yarn and llama3, looked up where and in the order that transformers does."""
    for place in (config, section):
        if place.get("original_max_position_embeddings") is not None:
            return place["original_max_position_embeddings"]
    return _needed(config, "max_position_embeddings")


def _number(name: str, value: Any) -> Any:
    number = typed(float, value, "config.json: key", name)
    if number <= 0:
        raise InputError(f"config.json: {name} must be a number above 0, found {value!r}")
    return number


def _needed(place: Mapping[str, Any], key: str) -> Any:
    if place.get(key) is None:
        raise InputError(f"config.json: {key!r} is missing; the rotary scheme needs it")
    return place[key]


def _read_default(config: Mapping[str, Any], section: Mapping[str, Any], base: Any) -> Scheme:
    return scheme("default", base=base)


def _read_linear(config: Mapping[str, Any], section: Mapping[str, Any], base: Any) -> Scheme:
    return scheme("pi", base=base, factor=_needed(section, "factor"))


def _read_dynamic(config: Mapping[str, Any], section: Mapping[str, Any], base: Any) -> Scheme:
    return scheme(
        "dynamic_ntk",
        base=base,
        factor=_needed(section, "factor"),
        pretrained_window=_needed(config, "max_position_embeddings"),
    )


def _read_yarn(config: Mapping[str, Any], section: Mapping[str, Any], base: Any) -> Scheme:
    window = _number("original_max_position_embeddings", _window(config, section))
    factor = section.get("factor")
    if factor is None:
        factor = _number("max_position_embeddings", _needed(config, "max_position_embeddings")) / window
    shared = {
        "base": base,
        "factor": factor,
        "pretrained_window": window,
        # transformers takes 0 for "not set" here.
        "beta_fast": section.get("beta_fast") or 32.0,
        "beta_slow": section.get("beta_slow") or 1.0,
        # And null for false.
        "truncate": section.get("truncate", True) or False,
    }
    attention_factor = section.get("attention_factor")
    mscale, mscale_all_dim = section.get("mscale"), section.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all_dim:
        growth = 0.1 * math.log(max(_number("factor", factor), 1.0))
        attention_factor = (_number("mscale", mscale) * growth + 1.0) / (
            _number("mscale_all_dim", mscale_all_dim) * growth + 1.0
        )
    if attention_factor == 1:
        return scheme("ntk_by_parts", **shared)
    return scheme("yarn", **shared, attention_factor=attention_factor)


def _read_llama3(config: Mapping[str, Any], section: Mapping[str, Any], base: Any) -> Scheme:
    return scheme(
        "llama3",
        base=base,
        factor=_needed(section, "factor"),
        low_freq_factor=_needed(section, "low_freq_factor"),
        high_freq_factor=_needed(section, "high_freq_factor"),
        pretrained_window=_window(config, section),
    )


_HF_READERS: Mapping[str, Callable[[Mapping[str, Any], Mapping[str, Any], Any], Scheme]] = MappingProxyType(
    {
        "default": _read_default,
        "linear": _read_linear,
        "dynamic": _read_dynamic,
        "yarn": _read_yarn,
        "llama3": _read_llama3,
    }
)

_HFKeys = tuple[dict[str, Any] | None, dict[str, Any]]


def _write_default(parameters: Mapping[str, Any], head_dim: int | None) -> _HFKeys:
    return {"rope_type": "default", "rope_theta": parameters["base"]}, {}


def _write_linear(parameters: Mapping[str, Any], head_dim: int | None) -> _HFKeys:
    return {"rope_type": "linear", "rope_theta": parameters["base"], "factor": parameters["factor"]}, {}


def _write_ntk(parameters: Mapping[str, Any], head_dim: int | None) -> _HFKeys:
    if head_dim is None:
        return None, {}
    base = frequency_rules.ntk_base(head_dim, parameters["base"], parameters["factor"])
    return {"rope_type": "default", "rope_theta": base}, {}


def _write_dynamic(parameters: Mapping[str, Any], head_dim: int | None) -> _HFKeys:
    section = {"rope_type": "dynamic", "rope_theta": parameters["base"], "factor": parameters["factor"]}
    return section, {"max_position_embeddings": parameters["pretrained_window"]}


def _write_yarn(parameters: Mapping[str, Any], head_dim: int | None) -> _HFKeys:
    section = {
        "rope_type": "yarn",
        "rope_theta": parameters["base"],
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


def _write_llama3(parameters: Mapping[str, Any], head_dim: int | None) -> _HFKeys:
    return {
        "rope_type": "llama3",
        "rope_theta": parameters["base"],
        "factor": parameters["factor"],
        "low_freq_factor": parameters["low_freq_factor"],
        "high_freq_factor": parameters["high_freq_factor"],
        "original_max_position_embeddings": parameters["pretrained_window"],
    }, {}


_HF_WRITERS: Mapping[Callable[..., Any], Callable[[Mapping[str, Any], int | None], _HFKeys]] = MappingProxyType(
    {
        frequency_rules.default: _write_default,
        frequency_rules.pi: _write_linear,
        frequency_rules.ntk: _write_ntk,
        frequency_rules.dynamic_ntk: _write_dynamic,
        frequency_rules.yarn: _write_yarn,
        frequency_rules.llama3: _write_llama3,
    }
)
