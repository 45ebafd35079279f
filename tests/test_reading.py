"""Files from strangers: each kind of damage is one line that names the file, and ordinary files stay readable."""

import re
from pathlib import Path

import pytest

from eabf_jax.errors import InputError
from eabf_jax.reading import MAX_NESTING, parse_json, parse_yaml, read_json, read_text, reading

JSON = {
    "deep lists": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
    "one level too deep": ("[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1), "nested too deeply"),
    "digits": ("1" * 5000, "digits"),
    "an integer beyond every float": ("1" * 400, "bits"),
    "a lone surrogate": (r'{"a": ["\ud800"]}', "surrogates"),
    "a lone surrogate as a key": (r'{"\udfff": 1}', "surrogates"),
    "cut": ('{"a": ', "Expecting value"),
}


@pytest.mark.parametrize(("text", "message"), JSON.values(), ids=JSON)
def test_hostile_json_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: not valid JSON: .*{message}") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_json_at_the_limits_is_read() -> None:
    assert parse_json('{"model_max_length": 1000000000000000019884624838656, "a": "\\ud83d\\ude00"}', "x") == {
        "model_max_length": 10**30 + 19884624838656,
        "a": "\U0001f600",
    }
    value = parse_json("[" * MAX_NESTING + "]" * MAX_NESTING, "x")
    for _ in range(MAX_NESTING - 1):
        (value,) = value
    assert value == []


YAML = {
    "aliases that explode": (
        "a0: &a0 [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
        "100,000 values",
    ),
    "merge keys that explode": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
        "100,000 values",
    ),
    "an alias within its own value": ("a: &a [*a]", "contains it"),
    "deep lists": ("[" * 500 + "]" * 500, "nested too deeply"),
    "an object of Python": ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
    "a list as a key": ("? [1]\n: 2", "unhashable"),
    "an integer beyond every float": ("a: 0x" + "f" * 4000, "bits"),
    "a lone surrogate": ('a: "\\ud800"', "surrogates"),
    "a date": ("a: 2024-02-30", "day"),
    "two documents": ("a: 1\n---\nb: 2", "single document"),
}


@pytest.mark.parametrize(("text", "message"), YAML.values(), ids=YAML)
def test_hostile_yaml_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"file.yaml: not YAML: .*{message}") as caught:
        parse_yaml(text, "file.yaml")
    assert "\n" not in str(caught.value)


def test_ordinary_aliases_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]", "x") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }
    assert parse_yaml("", "x") is None


def test_text_that_is_not_utf_8_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="file: not valid UTF-8"):
        read_text(path)
    with pytest.raises(InputError, match="none: no such file"):
        read_text(tmp_path / "none")


@pytest.mark.parametrize("error", [KeyError("a"), MemoryError(), OverflowError("large"), OSError("odd"), Exception()])
def test_what_libraries_raise_is_one_line(error: Exception) -> None:
    with pytest.raises(InputError, match=r"file: not a model: .+") as caught, reading("file", "not a model"):
        raise error
    assert caught.value.__cause__ is error


def test_a_panic_of_rust_code_is_one_line() -> None:
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(InputError, match="file: not a model: index out of range"), reading("file", "not a model"):
        raise panic("index out of range")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), FileNotFoundError(2, "none", "name")])
def test_what_is_not_the_files_fault_passes(error: BaseException) -> None:
    with pytest.raises(type(error)), reading("file", "not a model"):
        raise error
