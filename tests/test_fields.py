"""The one parser of typed mappings: what each type accepts, and that every reader uses it."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import draccus
import numpy as np
import pytest
import yaml

from eabf_jax.errors import InputError
from eabf_jax.fields import Text, build, check, typed
from eabf_jax.interop.adapter import read_adapter
from eabf_jax.interop.huggingface import config_from_hf
from eabf_jax.interop.native import read_model_json
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.lora import Lora
from eabf_jax.rope import scheme
from eabf_jax.training.recipe import load_config

IDS = int | tuple[int, ...] | None


class REFUSED:
    """Marks an expected refusal in place of a value."""


@dataclasses.dataclass
class Section:
    rate: float
    steps: int | None = None


class Shape(draccus.ChoiceRegistry):
    pass


@Shape.register_subclass("circle")
@dataclasses.dataclass
class Circle(Shape):
    radius: float


class Word:
    def __init__(self, word: str):
        self.word = word

    @classmethod
    def from_dict(cls, values: dict[str, str]) -> "Word":
        return cls(**values)


TYPES: dict[Any, list[tuple[Any, Any]]] = {
    int: [
        *((3, 3), (32.0, 32), (np.int32(3), 3), (np.float32(32), 32), ("1e2", 100), (2**70, 2**70)),
        *((value, REFUSED) for value in (True, 32.5, "3", None, math.nan, math.inf, [3], {}, "2.5e0", 10**400)),
    ],
    float: [
        *((0.5, 0.5), (1, 1.0), (np.float32(0.5), 0.5), ("2e-5", 2e-5), ("-1.5E+3", -1500.0), (".5e1", 5.0)),
        *((value, REFUSED) for value in (True, "0.5", "nan", "1e999", None, math.nan, -math.inf, [0.5], 10**400)),
    ],
    bool: [(True, True), (False, False), *((value, REFUSED) for value in (0, 1.0, "true", None, [True]))],
    str: [("x", "x"), ("1e5", "1e5"), ("", ""), *((value, REFUSED) for value in (3, True, None, ["x"]))],
    int | None: [(None, None), (3, 3), *((value, REFUSED) for value in (True, "null", 0.5))],
    IDS: [
        *((2, 2), ([2, 3.0], (2, 3)), ((2,), (2,)), ([], ()), (None, None)),
        *((value, REFUSED) for value in (True, [2, True], [2, None], ["2"], "2", {2: 3})),
    ],
    tuple[float, ...]: [
        *(([1, 2.5], (1.0, 2.5)), ((), ()), (("2e-5",), (2e-5,))),
        *((value, REFUSED) for value in (1.5, [math.nan], [True], ["1"], None)),
    ],
    tuple[str, ...]: [(["a", "b"], ("a", "b")), *((value, REFUSED) for value in ("a", ["a", 1], None))],
    Literal["on", "auto"]: [("on", "on"), *((value, REFUSED) for value in ("off", True, None, ["on"]))],
    int | Literal["auto"]: [("auto", "auto"), (3, 3), *((value, REFUSED) for value in ("auot", False))],
    dict[str, Any] | None: [({"a": {"b": "1"}}, {"a": {"b": "1"}}), (None, None), ([1], REFUSED), ("a", REFUSED)],
    Section | Literal["auto"]: [
        *(({"rate": 1}, Section(1.0)), ("auto", "auto"), ({"rate": 1, "steps": 2.0}, Section(1.0, 2))),
        *((value, REFUSED) for value in ({"rate": True}, {}, {"rat": 1}, {"rate": 1, 2: 3}, [1], None)),
    ],
    Shape: [
        ({"type": "circle", "radius": 2}, Circle(2.0)),
        *((value, REFUSED) for value in ({"type": "circel", "radius": 2}, {"radius": 2}, {"type": "circle"}, "circle")),
    ],
}


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [(kind, *case) for kind, cases in TYPES.items() for case in cases],
    ids=lambda value: "refused" if value is REFUSED else f"{value!r:.40}".replace(f"{__name__}.", ""),
)
def test_what_each_type_takes(kind: Any, value: Any, expected: Any) -> None:
    if expected is REFUSED:
        with pytest.raises(InputError) as error:
            typed(kind, value, "key", "k")
        assert "\n" not in str(error.value)
    else:
        found = typed(kind, value, "key", "k")
        assert found == expected and type(found) is type(expected)


def test_a_class_may_read_itself() -> None:
    ready = Word("ready")
    assert typed(Word, ready, "key", "k") is ready
    assert typed(Word | None, {"word": "read"}, "key", "k").word == "read"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        *(
            (int, "3", 3),
            (int | None, "null", None),
            (str | None, "~", None),
            (str, "2024", "2024"),
            (float, "2e-5", 2e-5),
        ),
        *((bool, "no", False), (Literal["no", "yes"], "no", "no"), (tuple[str, ...], "[a, b]", ("a", "b"))),
        *(
            (dict, "{a: 1}", {"a": 1}),
            (Section, "{rate: 2}", Section(2.0)),
            (Any, "2", 2),
            (str, "1999-99-99", "1999-99-99"),
        ),
        *((kind, text, REFUSED) for kind, text in ((int, "long"), (int, "[3"), (str, "null"), (int, "1999-99-99"))),
    ],
    ids=str,
)
def test_the_command_line_is_yaml_unless_text_is_wanted(kind: Any, text: str, expected: Any) -> None:
    if expected is REFUSED:
        with pytest.raises(InputError):
            typed(kind, Text(text), "key", "k")
    else:
        found = typed(kind, Text(text), "key", "k")
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": "fast"}, "configuration key 'recipe.rate' is 'fast'; a finite number is needed"),
        ({"rate": "0.5"}, "configuration key 'recipe.rate' is '0.5'; a finite number is needed, without quotes"),
        ({"rate": 1, "steps": 0.5}, "configuration key 'recipe.steps' is 0.5; an integer or null is needed"),
        ({"steps": 1}, "configuration key 'recipe.rate' is missing; a finite number is needed"),
        ({"raet": 1}, "unknown configuration key 'recipe.raet': did you mean 'recipe.rate'? known: recipe.rate, rec"),
        ([1], "configuration key 'recipe' is [1]; a mapping of keys is needed"),
    ],
)
def test_messages_name_the_key_the_value_and_what_would_be_right(values: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        build(Section, values, "configuration key", "recipe.")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "circel"}, "unknown value of 'type' 'circel': did you mean 'circle'? known: circle"),
        ({"typ": "circle"}, "key 'type' is missing; circle is needed"),
        ({"type": "circle", "radios": 2}, "unknown key 'radios': did you mean 'radius'? known: radius, type"),
    ],
)
def test_the_type_of_a_choice_is_named(values: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        build(Shape, values, "key")
    assert str(error.value) == message


def test_a_table_without_a_dataclass() -> None:
    assert check({"a": 2.0}, {"a": int, "b": str}, "key", required=["a"]) == {"a": 2}
    with pytest.raises(InputError, match="key 'b' is missing; text is needed"):
        check({"a": 2.0}, {"a": int, "b": str}, "key", required=["b"])


SIZES = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), 8) | dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"), 2
)
ADAPTER = {**dataclasses.asdict(Lora()), "base": "here", "base_digest": "0"}


def from_recipe(folder: Path, changes: dict[str, Any]) -> object:
    values = {"output": "x", "window": 64, "rope": {"type": "yarn", "factor": 2.0, "pretrained_window": 32}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**values, "lora": changes}))
    return load_config(["--config_path", str(folder / "run.yaml")]).lora


def from_model_json(read: Callable[[Path], object], **values: Any) -> Callable[[Path, dict[str, Any]], object]:
    def reader(folder: Path, changes: dict[str, Any]) -> object:
        inner = {"adapter": {**ADAPTER, **changes}} if read is read_adapter else changes
        (folder / "model.json").write_text(json.dumps({**values, **inner}))
        return read(folder)

    return reader


# Readers, each with a key for an integer, a number and a switch.
READERS: dict[str, tuple[Callable[[Path, dict[str, Any]], object], tuple[str, str, str]]] = {
    "recipe": (from_recipe, ("rank", "alpha", "train_norms")),
    "config": (
        lambda _, changes: LlamaConfig.from_fields({**SIZES, **changes}),
        ("vocab_size", "rms_norm_eps", "mlp_bias"),
    ),
    "native": (
        from_model_json(read_model_json, **SIZES, rope={"type": "abf"}),
        ("vocab_size", "rms_norm_eps", "mlp_bias"),
    ),
    "huggingface": (
        lambda _, changes: config_from_hf({"model_type": "llama", **SIZES, **changes}),
        ("vocab_size", "rms_norm_eps", "mlp_bias"),
    ),
    "schemes": (
        lambda _, changes: scheme("yarn", **{"factor": 2.0, "pretrained_window": 32, **changes}),
        ("pretrained_window", "factor", "truncate"),
    ),
    "adapter": (from_model_json(read_adapter), ("rank", "alpha", "train_norms")),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_takes_the_same(name: str, tmp_path: Path) -> None:
    read, (integer, number, switch) = READERS[name]
    assert read(tmp_path, {integer: 16.0, number: "2e0", switch: True}) == read(
        tmp_path, {integer: 16, number: 2, switch: True}
    )
    for key, values in {
        integer: (True, 16.5, "16", None, math.nan, [16]),
        number: (True, "2.0", None, math.nan, math.inf, [2.0]),
        switch: (0, 1.0, "true", [True]),
    }.items():
        for value in values:
            with pytest.raises(
                InputError, match=rf"{key}' is .*; (an integer|a finite number|true or false) is needed"
            ):
                read(tmp_path, {key: value})
