"""Rotary schemes by name, and their composition.

A scheme is two independent choices: a frequency rule and a rule for the multiplier of the attention logits. The names,
types and defaults of a rule's parameters are read from its signature. `registry.py` holds the named pairs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.fields import check
from eabf_jax.rope import logit_scale as logit_rules
from eabf_jax.rope.frequencies import Frequencies, Length
from eabf_jax.rope.registry import Entry, entries, entry_of, follows_length, multipliers, parameters_of_rule

# Head sizes with which to compute the rotation scale, which is the same for every size.
_HEAD_DIMS = (128, *range(2, 513, 2))


@dataclass(frozen=True)
class Rule:
    """A rule for frequencies or for the multiplier, with its parameters bound.

    Attributes:
      function: the rule.
      parameters: pairs of name and value, in the order of the rule's signature.
    """

    function: Callable[..., Any]
    parameters: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments, **dict(self.parameters))

    def __str__(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"

    @property
    def is_ours(self) -> bool:
        """Whether the rule is one of this package."""
        return self.function.__module__.startswith("eabf_jax.")


# Requirements on parameters by name, the same in every rule.
_REQUIREMENTS: tuple[tuple[tuple[str, ...], Callable[..., bool], str], ...] = (
    (("base",), lambda base: base > 1, "base must be more than 1"),
    (("factor",), lambda factor: factor > 0, "factor must be more than 0"),
    (
        ("pretrained_window",),
        lambda window: 2 <= window < 2**31,
        "pretrained_window must be at least 2 tokens and less than 2^31",
    ),
    (("betas",), bool, "betas must have a number for each layer"),
    (("unscaled_layers",), lambda layers: layers >= 0, "unscaled_layers must be at least 0"),
    (("attention_factor",), lambda scale: scale is None or scale > 0, "attention_factor must be more than 0"),
    *(
        ((name,), lambda factors: bool(factors) and min(factors) > 0, f"{name} must be numbers above 0")
        for name in ("short_factor", "long_factor")
    ),
    (
        ("short_factor", "long_factor"),
        lambda short, long: len(short) == len(long),
        "short_factor and long_factor must have the same number of values",
    ),
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

    Build one with `scheme` or `compose`. Schemes are hashable, and equal if their rules and parameters are equal,
    whatever their names: `abf` equals `default` with the same base.

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
        return follows_length(self.frequencies.function)

    def inverse_frequencies(self, head_dim: int, length: Length = None) -> Frequencies:
        """Computes the inverse frequencies.

        Args:
          head_dim: size of an attention head, even (at least 4 for the NTK-aware schemes).
          length: current length in tokens for the schemes that follow it, otherwise not used; may be a traced integer,
            and mapped over with `jax.vmap`. None stands for a length within the pretrained window.

        Returns:
          Radians per token, float32 [head_dim // 2].

        Raises:
          InputError: head_dim does not suit the scheme, or a length that is not a whole number.
        """
        return self._rotation(head_dim, length)[0]

    def rotation_scale(self, length: Length = None) -> float | Float32[Array, ""]:
        """Computes the factor that multiplies cos and sin, 1.0 except for YaRN and LongRoPE.

        Args:
          length: as for `inverse_frequencies`.

        Returns:
          A float, or a float32 scalar if the scheme follows the length and the length is traced.

        Raises:
          InputError: a length that is not a whole number.
        """
        return self._rotation(_some_head_dim(self.frequencies), length)[1]

    def logit_scale(self, positions: Int[Array, " *shape"], layer: int | Int[Array, ""]) -> Float32[Array, " *shape"]:
        """Computes the multiplier of the attention logits of each query; it may be folded into the query (not the key).

        Args:
          positions: 0-based positions of the queries, integers of any shape.
          layer: 0-based layer index; may be a traced integer.

        Returns:
          Multipliers, float32, shape of `positions`; exactly 1 within the pretrained window, except for `ssmax`.

        Raises:
          InputError: positions or a layer that are not whole numbers, or a negative layer.
        """
        positions = positions if isinstance(positions, jax.Array) else np.asarray(positions)
        if not jnp.issubdtype(positions.dtype, jnp.integer):
            raise InputError(f"positions are {positions.dtype}; integers counted from 0 are needed")
        _check_whole("layer", layer)
        if not self.logit_multiplier.is_ours:
            _try_multiplier(self.logit_multiplier)
        return jnp.asarray(self.logit_multiplier(positions, layer), jnp.float32)

    def to_dict(self) -> dict[str, Any]:
        """Returns the scheme as plain values for config files, `{"type": name, parameter: value, ...}`.

        Optional parameters at None and switches at their default are absent.
        """
        if self.name == "compose":
            return {
                "type": "compose",
                "frequencies": _written(entries(), "frequencies", self.frequencies),
                "logit_scale": _written(multipliers(), "logit_scale", self.logit_multiplier),
            }
        bound = {**_told(self.frequencies), **_told(self.logit_multiplier)}
        fixed = entry_of(self.name).fixed
        return {"type": self.name} | {name: value for name, value in bound.items() if name not in fixed}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Scheme":
        """Builds a scheme from the mapping of `to_dict` or a config file; raises as `scheme` does."""
        name, parameters = _split_type(values, "rotary scheme")
        return scheme(name, **parameters)

    def __repr__(self) -> str:
        values = self.to_dict()
        arguments = "".join(f", {name}={value!r}" for name, value in values.items() if name != "type")
        return f"scheme({values['type']!r}{arguments})"

    def _rotation(self, head_dim: int, length: Length) -> tuple[Frequencies, float | Float32[Array, ""]]:
        if length is not None:
            _check_whole("length", length)
        if not self.frequencies.is_ours:
            _try_frequencies(self.frequencies, head_dim)
        frequencies, scale = self.frequencies(head_dim, *([length] if self.depends_on_length else []))
        return jnp.asarray(frequencies, jnp.float32), scale


@cache
def _try_frequencies(rule: Rule, head_dim: int) -> None:
    """Calls a user's rule as models will, before its first use, and refuses results that they cannot use."""
    with _trying(f"{rule} fails for head_dim {head_dim}"), jax.ensure_compile_time_eval():
        if follows_length(rule.function):
            jax.eval_shape(lambda length: rule(head_dim, length), jax.ShapeDtypeStruct((), jnp.int32))
            found = [rule(head_dim, length) for length in (None, 1, dict(rule.parameters)["pretrained_window"])]
        else:
            found = [rule(head_dim)]
        for frequencies, scale in found:
            if np.shape(frequencies) != (head_dim // 2,) or np.shape(scale) != ():
                raise InputError(
                    f"{rule} returns arrays of shape {np.shape(frequencies)} and {np.shape(scale)} for head_dim "
                    f"{head_dim}; inverse frequencies [{head_dim // 2}] and one factor on cos and sin are needed"
                )
            if not np.array_equal(frequencies, found[0][0]) or scale != found[0][1]:
                raise InputError(
                    f"{rule} changes with the length inside pretrained_window; from 1 token to the whole window, and "
                    "for the length None, it has to return the same"
                )


@cache
def _try_multiplier(rule: Rule) -> None:
    """Does the same as `_try_frequencies` for a multiplier rule."""
    with _trying(f"{rule} fails"):
        arguments = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 3), ()))
        found = jax.eval_shape(rule, *arguments)
        if np.shape(found) != (2, 3):
            raise InputError(f"{rule} returns shape {np.shape(found)} for positions of shape (2, 3), which is needed")


