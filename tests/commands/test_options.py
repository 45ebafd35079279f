"""Output files that cannot be written are refused before any work."""

import argparse

import pytest

from eabf_jax.commands.options import check_outputs, check_positive, write_figures
from eabf_jax.errors import InputError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json": "."}, "--json . is a directory"),
        ({"json": "no/x.json"}, "no directory no"),
        ({"json": "README.md"}, "README.md exists and does not hold"),
        ({"figure": "x.doc"}, "expected one of .png"),
    ],
)
def test_files_that_cannot_be_written(options, message):
    with pytest.raises(InputError, match=message):
        check_outputs(argparse.Namespace(**options))


def test_figures_of_an_earlier_call_are_replaced(tmp_path, capsys):
    arguments = argparse.Namespace(json=str(tmp_path / "figures.json"), figure=None, samples=0)
    for number in range(2):
        check_outputs(arguments)
        write_figures(arguments, {"a": number})
    assert capsys.readouterr().out == f"figures: {arguments.json}\n" * 2
    assert (tmp_path / "figures.json").read_text() == '{\n  "a": 1\n}\n'
    write_figures(argparse.Namespace(json=None), {})
    with pytest.raises(InputError, match="--samples 0: a positive number is needed"):
        check_positive(arguments, ("figure", "samples"))
