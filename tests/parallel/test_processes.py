"""How processes find each other; tests/training/test_multiprocess.py runs several."""

import jax
import pytest

from eabf_jax.errors import InputError
from eabf_jax.parallel.processes import all_or_none, connected, gathered

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Records the calls of `jax.distributed.initialize`; without arguments, it finds no cluster here."""
    made: list[tuple[object, ...]] = []

    def initialize(*arguments: object) -> None:
        made.append(arguments)
        if not arguments:
            raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return made


def test_the_environment_tells_who_the_others_are(
    calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(NAMES, ("10.0.0.1:1234", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    with connected():
        assert calls == [("10.0.0.1:1234", 4, 3)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((None, None, None), "but the other processes are unknown: set JAX_COORDINATOR_ADDRESS"),
        (("a:1", None, "0"), "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID set, but not JAX_NUM_PROCESSES"),
        (("a:1", "two", "0"), "JAX_NUM_PROCESSES=two, JAX_PROCESS_ID=0: HOST:PORT and two numbers are needed"),
        (("a:1", "2", "2"), "JAX_PROCESS_ID is 2; of 2 processes .* it is one of 0 to 1"),
    ],
)
def test_an_environment_that_does_not_is_one_line(
    calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, values: tuple[str | None, ...], message: str
) -> None:
    for name, value in zip(NAMES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as error, connected():
        pass
    assert "\n" not in str(error.value)
    assert calls in ([], [()])


def test_one_process_agrees_with_itself() -> None:
    assert gathered(7) == [7]
    with pytest.raises(InputError, match="mine"), all_or_none():
        raise InputError("mine")


def test_others_do_not_wait_for_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eabf_jax.parallel.processes.gathered", lambda failed: [failed, 1, 0, 1])
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(InputError, match="process 0 stops because 1, 3 of 4 cannot start, and say why"), all_or_none():
        pass
    with pytest.raises(InputError, match="mine"), all_or_none():
        raise InputError("mine")
