import json

import pytest

from eabf_jax.data.chat import Turn
from eabf_jax.data.forms import FORMS, Passage, Unusable, find_form, holds_entries
from eabf_jax.errors import InputError

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
READ = [Turn("user", "q"), Turn("assistant", "a")]


def read(entry, wanted="auto"):
    return FORMS[find_form(entry, wanted)].read(entry)


def why(entry):
    with pytest.raises(Unusable) as caught:
        read(entry)
    return caught.value.reason


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [QUESTION, ANSWER], "text": "rendered", "prompt": "q"},
        {"items": [QUESTION, ANSWER], "conversations": None},
        [QUESTION, ANSWER],
        {"messages": json.dumps([QUESTION, ANSWER])},
        {"messages": [{**QUESTION, "speaker": "Alice", "value": ""}, {**ANSWER, "from": "gpt", "text": "a"}]},
        {"messages": [{"role": "prompter", "text": "q"}, {"speaker": "Bot ", "text": "a"}]},
        # Keys without a value, as in tables.
        {"messages": [{**QUESTION, "tool_calls": None, "images": []}, {**ANSWER, "function_call": {}}], "tools": "[]"},
        # Keys that ask for the default behaviour.
        {"messages": [{**QUESTION, "weight": 1, "train": False}, {**ANSWER, "weight": 1, "train": True}], "label": 3},
    ],
)
def test_ways_to_write_a_conversation(entry):
    assert read(entry) == READ


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ("human user User prompter", "user"),
        ("gpt GPT chatgpt assistant model ai claude bot bing bard", "assistant"),
        ("system developer", "system"),
    ],
)
def test_role_names(names, role):
    for name in names.split():
        assert read([{"from": name, "value": "x"}]) == [Turn(role, "x")]


def test_a_system_prompt_beside_the_turns_comes_first():
    for key in ("system", "system_prompt"):
        assert read({key: "s", "messages": [QUESTION, ANSWER]}) == [Turn("system", "s"), *READ]
    assert read({"system": None, "messages": [QUESTION, ANSWER]}) == READ


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one"}, "two", {"type": "input_text", "text": "three", "image_url": None}]
    assert read([{"role": "user", "content": parts}]) == [Turn("user", "one\ntwo\nthree")]


PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "What is this?"}, PICTURE]}, "part that is not text"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "part that is not text"),
        ({"role": "user", "content": {"parts": ["x"]}}, "turn without text"),
        ({"role": "assistant", "content": None}, "turn without text"),
        ({"role": "assistant"}, "turn without text"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool use"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "tool use"),
        ({"role": "tool", "content": "12 degrees"}, "tool use"),
        ({"from": "observation", "value": "12 degrees"}, "tool use"),
        ({"from": "function_response", "value": ""}, "tool use"),
        ({"role": "narrator", "content": "x"}, "unknown role"),
        ({"role": None, "content": ""}, "unknown role"),
        ({"content": "x"}, "unknown role"),
        ({"role": "user", "from": "gpt", "content": "x"}, "unknown role"),
        ("x", "turn that is not an object"),
        ({**ANSWER, "value": "b"}, "turn with two texts"),
        ({**ANSWER, "reasoning_content": "so"}, "reasoning separate from the answer"),
        ({**QUESTION, "images": ["a.png"]}, "pictures, sound or files"),
        ({**ANSWER, "weight": 0}, "turns that say whether they are learned"),
        ({**ANSWER, "weight": 0.5}, "turns that say whether they are learned"),
        ({**ANSWER, "train": False}, "turns that say whether they are learned"),
        ({**QUESTION, "loss": True}, "turns that say whether they are learned"),
    ],
)
def test_a_turn_that_cannot_be_represented_gives_the_conversation_up(turn, reason):
    assert why([QUESTION, turn, ANSWER]) == reason


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"tools": [{"type": "function"}]}, "tool use"),
        ({"image": "a.png"}, "pictures, sound or files"),
        ({"chosen": ANSWER, "rejected": ANSWER}, "preference pair"),
        ({"kto_tag": False}, "marked as a bad answer"),
        ({"items": [ANSWER]}, "two lists of turns"),
        ({"system": ["s"]}, "system or system_prompt or system_message that is not text"),
    ],
)
def test_what_stands_beside_the_turns_may_give_them_up(beside, reason):
    assert why({"messages": [QUESTION, ANSWER], **beside}) == reason


@pytest.mark.parametrize("entry", [{"messages": "x"}, {"conversations": "[1", "text": "x"}, {"turns": None}])
def test_an_entry_without_turns_is_none_of_another_form(entry):
    assert why(entry) == "no list of turns"


# --- prompts and answers, documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "turns"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"instruction": "i", "input": "x", "output": "o", "prompt": "r"}, [("user", "i\n\nx"), ("assistant", "o")]),
        ({"instruction": "i", "context": None, "response": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"input": "x", "output": "o"}, [("user", "x"), ("assistant", "o")]),
        ({"question": "q", "answer": "a", "system": "s"}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        (
            {"instruction": "i", "output": "o", "history": [["q", "a"]]},
            [("user", "q"), ("assistant", "a"), ("user", "i"), ("assistant", "o")],
        ),
    ],
)
def test_instructions(entry, turns):
    assert read(entry) == turns


def test_completions():
    entry = {"prompt": "p ", "completion": "c", "text": "p c"}
    assert read(entry) == Passage("p ", "c")
    # With this form, through the template.
    assert read(entry, "instructions") == [Turn("user", "p "), Turn("assistant", "c")]
    assert read({"prompt": [QUESTION], "completion": [ANSWER]}) == READ
    assert why({"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}).startswith("answers in the prompt")
    assert why({"prompt": "p", "completion": "c", "label": False}) == "marked as a bad answer"


def test_documents():
    assert read({"text": "a\r\n", "meta": {}}) == Passage("", "a\r\n")
    assert read({"content": "a", "text": None}) == Passage("", "a")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"instruction": "i", "output": ["o"]}, "output or response or answer or completion that is not text"),
        ({"instruction": "i", "output": "o", "response": "p"}, "two texts under output, response, answer, completion"),
        ({"instruction": "i", "input": "x", "context": "y", "output": "o"}, "two texts under input, context"),
        ({"instruction": "i", "output": "o", "history": ["q"]}, "history that is not a list of pairs"),
        ({"prompt": "p", "completion": 3}, "completion that is not text"),
        ({"text": ["a"]}, "text or content that is not text"),
        ({"text": "a picture of", "image": {"path": "a.png"}}, "pictures, sound or files"),
    ],
)
def test_other_forms_with_other_values(entry, reason):
    assert why(entry) == reason


# --- telling forms apart ----------------------------------------------------------------------------------------------


def test_forms_are_told_by_keys():
    assert find_form({"id": 1}, "auto") is None
    assert find_form("x", "auto") is None
    assert find_form({"text": "x"}, "sharegpt") is None
    with pytest.raises(InputError, match="unknown format 'sharegtp': did you mean 'sharegpt'"):
        find_form({}, "sharegtp")


def test_lists_of_entries_are_told_from_turns():
    for key in (None, "data", "conversations", "items"):
        assert holds_entries(key, {"messages": []})
        assert holds_entries(key, [QUESTION])
        assert not holds_entries(key, QUESTION)
    assert not holds_entries("tags", {"text": "x"})
    assert not holds_entries("data", {"name": "x"})
    assert not holds_entries("data", "x")
    assert holds_entries(None, 3)
