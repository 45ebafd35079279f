"""A figure is stale if the measured code has changed, but not if only a comment has."""

import sys

import pytest


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("provenance")


def test_a_digest_is_of_code_alone(program, tmp_path):
    def digest(text):
        (tmp_path / "code.py").write_text(text)
        return program.digest(tmp_path / "code.py")

    plain = digest("def scale(x):\n    return 2 * x\n")
    told = digest('"""A module."""\n\n\ndef scale(x):\n    """Doubles."""\n    # twice\n    return (2 * x)\n')
    assert plain == told
    assert len({plain, digest("def scale(x):\n    return 3 * x\n"), digest("def scale(x):\n    return x * 2\n")}) == 3
    # The digest is the same in every release of Python; this one was computed with 3.11, 3.12 and 3.13.
    assert digest('def told(x: int = 2) -> str:\n    return f"{x:.2f} of {x!r}"\n') == "439589c77c5066d2"
    assert program.digest(tmp_path / "none.py") is None


def test_changed_files_are_named(program, monkeypatch, tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program, "MEASURED", {"some": ("a.py", "b.py")})
    report = program.record("some")
    assert program.changed(report) == []
    (tmp_path / "b.py").write_text("x = 2\n")
    assert program.changed(report) == ["b.py"]
    (tmp_path / "a.py").unlink()
    assert program.changed(report) == ["a.py", "b.py"]
    assert program.changed({"benchmark": "some"}) is None
    # Sharding matters only on several devices.
    shared = {"sources": {program.SHARING + "rules.py": "0" * 16}}
    assert program.changed({**shared, "devices": 1}) == []
    assert program.changed({**shared, "devices": 2}) == [program.SHARING + "rules.py"]


def test_the_origin_of_a_figure_is_recorded(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "--json", "out file.json"])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("BENCHMARK_COMMIT", "0123abc")
    report = program.record("train_step")
    assert report["command"] == "python benchmarks/some.py --json 'out file.json'"
    assert report["environment"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert report["commit"] == "0123abc"
    assert {"python", "jax", "flax"} <= report["versions"].keys()


@pytest.mark.parametrize("name", ["train_step", "generate"])
def test_measured_files_exist(program, name):
    assert [file for file in program.MEASURED[name] if not (program.ROOT / file).is_file()] == []
