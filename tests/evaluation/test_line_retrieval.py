"""Line retrieval's prompts: one right answer, as many lines as fit, and the same prompts for every model."""

import re

import pytest

from eabf_jax.errors import InputError
from eabf_jax.evaluation import line_retrieval
from eabf_jax.evaluation.line_retrieval import names, prompts
from eabf_jax.interop.tokenizer import Tokenizer


def record(text: str) -> dict[str, str]:
    return dict(re.findall(r"^line ([a-z]+-[a-z]+): REGISTER_CONTENT is <(\d{5})>$", text, re.MULTILINE))


def test_names_are_distinct() -> None:
    assert len(set(names())) == len(names()) > 10_000


def test_the_answer_is_the_number_of_the_line_asked_for(tokenizer: Tokenizer) -> None:
    made = prompts(tokenizer, [300, 600], 4, seed=3)
    assert [(p.length, p.depth) for p in made] == [(300, None)] * 4 + [(600, None)] * 4
    asked_at = []
    for prompt in made:
        text = tokenizer.decode(prompt.tokens[: prompt.begin])
        lines = record(text)
        assert len(set(lines.values())) == len(lines) == text.count("\nline ")
        name = re.search(r"What is the REGISTER_CONTENT of line (\S+)\?", text).group(1)  # type: ignore[union-attr]
        assert text.endswith(f"The REGISTER_CONTENT of line {name} is <")
        assert tokenizer.decode(prompt.tokens[prompt.begin :]).strip() == lines[name]
        # There is no room for another line, which takes about 20 to 40 tokens here.
        assert prompt.length - 45 < len(prompt.tokens) <= prompt.length
        asked_at.append(list(lines).index(name) / len(lines))
    assert len(set(asked_at)) > 4


def test_a_prompt_depends_on_seed_and_length_alone(tokenizer: Tokenizer) -> None:
    few = prompts(tokenizer, [300], 2, seed=1)
    assert few == prompts(tokenizer, [250, 300], 3, seed=1)[3:5]
    assert few != prompts(tokenizer, [300], 2, seed=2)
    assert few[0] != few[1]


def test_a_shorter_record_begins_like_the_longer_one(tokenizer: Tokenizer) -> None:
    """A tokenizer that needs more tokens therefore gets fewer of the same lines."""
    wide, narrow = (
        record(tokenizer.decode(prompts(tokenizer, [500], 1, seed=1, chat=chat)[0].tokens)) for chat in (False, True)
    )
    assert len(narrow) < len(wide)
    assert list(wide.items())[: len(narrow)] == list(narrow.items())


def test_lengths_beyond_the_names_are_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_retrieval, "_NOUNS", "oak pine")
    monkeypatch.setattr(line_retrieval, "_ADJECTIVES", "old new")
    with pytest.raises(InputError, match="more than 4 lines, and there are no more names"):
        prompts(tokenizer, [500], 1, seed=1)
