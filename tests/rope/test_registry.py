"""Schemes from a user's own file and from installed packages, and how bad ones are refused."""

import importlib.metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheme_cases import SHARP

from eabf_jax.errors import InputError
from eabf_jax.rope import HFSpelling, Scheme, compose, from_hf, import_schemes, register, registry, scheme, to_hf
from eabf_jax.rope import frequencies as frequency_rules


def theta(base: float) -> Any:
    return base ** (-2.0 * np.arange(8) / 16)


def test_a_file_of_a_users_own(user_schemes: Path) -> None:
    """The example of docs/schemes.md computes its formulas, here evaluated in float64."""
    with pytest.raises(InputError, match=r"unknown rotary scheme 'slow_half': .*is known after --import FILE"):
        scheme("slow_half", factor=4)
    import_schemes(str(user_schemes))
    import_schemes(str(user_schemes))  # importing it again registers nothing
    s = Scheme.from_dict(SHARP)
    expected = theta(20_000.0) / np.repeat([1.0, 4.0], 4)
    assert s.inverse_frequencies(16).dtype == jnp.float32
    np.testing.assert_allclose(s.inverse_frequencies(16), expected, rtol=2.0**-24)
    np.testing.assert_allclose(  # float32, one logarithm and two products
        jax.jit(s.logit_scale)(jnp.array([[3, 15, 63]]), 2), [[1, 1, 1 + 0.5 * 3 * np.log(4)]], rtol=1e-6
    )
    assert Scheme.from_dict(s.to_dict()) == s and s.to_dict() == SHARP
    assert scheme("slow_half", factor=4).to_dict() == {"type": "slow_half", "base": 10_000.0, "factor": 4.0}
    widening = scheme("widening", pretrained_window=16)
    # With a traced length, the power is exp(x) in float32; |x| is up to ln 40,000 = 10.6, off by 10.6 x 2^-24 = 6e-7.
    np.testing.assert_allclose(widening.inverse_frequencies(16, jnp.int32(64)), theta(40_000.0), rtol=1e-6)


def test_parts_of_a_users_scheme_compose(user_schemes: Path) -> None:
    import_schemes(str(user_schemes))
    sharp = Scheme.from_dict(SHARP)
    multiplier = {"type": "sharp_slow_half", "pretrained_window": 16, "strength": 0.5}
    composed = compose({"type": "pi", "factor": 2}, multiplier)
    assert composed == compose(scheme("pi", factor=2), sharp) and composed.to_dict()["logit_scale"] == multiplier
    # The frequencies of a scheme need no parameters of its multiplier.
    frequencies = compose({"type": "sharp_slow_half", "base": 20_000.0, "factor": 4})
    assert frequencies == scheme("slow_half", base=20_000.0, factor=4) and frequencies.name == "slow_half"
    for s in (composed, compose(sharp, scheme("eabf", pretrained_window=16)), compose(sharp, sharp)):
        assert Scheme.from_dict(s.to_dict()) == s == from_hf(to_hf(s))
    assert compose(sharp, sharp).name == "sharp_slow_half"


