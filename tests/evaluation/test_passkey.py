"""The passkey's prompts: their text, the key's place, their length, and what they depend on."""

import re

import pytest

from eabf_jax.evaluation.passkey import prompts, wording
from eabf_jax.interop.tokenizer import Tokenizer


@pytest.mark.parametrize("depth", [0, 10, 50, 90, 100])
def test_the_key_lies_at_its_depth_between_two_sentences(depth: int) -> None:
    question, opening, answer = wording(12345, depth, 2, 400)
    assert (opening, answer) == ("The pass key is ", "12345")
    assert question.endswith("\n\nWhat is the pass key?")
    text = question.split("\n\n")[1]
    before, after = re.fullmatch(
        r"(.*?) ?The pass key is 12345\. Remember it\. 12345 is the pass key\. ?(.*)", text, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    words = len(before.split()) + len(after.split())
    assert words == 400
    # The next sentence ends at most three words later.
    assert 0 <= len(before.split()) - 4 * depth <= 3
    assert before == "" or before.endswith(".")
    assert text.endswith("." if depth == 100 else "The sun is yellow.")


def test_prompts_are_as_long_as_may_be_and_hold_the_key_once_asked(tokenizer: Tokenizer) -> None:
    made = prompts(tokenizer, [220, 400], [0, 100], 3, seed=5)
    assert [(p.length, p.depth) for p in made] == [(n, d) for n in (220, 400) for d in (0, 100) for _ in range(3)]
    for prompt in made:
        # One more word of the filler takes one token, or two for the rarest word.
        assert prompt.length - 2 <= len(prompt.tokens) <= prompt.length
        key = tokenizer.decode(prompt.tokens[prompt.begin :])
        assert re.fullmatch(r"[1-9]\d{4}", key)
        assert tokenizer.decode(prompt.tokens[: prompt.begin]).endswith("The pass key is ")
        assert tokenizer.decode(prompt.tokens[: prompt.begin]).count(key) == 2


def test_a_prompt_depends_on_seed_and_cell_alone(tokenizer: Tokenizer) -> None:
    few = prompts(tokenizer, [250], [50], 2, seed=1, chat=False)
    assert few == prompts(tokenizer, [220, 250], [0, 50], 3, seed=1, chat=False)[9:11]
    assert few != prompts(tokenizer, [250], [50], 2, seed=2, chat=False)
    assert few[0].tokens != few[1].tokens
