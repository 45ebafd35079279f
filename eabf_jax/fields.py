"""Type checks for mappings from YAML, JSON or keyword arguments.

type                takes
`int`               a whole number, also written as 32.0
`float`             a finite number, whole ones included
`bool`              true or false, which are not numbers
`str`               text
`X | None`          null too
`Literal`           one of its words
`tuple[X, ...]`     a list of such values
`dict`, `Any`       a mapping of any keys; anything
a dataclass         a mapping of its fields
a ChoiceRegistry    (draccus's) a mapping of `type` and the fields of the dataclass that has this name
another class       an instance, or a mapping if the class has `from_dict`

Text is not accepted as a number, except a number that YAML 1.1 reads as text, such as 2e-5 (it requires 2.0e-5).

No installed library has these rules. `draccus.decode` turns true into 1 and 3 into text, and accepts null for any type.
pydantic, which is not a dependency, turns true and text into numbers; its strict mode refuses 32.0 and 2e-5.
`huggingface_hub.dataclasses.strict` refuses 1 for a float and accepts NaN. None of them suggests the nearest key.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.reading import parse_yaml

T = TypeVar("T")

_NUMBER_AS_TEXT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_NAMES: Mapping[Any, str] = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    NoneType: "null",
    tuple[str, ...]: "a list of names",
    tuple[int, ...]: "a list of integers",
    tuple[float, ...]: "a list of finite numbers",
}
_UNIONS = (Union, UnionType)
_UNFIT = object()


class Text(str):
    """A value from the command line, parsed as YAML unless its type is text."""


def check(
    values: Any, types: Mapping[str, Any], subject: str, prefix: str = "", required: Collection[str] = ()
) -> dict[str, Any]:
    """Checks a mapping against a table of types.

    Args:
      types: the type of each allowed key.
      subject: what messages call a key, such as "configuration key".
      prefix: the path of the mapping itself, such as "recipe.".
      required: the keys that must be present.

    Returns:
      The given values, each converted to exactly its type.

    Raises:
      InputError: not a mapping, an unknown or missing key, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{subject} '{prefix[:-1]}' is {values!r:.80}; a mapping of keys is needed")
    for key in values:
        if key not in types:
            raise unknown_name(subject, f"{prefix}{key}", [f"{prefix}{name}" for name in types])
    for key in required:
        if key not in values:
            raise InputError(f"{subject} '{prefix}{key}' is missing; {_needed(types[key])} is needed")
    return {key: typed(types[key], value, subject, f"{prefix}{key}") for key, value in values.items()}


def build(kind: type[T], values: Any, subject: str, prefix: str = "") -> T:
    """Builds a dataclass from a mapping of its fields.

    Args:
      kind: a dataclass, or a `draccus.ChoiceRegistry` of dataclasses.
      values: the mapping; missing fields get their defaults.
      subject, prefix: as for `check`.

    Raises:
      InputError: as for `check`, or as raised by the dataclass itself.
    """
    chosen: Any = kind
    choice: dict[str, Any] = {}
    if isinstance(values, Mapping) and hasattr(chosen, "get_known_choices"):
        choice = {"type": Literal[tuple(sorted(chosen.get_known_choices()))]}
        told = {key: value for key, value in values.items() if key in choice}
        try:
            # A registry may raise its own error for an unknown name.
            chosen = chosen.get_choice_class(told["type"] if isinstance(told["type"], str) else None)
        except KeyError:
            check(told, choice, subject, prefix, required=choice)
    required = [
        field.name
        for field in dataclasses.fields(chosen)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    found = check(values, types_of(chosen) | choice, subject, prefix, required)
    return chosen(**{key: value for key, value in found.items() if key not in choice})


def types_of(kind: Any) -> dict[str, Any]:
    """Returns the type of each field of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def typed(kind: Any, value: Any, subject: str, key: str) -> Any:
    """Checks the value at the path `key` and returns it in exactly the type `kind`; see `check`."""
    if isinstance(value, Text):
        value = str(value)
        if kind is Any or value in ("null", "~") or _fitting(kind, value, subject, key) is _UNFIT:
            value = _from_yaml(value)
    if (found := _fitting(kind, value, subject, key)) is not _UNFIT:
        return found
    if get_origin(kind) is Literal:
        raise unknown_name(f"value of '{key}'", str(value), get_args(kind))
    unquoted = _from_yaml(value) if isinstance(value, str) else None
    is_scalar = isinstance(unquoted, bool | int | float)
    hint = ", without quotes" if is_scalar and _fitting(kind, unquoted, subject, key) is not _UNFIT else ""
    raise InputError(f"{subject} '{key}' is {value!r:.80}; {_needed(kind)} is needed{hint}")


def _fitting(kind: Any, value: Any, subject: str, key: str) -> Any:
    """Returns the value in this type, or `_UNFIT`."""
    origin = get_origin(kind) or kind
    if origin in _UNIONS:
        fitting = (_fitting(one, value, subject, key) for one in get_args(kind))
        return next((found for found in fitting if found is not _UNFIT), _UNFIT)
    if origin in (int, float):
        number = _number(value)
        return _UNFIT if number is None or (origin is int and number != number // 1) else origin(number)
    if origin is tuple and isinstance(value, list | tuple):
        items = tuple(_fitting(get_args(kind)[0], item, subject, key) for item in value)
        return _UNFIT if _UNFIT in items else items
    if isinstance(value, Mapping):
        if origin is dict or origin is Any:
            return {name: typed(Any, item, subject, f"{key}.{name}") for name, item in value.items()}
        if hasattr(origin, "from_dict"):
            return origin.from_dict(value)
        is_section = dataclasses.is_dataclass(origin) or hasattr(origin, "get_known_choices")
        return build(origin, value, subject, f"{key}.") if is_section else _UNFIT
    fits = value in get_args(kind) if origin is Literal else origin is Any or isinstance(value, origin)
    return value if fits else _UNFIT


def _number(value: Any) -> int | float | None:
    """Returns a finite number, or None for anything else."""
    if isinstance(value, str) and _NUMBER_AS_TEXT.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return None
    return (int(value) if isinstance(value, numbers.Integral) else float(value)) if finite else None


def _from_yaml(text: str) -> Any:
    try:
        return parse_yaml(text, "the value")
    except InputError:
        return text


def _needed(kind: Any) -> str:
    """Describes in words what a type accepts."""
    arguments, origin = get_args(kind), get_origin(kind)
    if origin in _UNIONS:
        return " or ".join(map(_needed, arguments))
    if origin is Literal:
        return arguments[0] if len(arguments) == 1 else f"one of {', '.join(arguments)}"
    return _NAMES.get(kind) or _NAMES.get(origin) or "a mapping of keys"