@contextmanager
def _trying(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a user's function may raise anything
        traced = " where JAX traces its arguments (write jnp.where for if)" * isinstance(error, jax.errors.JAXTypeError)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{what}{traced}: {reason:.300}") from error


@cache
def _some_head_dim(rule: Rule) -> int:
    """Returns a head size that a rule takes; LongRoPE's lists and a user's table are for one size only."""
    for head_dim in _HEAD_DIMS:
        with suppress(InputError):
            if rule.is_ours:
                rule(head_dim, *([None] if follows_length(rule.function) else []))
            else:
                _try_frequencies(rule, head_dim)
            return head_dim
    return _HEAD_DIMS[0]


def _check_whole(name: str, value: Any) -> None:
    """Refuses a value that is neither a whole number from 0 nor an array that is an integer scalar."""
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

    Raises:
      InputError: unknown scheme or parameter, missing parameter, value of a wrong type or out of range.
    """
    if name == "compose":
        return _compose_from(parameters)
    entry = entry_of(name)
    values = _checked(f"rope {name!r}", entry.parameters, parameters) | dict(entry.fixed)
    return Scheme(_bind(entry.frequencies, values), _bind(entry.logit_scale, values), name)


def compose(frequencies: Scheme | Mapping[str, Any], logit_scale: Scheme | Mapping[str, Any] | None = None) -> Scheme:
    """Builds a scheme from the frequencies of one and the logit multiplier of another.

    Args:
      frequencies: the scheme whose frequencies and rotation scale are taken, or that scheme as a dictionary.
      logit_scale: the scheme whose logit multiplier is taken; or a dictionary of a rule in `logit_scale.py` or of
        another scheme, with only the parameters of its multiplier. None or type "none" means no multiplier.

    Returns:
      The scheme, under the first name in the table with the same two rules, or else "compose".

    Raises:
      InputError: as for `scheme`.
    """
    rotation = frequencies.frequencies if isinstance(frequencies, Scheme) else _frequency_rule(frequencies)
    multiplier = logit_scale.logit_multiplier if isinstance(logit_scale, Scheme) else _logit_rule(logit_scale)
    return Scheme(rotation, multiplier, _name_of(rotation, multiplier))


def scheme_names() -> tuple[str, ...]:
    """Returns the names in the table, without "compose", whose parameters are schemes themselves."""
    return tuple(entries())


def parameters_of(name: str) -> Mapping[str, tuple[Any, Any]]:
    """Describes the parameters of a named scheme.

    Returns:
      For each parameter its type (one of `registry.PARAMETER_TYPES`) and its default, `dataclasses.MISSING` for none.

    Raises:
      InputError: unknown scheme.
    """
    return entry_of(name).parameters


def _told(rule: Rule) -> dict[str, Any]:
    """Returns a rule's parameters as plain values, without optional ones at None and switches at their default."""
    defaults = {name: default for name, (_, default) in parameters_of_rule(rule.function).items()}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in rule.parameters
        if value is not None and not (isinstance(value, bool) and value is defaults[name])
    }