def test_a_spelling_of_a_users_own(user_schemes: Path) -> None:
    spelling = HFSpelling(
        "halved", lambda p, _: ({"by": p["factor"]}, {}), lambda _, section: {"factor": section["by"]}
    )
    register("my_pi", frequency_rules.pi, defaults={"factor": 8.0})
    import_schemes(str(user_schemes))
    slow_half = registry.entry_of("slow_half").frequencies
    register("spelled", slow_half, hf=spelling)
    keys = to_hf(scheme("spelled", factor=4))
    assert keys == {"rope_theta": 10_000.0, "rope_scaling": {"rope_type": "halved", "by": 4.0}}
    assert from_hf(keys) == scheme("slow_half", factor=4)
    assert to_hf(scheme("my_pi"))["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    with pytest.raises(InputError, match="rope_type 'linear' is read as another scheme already"):
        register("other", slow_half, hf=spelling._replace(rope_type="linear"))


def fine(head_dim, *, factor: float = 1.0):
    return np.ones(head_dim // 2), factor


def no_window(head_dim, length, *, factor: float = 1.0):
    return np.ones(head_dim // 2), 1.0


def positional(head_dim, factor: float = 1.0):
    return np.ones(head_dim // 2), 1.0


def without_type(head_dim, *, factor=1.0):
    return np.ones(head_dim // 2), 1.0


def of_text(head_dim, *, kind: str):
    return np.ones(head_dim // 2), 1.0


def of_anything(head_dim, **parameters):
    return np.ones(head_dim // 2), 1.0


def of_unknown_type(head_dim, *, factor: "Number"):  # type: ignore[name-defined]  # noqa: F821
    return np.ones(head_dim // 2), 1.0


def reserved(head_dim, *, window: int):
    return np.ones(head_dim // 2), 1.0


def whole_factor(positions, layer, *, factor: int = 1):
    return jnp.ones(positions.shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("yarn", fine), "'yarn' is there already by eabf_jax.rope.frequencies.yarn and .*none; register yours under"),
        (("compose", fine), "the rotary scheme 'compose' is there already"),
        (("entropy_aware", fine), "the rotary scheme 'entropy_aware' is there already"),
        (("my scheme", fine), "'my scheme': the name must be an identifier"),
        (("mine", no_window), "no_window follows the length; a parameter 'pretrained_window: int' is needed"),
        (("mine", positional), r"positional takes \(head_dim, factor: float = 1.0\); \(head_dim, \*, parameters\) or"),
        (("mine", of_anything), r"of_anything takes \(head_dim, \*\*parameters\); \(head_dim, \*, parameters\) or"),
        (("mine", fine, fine), r"fine takes \(head_dim, .*\); \(positions, layer, \*, parameters\) is needed"),
        (
            ("mine", without_type),
            "parameter 'factor' is of type None; .* bool, float . None, tuple.float, ...., is needed",
        ),
        (("mine", of_text), "parameter 'kind' is of type str"),
        (("mine", reserved), "parameter 'window' is of type int; a name other than 'type' and 'window'"),
        (("mine", of_unknown_type), "of_unknown_type is no function whose signature can be read"),
        (("mine", "pi"), "is no function whose signature can be read"),
        (("mine", fine, whole_factor), "its functions disagree on the type or default of 'factor'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_registrations_are_refused(user_schemes: Path, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        register(*arguments)
    assert "\n" not in str(caught.value) and "mine" not in registry.entries()


def test_defaults_and_fixed_values_are_for_parameters_that_are_there(user_schemes: Path) -> None:
    with pytest.raises(InputError, match="neither of its functions takes 'bass'"):
        register("mine", fine, defaults={"bass": 2.0})
    register("mine", fine, fixed={"factor": 2.0})
    assert scheme("mine").rotation_scale() == 2.0
    with pytest.raises(InputError, match="unknown rope 'mine' parameter 'factor'"):
        scheme("mine", factor=3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be imported: FileNotFoundError"),
        ("import not_a_module", "cannot be imported: ModuleNotFoundError: No module named 'not_a_module'"),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("from eabf_jax.rope import register\nregister('pi')", "'pi' is there already"),
    ],
    ids=str,
)
def test_bad_files_are_refused(user_schemes: Path, text: str | None, message: str) -> None:
    path = user_schemes.parent / "bad.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=rf"--import .*bad.py.*{message}") as caught:
        import_schemes(str(path))
    assert "\n" not in str(caught.value)


def test_a_module_is_found_in_the_working_directory(user_schemes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--import no\.such cannot be imported: ModuleNotFoundError"):
        import_schemes("no.such")
    monkeypatch.chdir(user_schemes.parent)
    monkeypatch.syspath_prepend("")  # restores the path afterwards
    import_schemes(user_schemes.stem)
    assert scheme("slow_half", factor=4).name == "slow_half"


def test_schemes_of_installed_packages(user_schemes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(user_schemes.parent))
    points = [importlib.metadata.EntryPoint("mine", user_schemes.stem, "eabf_jax.schemes")]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "eabf_jax.schemes" else [])
    registry._import_installed.cache_clear()
    assert scheme("slow_half", factor=4).name == "slow_half"
    points[:] = [importlib.metadata.EntryPoint("other", "not_a_module", "eabf_jax.schemes")]
    registry._import_installed.cache_clear()
    with pytest.raises(InputError, match="installed package not_a_module cannot be imported: ModuleNotFoundError"):
        registry.entries()
    registry._import_installed.cache_clear()
