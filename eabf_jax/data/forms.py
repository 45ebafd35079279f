"""Reads an entry of a file as a conversation or a passage of text. A form is one function and one line in `FORMS`.

An entry that plain text cannot represent raises `Unusable`, because its answers may refer to the part that is missing.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from eabf_jax.data.chat import Role, Turn
from eabf_jax.errors import unknown_name

TURN_LIST_KEYS = ("conversations", "conversation", "messages", "items", "turns")
ROLE_KEYS = ("from", "role", "speaker")
TEXT_KEYS = ("value", "content", "text")
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
QUESTION_KEYS = ("instruction", "question", "query")
INPUT_KEYS = ("input", "context")
ANSWER_KEYS = ("output", "response", "answer", "completion")
DOCUMENT_KEYS = ("text", "content")
# Keys of a list of entries, for a file that is a single object.
ENTRY_LIST_KEYS = (*TURN_LIST_KEYS, "data", "records", "examples", "entries", "rows", "train")

ROLES: dict[str, Role] = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("assistant", "model", "ai", "bot", "gpt", "chatgpt", "claude", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TOOL_ROLES = {"tool", "tools", "function", "ipython", "observation", "tool_call", "tool_response", "tool_result"}
TOOL_ROLES |= {"function_call", "function_response", "function-call", "function-response"}

_TOOLS = "tool use"
_MEDIA = "pictures, sound or files"
_REASONING = "reasoning separate from the answer"
# An entry is unusable if one of these keys, in it or in one of its turns, holds anything.
REFUSED_IN_ENTRIES = {
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected"), "preference pair"),
}
REFUSED_IN_TURNS = {
    **dict.fromkeys(("tool_calls", "tool_call_id", "function_call"), _TOOLS),
    **dict.fromkeys(("image", "images", "audio", "video", "videos", "files", "attachments"), _MEDIA),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), _REASONING),
}
# Keys that say whether a turn is learned. Here exactly the answers are learned.
LEARNED_KEYS = ("weight", "train", "loss")
# Keys that say whether an entry's answer is good.
VERDICT_KEYS = ("label", "kto_tag")
_TEXT_PARTS = (None, "text", "input_text", "output_text")


class Unusable(ValueError):
    """Raised for an entry that cannot become training text; such entries are counted by `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Passage(NamedTuple):
    """Text that is used verbatim, without a template; only `text`, which follows `prompt`, is learned.

    A document is a passage without a prompt.
    """

    prompt: str
    text: str


Content = list[Turn] | Passage


@dataclass(frozen=True)
class Form:
    """One way to write an entry."""

    read: Callable[[Any], Content]  # returns an entry's content, or raises `Unusable`
    claims: Callable[[Any], bool]  # whether an entry has this form's keys, whatever their values
    needs: str  # the keys, for messages
    from_pages: bool = False  # whether to remove remains of web pages, where such texts usually come from


def turn_list(entry: Any) -> list[Any]:
    """Returns the unparsed turns of a conversation; raises `Unusable` if it has no list of turns, or two of them."""
    if isinstance(entry, list):
        return entry
    found: list[list[Any]] = []
    for key in TURN_LIST_KEYS:
        turns = entry.get(key) if isinstance(entry, dict) else None
        # Table files store nested values as JSON.
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            try:
                turns = json.loads(turns)
            except ValueError:
                turns = None
        if isinstance(turns, list) and turns not in found:
            found.append(turns)
    if not found:
        raise Unusable("no list of turns")
    if sum(bool(turns) and is_turn(turns[0]) for turns in found) > 1:
        raise Unusable("two lists of turns")
    return next((turns for turns in found if turns), found[0])


def is_turn(value: Any) -> bool:
    """Tells whether a value looks like a turn of a conversation: an object that names its speaker."""
    return isinstance(value, dict) and any(key in value for key in ROLE_KEYS)


def holds_entries(key: str | None, first: Any) -> bool:
    """Tells whether a list holds entries, as opposed to the turns of a single conversation.

    Args:
      key: the list's key in the file's single object; None for a top-level array.
      first: its first element.
    """
    if key is None:
        return not is_turn(first)
    if key not in ENTRY_LIST_KEYS or is_turn(first):
        return False
    return (isinstance(first, list) and bool(first) and is_turn(first[0])) or (
        isinstance(first, dict) and any(form.claims(first) for form in FORMS.values())
    )


def role_of(turn: Any) -> Role | None:
    """Returns the speaker of a turn; None if it is unknown or its keys disagree."""
    known = {ROLES[name] for name in _names(turn) if name in ROLES}
    return known.pop() if len(known) == 1 else None


def _names(turn: Any) -> list[str]:
    """Returns the names that a turn gives its speaker."""
    found = [turn.get(key) for key in ROLE_KEYS] if isinstance(turn, dict) else []
    return [name.strip().lower() for name in found if isinstance(name, str)]


def text_of(turn: Any) -> str:
    """Returns the text of a turn; raises `Unusable` if it has no text, or anything else.

    Parts are joined by line feeds, as vLLM and llama.cpp do for templates that take a string.
    """
    given = [turn[key] for key in TEXT_KEYS if turn.get(key) is not None]
    content = next(filter(None, given), "" if "" in given else None)
    if any(other not in ("", content) for other in given):
        raise Unusable("turn with two texts")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unusable("turn without text")
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
            part = part.get("text")
        if not isinstance(part, str):
            raise Unusable("part that is not text")
        texts.append(part)
    return "\n".join(texts)


def conversation(entry: Any, turns: Sequence[Any]) -> list[Turn]:
    """Reads the turns of an entry, after its system prompt if it has one.

    Raises:
      Unusable: a part of the entry is unknown or cannot be represented.
    """
    _check_answered(entry)
    return [*_system_turns(entry), *map(_turn, turns)]


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise Unusable("turn that is not an object")
    _check(turn, REFUSED_IN_TURNS)
    if not TOOL_ROLES.isdisjoint(_names(turn)):
        raise Unusable(_TOOLS)
    role = role_of(turn)
    if role is None:
        raise Unusable("unknown role")
    for key in LEARNED_KEYS:
        # A weight on a question has no effect where only answers are learned; `train: true` would ask to learn it.
        is_asked = turn.get(key) not in ((None, 1) if role == "assistant" else (None, 0))
        if is_asked and (key != "weight" or role == "assistant"):
            raise Unusable("turns that say whether they are learned")
    return Turn(role, text_of(turn))


def _sharegpt(entry: Any) -> list[Turn]:
    """Reads turns with `from` and `value`, or with OpenAI's `role` and `content`."""
    return conversation(entry, turn_list(entry))


def _instructions(entry: Any) -> list[Turn]:
    """Reads Alpaca's `instruction`, `input`, `output`, LLaMA-Factory's `system` and `history`, and similar keys."""
    _check_answered(entry)
    # Some copies of Alpaca's data also have the rendered prompt.
    question = [_string(entry, QUESTION_KEYS) or _string(entry, ("prompt",)), _string(entry, INPUT_KEYS)]
    answer = _string(entry, ANSWER_KEYS)
    turns = _system_turns(entry)
    history = entry.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise Unusable("history that is not a list of pairs")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return [*turns, Turn("user", "\n\n".join(filter(None, question))), Turn("assistant", answer)]


def _completions(entry: Any) -> Content:
    """Reads `prompt` and `completion`: verbatim texts, or two lists of turns (as in TRL)."""
    prompt, completion = entry.get("prompt"), entry.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if any(role_of(turn) == "assistant" for turn in prompt):
            raise Unusable("answers in the prompt, which should not be learned")
        return conversation(entry, [*prompt, *completion])
    _check_answered(entry)
    return Passage(_string(entry, ("prompt",)), _string(entry, ("completion",)))


def _document(entry: Any) -> Passage:
    """Reads a text for continued training."""
    _check(entry, REFUSED_IN_ENTRIES)
    return Passage("", _string(entry, DOCUMENT_KEYS))


def _has(entry: Any, *alternatives: Sequence[str]) -> bool:
    """Tells whether an entry has a key of each group."""
    return isinstance(entry, dict) and all(any(key in entry for key in keys) for keys in alternatives)


def _string(entry: Any, keys: Sequence[str]) -> str:
    """Returns the text under one of the keys; empty if none of them has a value."""
    given = [entry[key] for key in keys if entry.get(key) not in (None, "")]
    if not all(isinstance(text, str) for text in given):
        raise Unusable(f"{' or '.join(keys)} that is not text")
    if len(set(given)) > 1:
        raise Unusable(f"two texts under {', '.join(keys)}")
    return given[0] if given else ""


def _system_turns(entry: Any) -> list[Turn]:
    text = _string(entry, SYSTEM_KEYS) if isinstance(entry, dict) else ""
    return [Turn("system", text)] if text else []


def _check(value: Any, refused: dict[str, str]) -> None:
    """Raises `Unusable` if a refused key has a value; false, empty values and their JSON text do not count."""
    for key, reason in refused.items() if isinstance(value, dict) else ():
        if value.get(key) not in (None, "", False, [], {}, "[]", "{}", "null"):
            raise Unusable(reason)


def _check_answered(entry: Any) -> None:
    """Raises `Unusable` if an entry with an answer has a refused key, or its answer is marked as bad."""
    _check(entry, REFUSED_IN_ENTRIES)
    if isinstance(entry, dict) and any(entry.get(key) is False for key in VERDICT_KEYS):
        raise Unusable("marked as a bad answer")


SHAREGPT = "sharegpt"
TEXT = "text"
AUTO = "auto"
# In the order in which `auto` tries them: turns come first, because datasets may also have the rendered text.
FORMS: dict[str, Form] = {
    SHAREGPT: Form(
        _sharegpt,
        lambda entry: isinstance(entry, list) or _has(entry, TURN_LIST_KEYS),
        f"a list of turns under {', '.join(TURN_LIST_KEYS)}",
        from_pages=True,
    ),
    "completions": Form(_completions, lambda entry: _has(entry, ("prompt",), ("completion",)), "prompt and completion"),
    "instructions": Form(
        _instructions,
        lambda entry: _has(entry, (*QUESTION_KEYS, "prompt", *INPUT_KEYS), ANSWER_KEYS),
        f"a question ({', '.join(QUESTION_KEYS)}, prompt) and an answer ({', '.join(ANSWER_KEYS)})",
    ),
    TEXT: Form(_document, lambda entry: _has(entry, DOCUMENT_KEYS), f"a text under {' or '.join(DOCUMENT_KEYS)}"),
}
FORMATS = (AUTO, *FORMS)


def find_form(entry: Any, wanted: str) -> str | None:
    """Finds the name of an entry's form.

    Args:
      wanted: one of `FORMATS`.

    Returns:
      The name; None if the keys match no form, or not the wanted one.

    Raises:
      InputError: the format is unknown.
    """
    if wanted not in FORMATS:
        raise unknown_name("format", wanted, FORMATS)
    return next((name for name, form in FORMS.items() if wanted in (AUTO, name) and form.claims(entry)), None)
