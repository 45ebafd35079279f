"""Passkey retrieval: a five-digit key in a long irrelevant text, then a question about it.

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
    """Words one passkey question.

    Args:
      key: the number to find.
      depth: place of the key in percent of the filler, from 0 (beginning) to 100 (end), moved to the end of a sentence.
      turn: index of the filler's last sentence among the sentences that repeat.
      words: length of the filler, which may begin in mid-sentence.
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
    """Makes the questions for every length and depth.

    Args:
      tokenizer: the model's; the keys do not depend on it.
      lengths: maximum tokens of prompt and answer.
      depths: percent, as for `wording`.
      samples: questions per length and depth; they differ in the key and in where the filler begins.
      seed: random seed; a question depends only on the seed, its length, depth and number.
      chat: as for `retrieval.encode`.

    Returns:
      lengths x depths x samples prompts, each as long as its length allows.
    Raises:
      InputError: as for `retrieval.fitted`.
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
