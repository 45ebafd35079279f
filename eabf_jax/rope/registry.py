"""The table of rotary schemes: those of this package, of installed packages, and of a user's own file.

A scheme is one or two functions and a call of `register`. An installed package names the module with that call as an
entry point of the group `eabf_jax.schemes`; a file is imported with `--import FILE` or `import_schemes`.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, get_type_hints

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.rope import frequencies as frequency_rules
from eabf_jax.rope import logit_scale as logit_rules

ENTRY_POINTS = "eabf_jax.schemes"
PARAMETER_TYPES = (float, int, bool, float | None, tuple[float, ...])


class HFSpelling(NamedTuple):
    """How transformers spells a scheme without a multiplier in config.json.

    Attributes:
      rope_type: the kind of scaling.
      write: (parameters, head size or None) -> the other keys of the section and the keys outside it; None if
        transformers cannot express the scheme.
      read: (whole config, section) -> the parameters without the base; None if another scheme reads this kind.
    """

    rope_type: str
    write: Callable[[Mapping[str, Any], int | None], tuple[dict[str, Any], dict[str, Any]] | None]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Entry:
    """The two rules of a scheme, the parameters that its name changes or fixes, and its spelling elsewhere."""

    frequencies: Callable[..., Any]
    logit_scale: Callable[..., Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    hf: HFSpelling | None = None

    @property
    def parameters(self) -> dict[str, tuple[Any, Any]]:
        """Type and default of each parameter that the name takes."""
        described = parameters_of_rule(self.frequencies) | parameters_of_rule(self.logit_scale)
        return {
            name: (kind, self.defaults.get(name, default))
            for name, (kind, default) in described.items()
            if name not in self.fixed
        }


_entries: dict[str, Entry] = {}

# Multipliers that a composition can name, in addition to the schemes that have one.
_MULTIPLIERS = {
    rule.__name__: Entry(frequency_rules.default, rule)
    for rule in (
        *(logit_rules.none, logit_rules.entropy_aware),
        *(logit_rules.smooth_temperature, logit_rules.layer_temperature, logit_rules.llama4_temperature),
        logit_rules.ssmax,
    )
} | {"logn": Entry(frequency_rules.default, logit_rules.entropy_aware, fixed={"unscaled_layers": 0})}


def register(
    name: str,
    frequencies: Callable[..., Any] = frequency_rules.default,
    logit_scale: Callable[..., Any] = logit_rules.none,
    *,
    defaults: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
    hf: HFSpelling | None = None,
) -> None:
    """Adds a rotary scheme to the table, so that configuration files and commands know it by name.

    Args:
      name: the scheme's `type`, an identifier.
      frequencies: `(head_dim, *, parameters)`, or `(head_dim, length, *, parameters)` if the frequencies follow the
        current length; returns inverse frequencies [head_dim // 2] in radians per token, and the factor on cos and
        sin. With `length`, a parameter `pretrained_window` is needed: the result must be the same for None and for all
        lengths up to that window. `length` may be a traced integer.
      logit_scale: `(positions, layer, *, parameters)`; returns the multiplier of each query, of the shape of positions
        (0-based). Both arguments may be traced.
      defaults: defaults in place of those in the signatures.
      fixed: parameters that users cannot set.
      hf: how transformers spells the scheme, if it has it.

    Raises:
      InputError: a name that is taken or not an identifier, or a function with another signature.
    """
    entry = Entry(frequencies, logit_scale, dict(defaults or {}), dict(fixed or {}), hf)
    if _entries.get(name, entry) != entry or name in (*_MULTIPLIERS, "compose"):
        taken = _entries.get(name)
        by = f" by {_place(taken.frequencies)} and {_place(taken.logit_scale)}" if taken else ""
        raise InputError(f"the rotary scheme {name!r} is there already{by}; register yours under another name")
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"rotary scheme {name!r}: the name must be an identifier such as my_scheme")
    _check_rule(name, frequencies, ("head_dim", "length"), optional=1)
    _check_rule(name, logit_scale, ("positions", "layer"), optional=0)
    of_frequencies, of_multiplier = parameters_of_rule(frequencies), parameters_of_rule(logit_scale)
    for parameter in of_frequencies.keys() & of_multiplier.keys():
        if of_frequencies[parameter] != of_multiplier[parameter]:
            raise InputError(f"rotary scheme {name!r}: its functions disagree on the type or default of {parameter!r}")
    for parameter in (*entry.defaults, *entry.fixed):
        if parameter not in of_frequencies | of_multiplier:
            raise InputError(f"rotary scheme {name!r}: neither of its functions takes {parameter!r}")
    if hf is not None and hf.read is not None and hf.rope_type in hf_readers().keys() - {name}:
        raise InputError(f"rotary scheme {name!r}: rope_type {hf.rope_type!r} is read as another scheme already")
    _entries[name] = entry


def entry_of(name: str) -> Entry:
    """Looks up a scheme; imports installed packages with schemes only if the name is unknown without them.

    Raises:
      InputError: unknown scheme, or as for `entries`.
    """
    if name not in _entries and name not in entries():
        raise unknown_scheme(name)
    return _entries[name]


def unknown_scheme(name: str) -> InputError:
    """Builds the error for an unknown scheme."""
    unknown = unknown_name("rotary scheme", name, [*_entries, "compose"])
    return InputError(f"{unknown}; one from your own file is known after --import FILE")


def entries() -> Mapping[str, Entry]:
    """Returns the table, with the schemes of installed packages.

    Raises:
      InputError: such a package cannot be imported.
    """
    _import_installed()
    return MappingProxyType(_entries)


def multipliers() -> dict[str, Entry]:
    """Returns the table for the multiplier of a composition: schemes that have one, and plain multipliers."""
    own = {name: entry for name, entry in entries().items() if entry.logit_scale is not logit_rules.none}
    return {**_MULTIPLIERS, **own}


def hf_readers() -> dict[str, str]:
    """Returns the name of the scheme that reads each kind of scaling in a config.json."""
    return {e.hf.rope_type: name for name, e in _entries.items() if e.hf is not None and e.hf.read is not None}


def import_schemes(source: str) -> None:
    """Imports a module that registers schemes.

    Args:
      source: the path of a .py file, or the name of a module, which may be in the working directory.

    Raises:
      InputError: the module does not exist, or raises an error.
    """
    path = Path(source).resolve()
    if path.suffix != ".py":
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        _import(f"--import {source}", lambda: importlib.import_module(source))
    elif str(path) not in (getattr(module, "__file__", None) for module in [*sys.modules.values()]):
        _import(f"--import {source}", lambda: _import_file(path))


def _import_file(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"_imported_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # as for every .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickle looks for its functions
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise


@cache
def _import_installed() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        _import(f"the installed package {point.dist.name if point.dist else point.value}", point.load)


def _import(source: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except Exception as error:  # a user's file may raise anything
        raise InputError(f"{source} cannot be imported: {type(error).__name__}: {error}") from error


@cache
def parameters_of_rule(rule: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Returns type and default (`dataclasses.MISSING` for none) of each parameter that a rule takes by keyword."""
    hints = get_type_hints(rule)
    return {
        parameter.name: (
            hints.get(parameter.name),
            MISSING if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(rule).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def follows_length(rule: Callable[..., Any]) -> bool:
    """Returns whether a frequency rule takes the current length."""
    return "length" in inspect.signature(rule).parameters


def _check_rule(name: str, rule: Callable[..., Any], arguments: tuple[str, ...], *, optional: int) -> None:
    owner = f"rotary scheme {name!r}: {_place(rule)}"
    try:
        found = inspect.signature(rule).parameters.values()
        parameters = parameters_of_rule(rule)
    except (TypeError, ValueError, NameError) as error:
        raise InputError(f"{owner} is no function whose signature can be read ({error})") from error
    given = [p.name for p in found if p.kind is not p.KEYWORD_ONLY]
    allowed = [list(arguments[: len(arguments) - left_out]) for left_out in range(optional + 1)]
    if given not in allowed or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found):
        right = " or ".join(f"({', '.join(names)}, *, parameters)" for names in reversed(allowed))
        raise InputError(f"{owner} takes ({', '.join(map(str, found))}); {right} is needed")
    for parameter, (kind, _) in parameters.items():
        if kind not in PARAMETER_TYPES or parameter in ("type", "window"):
            kinds = ", ".join(known.__name__ if isinstance(known, type) else str(known) for known in PARAMETER_TYPES)
            raise InputError(
                f"{owner}: parameter {parameter!r} is of type {getattr(kind, '__name__', kind)}; a name other than "
                f"'type' and 'window', annotated with one of {kinds}, is needed"
            )
    if "length" in given and "pretrained_window" not in parameters:
        raise InputError(f"{owner} follows the length; a parameter 'pretrained_window: int' is needed beside it")


def _place(rule: Any) -> str:
    return f"{getattr(rule, '__module__', '?')}.{getattr(rule, '__qualname__', repr(rule))}"
