"""The command lines of the scripts in `convert/`; tests/interop tests their results."""

import sys

import pytest

from eabf_jax import cli
from eabf_jax.commands import CONVERSIONS


@pytest.mark.parametrize("name", list(CONVERSIONS))
def test_every_script_has_a_help_and_tells_of_bad_input_in_one_line(name, monkeypatch, capsys, tmp_path):
    def script(*arguments):
        monkeypatch.setattr(sys, "argv", [f"convert/{name}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.convert(name)
        return stop.value.code, capsys.readouterr()

    code, shown = script("--help")
    assert code == 0 and f"usage: {name}.py" in shown.out and CONVERSIONS[name] in shown.out
    assert all(option in shown.out for option in ("--src", "--dst", "--overwrite"))
    code, shown = script("--src", str(tmp_path / "none"), "--dst", str(tmp_path / "made"))
    assert code == 2 and shown.err.startswith("error: ") and shown.err.count("\n") == 1
    code, shown = script("--src", "a", "--dst", "b", "--over")
    assert code == 2 and "error: a" in shown.err  # `--over` is short for --overwrite
    code, shown = script("--dst", "b")
    assert (code, shown.err) == (
        2,
        f"error: the following arguments are required: --src; `{name}.py --help` lists the options\n",
    )