def _written(table: Mapping[str, Entry], part: str, rule: Rule) -> dict[str, Any]:
    """Returns a rule as a dictionary, under the first name in the table whose `part` it is."""
    bound = dict(rule.parameters)
    named = ((name, entry) for name, entry in table.items() if getattr(entry, part) is rule.function)
    name, fixed = next((name, entry.fixed) for name, entry in named if _agrees(entry, bound))
    return {"type": name} | {parameter: value for parameter, value in _told(rule).items() if parameter not in fixed}


def _agrees(entry: Entry, bound: Mapping[str, Any]) -> bool:
    return all(bound[name] == value for name, value in entry.fixed.items() if name in bound)


def _bind(rule: Callable[..., Any], values: Mapping[str, Any]) -> Rule:
    return Rule(rule, tuple((name, values[name]) for name in parameters_of_rule(rule)))


def _checked(owner: str, expected: Mapping[str, tuple[Any, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    types = {name: kind for name, (kind, _) in expected.items()}
    defaults = {name: default for name, (_, default) in expected.items() if default is not MISSING}
    required = [name for name in types if name not in defaults]
    values = defaults | check(given, types, f"{owner} parameter", required=required)
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


def _frequency_rule(values: Mapping[str, Any]) -> Rule:
    name, parameters = _split_type(values, "rotary scheme")
    if name == "compose":
        return _compose_from(parameters).frequencies
    entry = entry_of(name)
    return _part(f"rope {name!r}", entry, entry.frequencies, parameters, also=parameters)


def _logit_rule(values: Mapping[str, Any] | None) -> Rule:
    if values is None:
        return Rule(logit_rules.none)
    name, parameters = _split_type(values, "logit scale")
    known = multipliers()
    if name not in known:
        raise unknown_name("logit scale", name, known)
    return _part(f"logit scale {name!r}", known[name], known[name].logit_scale, parameters)


def _part(
    owner: str, entry: Entry, rule: Callable[..., Any], given: Mapping[str, Any], also: Iterable[str] = ()
) -> Rule:
    """Binds one rule of a scheme to its parameters; parameters in `also` that it does not take are only checked."""
    own = {*parameters_of_rule(rule), *also}
    expected = {name: known for name, known in entry.parameters.items() if name in own}
    return _bind(rule, _checked(owner, expected, given) | dict(entry.fixed))


def _name_of(frequencies: Rule, logit_multiplier: Rule) -> str:
    rules = (frequencies.function, logit_multiplier.function)
    bound = dict(frequencies.parameters + logit_multiplier.parameters)
    for name, entry in entries().items():
        if (entry.frequencies, entry.logit_scale) == rules and _agrees(entry, bound):
            return name
    return "compose"
