"""The origin that every report of `eabf evaluate` records."""

import pytest

from eabf_jax.commands.evaluate import measured_on


@pytest.mark.parametrize(
    ("program", "shown"), [("/venv/bin/eabf", "eabf"), ("/src/__main__.py", "eabf"), ("bench.py", "bench.py")]
)
def test_the_command_is_recorded_as_a_user_would_type_it(
    program: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, "evaluate", "--model", "a b=DIR"])
    assert measured_on()["command"] == f"{shown} evaluate --model 'a b=DIR'"
