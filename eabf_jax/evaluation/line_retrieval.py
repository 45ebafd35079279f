"""Line retrieval: a record of named lines with a number each, then a question about one of them.

Source of the task: Li et al., "How Long Can Open-Source LLMs Truly Promise on Context Length?" (LongChat, 2023).
"""

import functools
from collections.abc import Sequence

import numpy as np

from eabf_jax.errors import InputError
from eabf_jax.evaluation.retrieval import Prompt, Wording, fitted
from eabf_jax.interop.tokenizer import Tokenizer

_ADJECTIVES = (
    "amber ample ancient arctic autumn azure bitter bold brave brief bright brisk broad calm careful cheerful chilly "
    "clever cloudy coastal copper cosmic crimson crisp curious damp daring deep dusty eager early earnest elder "
    "faint fancy fearless fierce flat foggy fragile fresh frosty gentle giant gilded glossy golden grand grave green "
    "hasty hidden hollow honest humble icy idle ivory jolly keen kind late lively lonely loud loyal lucky mellow mild "
    "misty modest muted narrow noble pale patient plain polite proud quick quiet rapid rare rough round rustic scarlet "
    "shallow sharp shy silent silver simple sleepy slow smooth solemn sour steady stern stormy sturdy sunny swift tall "
    "tender tidy timid vivid warm weary wild wise young"
)
_NOUNS = (
    "acorn anchor apple arrow badger bakery balcony barrel basin beacon beaver bell blanket bottle bramble bridge "
    "bucket button cabin candle canyon carpet castle cellar chapel cherry cliff clock cloud comet compass cottage "
    "cradle crane cricket curtain dolphin drum eagle ember falcon feather fence ferry fiddle forest fountain fox "
    "garden gate glacier goose hammer harbor hazel hedge heron hill island jacket kettle kitchen ladder lantern lark "
    "lemon lighthouse linen lizard maple market meadow mirror mountain needle oak ocean orchard otter owl paddle "
    "pebble pepper pigeon pillow pine planet plum pocket pond rabbit raven ribbon river robin saddle salmon scarf "
    "shadow shepherd shovel sparrow spoon stable stove tailor teapot thicket tiger towel tower trumpet tunnel turtle "
    "valley violet wagon walnut whistle willow window"
)
_TASK = (
    "Below is a record of lines to remember. Each begins with 'line' and its name, and gives its REGISTER_CONTENT, a "
    "number in angle brackets. Memorize the number of every line: after the record I will ask for one of them."
)


def names() -> list[str]:
    """Returns every name that a line can have: an adjective and a noun."""
    return [f"{adjective}-{noun}" for adjective in _ADJECTIVES.split() for noun in _NOUNS.split()]


def wording(lines: Sequence[tuple[str, int]], asked: int) -> Wording:
    """Words one question about a record.

    Args:
      lines: name and number of each line.
      asked: index of the line in question.
    """
    record = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in lines)
    name, number = lines[asked]
    question = f"{_TASK}\n\n{record}\nThe record is over. What is the REGISTER_CONTENT of line {name}?"
    return Wording(question, f"The REGISTER_CONTENT of line {name} is <", str(number))


def prompts(
    tokenizer: Tokenizer, lengths: Sequence[int], samples: int, seed: int, *, chat: bool = True
) -> list[Prompt]:
    """Makes the questions for every length.

    Args:
      tokenizer: the model's; it decides how many lines fit, but not which lines they are.
      lengths: maximum tokens of prompt and answer.
      samples: questions per length, each about a record of its own.
      seed: random seed; a question depends only on the seed, its length and its number.
      chat: as for `retrieval.encode`.

    Returns:
      lengths x samples prompts, each with as many lines as fit.
    Raises:
      InputError: a length that takes more lines than there are names, or as for `retrieval.fitted`.
    """
    known = names()
    made = []
    for length in lengths:
        further = length // 20
        for sample in range(samples):
            draw = np.random.default_rng([seed, length, sample])
            order = draw.permutation(len(known))
            values = 10_000 + draw.permutation(90_000)[: len(known)]
            lines = [(known[index], int(value)) for index, value in zip(order, values, strict=True)]
            worded = functools.partial(_first, lines, float(draw.random()))
            tokens, begin, further = fitted(tokenizer, worded, length, guess=further, chat=chat)
            made.append(Prompt(length, None, tokens, begin))
    return made


def _first(lines: Sequence[tuple[str, int]], share: float, further: int) -> Wording:
    """Words the question about the first `1 + further` lines; `share` gives the place of the line in question."""
    count = 1 + further
    if count > len(lines):
        raise InputError(
            f"that length takes more than {len(lines)} lines, and there are no more names; use a shorter one"
        )
    return wording(lines[:count], int(share * count))
