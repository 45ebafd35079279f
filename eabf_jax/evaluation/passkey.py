"""Passkey retrieval: a five-digit key in a long text about nothing, asked for at the end.

Source of the task: Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers"
(2023).
"""

import functools
from collections.abc import Sequence

import numpy as np

from eabf_jax.evaluation.retrieval import Prompt, Wording, fitted
from eabf_jax.interop.tokenizer import Tokenizer

_TASK = (
    "One important fact is hidden somewhere in the irrelevant text that follows. Find it and memorize it: I will ask "
    "for it at the end."
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_QUESTION, _OPENING = "What is the pass key?", "The pass key is "


def wording(key: int, depth: int, turn: int, words: int) -> Wording:
    """One passkey question.

    Args:
      key: the number to find.
      depth: where it is said, percent of the text around it: 0 is the beginning, 100 the end. It is said between two
        sentences, the next ones from there.
      turn: which of the ever same sentences is the text's last.
      words: length of the text around it, which may begin in mid-sentence.
    """
    filler = _FILLER.split()
    sentences = [index + 1 for index, word in enumerate(filler) if word.endswith(".")]
    last = sentences[turn % len(sentences)]
    text = [filler[(last - words + index) % len(filler)] for index in range(words)]
    place = round(words * depth / 100)
    while 0 < place < words and not text[place - 1].endswith("."):
        place += 1
    fact = f"The pass key is {key}. Remember it. {key} is the pass key."
    body = " ".join([*text[:place], fact, *text[place:]])
    return Wording(f"{_TASK}\n\n{body}\n\n{_QUESTION}", _OPENING, str(key))


def prompts(
    tokenizer: Tokenizer, lengths: Sequence[int], depths: Sequence[int], samples: int, seed: int, *, chat: bool = True
) -> list[Prompt]:
    """The questions of a seed, at every length and depth.

    Args:
      tokenizer: the model's; for another one of the same kind of questions the keys are the same.
      lengths: most tokens of prompt and answer.
      depths: percent.
      samples: questions of each length and depth; they differ in the key and in where the text begins.
      seed: of the draws. A question depends on the seed, its length, depth and number, and on nothing else.
      chat: as for `retrieval.encode`.

    Returns:
      lengths x depths x samples prompts, each as long as it may be.
    Raises:
      InputError: as `retrieval.fitted`.
    """
    made = []
    for length in lengths:
        words = length
        for depth in depths:
            for sample in range(samples):
                draw = np.random.default_rng([seed, length, depth, sample])
                key, turn = int(draw.integers(10_000, 100_000)), int(draw.integers(5))
                worded = functools.partial(wording, key, depth, turn)
                tokens, begin, words = fitted(tokenizer, worded, length, guess=words, chat=chat)
                made.append(Prompt(length, depth, tokens, begin))
    return made
