"""Turns conversations into tokens by chat templates, with a mask of the tokens that the assistant learns."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from typing import Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int32

from eabf_jax.data.chat_template import Rendered, render
from eabf_jax.errors import InputError, unknown_name

Role = Literal["system", "user", "assistant"]


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: Role
    text: str


class Tokenizer(Protocol):
    """The interface of a tokenizer that templates and passages need."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    special_tokens: dict[str, str]
    added_ids: frozenset[int]
    chat_templates: dict[str, str]
    chat_template: str | None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Turns text into ids, without adding special tokens."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Turns text with special tokens into ids, each with the start and end of its characters."""
        ...

    def token_id(self, piece: str) -> int | None:
        """Returns the id of a special token; None if there is no such token."""
        ...


class Segment(NamedTuple):
    """A stretch of a rendered exchange.

    Text is never parsed for special tokens, so users cannot inject markup.
    """

    text: str  # the text; for a special token, "bos", "eos" or its string
    is_response: bool = False  # whether its tokens are learned
    is_special: bool = False  # whether it is one special token


class Exchange(NamedTuple):
    """A question and its answer; the first exchange of a conversation also has its system prompt, if there is one."""

    user: str
    assistant: str
    system: str | None
    is_first: bool


class Encoded(NamedTuple):
    """Tokens, and a mask of the tokens that the assistant learns."""

    tokens: Int32[np.ndarray, " length"]
    loss_mask: Bool[np.ndarray, " length"]


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_BOS = Segment("bos", is_special=True)
_EOS = Segment("eos", is_response=True, is_special=True)


def _llama_2(exchange: Exchange) -> Iterator[Segment]:
    """Renders LLaMA-2-Chat as Meta's code does: every exchange between BOS and EOS."""
    system = "" if exchange.system is None else f"<<SYS>>\n{exchange.system}\n<</SYS>>\n\n"
    yield _BOS
    prompt = f"{system}{exchange.user}".strip()
    yield Segment(f"[INST] {prompt} [/INST]")
    yield Segment(f" {exchange.assistant.strip()} ", is_response=True)
    yield _EOS


def _vicuna(exchange: Exchange) -> Iterator[Segment]:
    """Renders Vicuna v1.1 as FastChat does: one BOS, and an EOS after every answer."""
    if exchange.is_first:
        yield _BOS
        yield Segment(f"{exchange.system or VICUNA_SYSTEM} ")
    yield Segment(f"USER: {exchange.user} ASSISTANT:")
    yield Segment(f" {exchange.assistant}", is_response=True)
    yield _EOS


def _chatml(exchange: Exchange) -> Iterator[Segment]:
    """Renders ChatML without a default system prompt."""
    begin = Segment("<|im_start|>", is_special=True)
    end = Segment("<|im_end|>", is_special=True)
    if exchange.system is not None:
        yield from (begin, Segment(f"system\n{exchange.system}"), end, Segment("\n"))
    yield from (begin, Segment(f"user\n{exchange.user}"), end, Segment("\n"))
    yield from (begin, Segment("assistant\n"), Segment(exchange.assistant, is_response=True))
    yield from (end._replace(is_response=True), Segment("\n"))


def _llama_3(exchange: Exchange) -> Iterator[Segment]:
    """Renders Llama 3 Instruct as Meta's code does: a header before each message, and <|eot_id|> after it."""
    end = Segment("<|eot_id|>", is_special=True)

    def header(role: str) -> Iterator[Segment]:
        yield Segment("<|start_header_id|>", is_special=True)
        yield Segment(role)
        yield Segment("<|end_header_id|>", is_special=True)

    if exchange.is_first:
        yield Segment("<|begin_of_text|>", is_special=True)
    if exchange.system is not None:
        yield from (*header("system"), Segment(f"\n\n{exchange.system.strip()}"), end)
    yield from (*header("user"), Segment(f"\n\n{exchange.user.strip()}"), end)
    yield from (*header("assistant"), Segment("\n\n"), Segment(exchange.assistant.strip(), is_response=True))
    yield end._replace(is_response=True)


TEMPLATES: dict[str, Callable[[Exchange], Iterable[Segment]]] = {
    "llama-2": _llama_2,
    "llama-3": _llama_3,
    "vicuna": _vicuna,
    "chatml": _chatml,
}

# Stands for the template of the model's own tokenizer.
OWN = "own"


def check_template(template: str) -> None:
    """Raises InputError unless a template is `OWN` or a name in `TEMPLATES`."""
    if template != OWN and template not in TEMPLATES:
        raise unknown_name("chat template", template, (*TEMPLATES, OWN))


def exchanges(turns: Sequence[Turn]) -> list[Exchange]:
    """Pairs the turns of a conversation.

    Args:
      turns: at most one system turn, then alternating user and assistant turns, the assistant last.

    Raises:
      InputError: the turns are in another order.
    """
    system = turns[0].text if turns and turns[0].role == "system" else None
    spoken = turns if system is None else turns[1:]
    roles = [turn.role for turn in spoken]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        found = ", ".join(roles[:4]) or "none"
        raise InputError(f"turns are {found} ({len(roles)} in all): user and assistant must alternate, the user first")
    return [
        Exchange(question.text, answer.text, system if number == 0 else None, number == 0)
        for number, (question, answer) in enumerate(zip(spoken[::2], spoken[1::2], strict=True))
    ]


def _encode_exchange(exchange: Exchange, template: str, tokenizer: Tokenizer) -> Encoded:
    return _encode_segments(TEMPLATES[template](exchange), template, tokenizer)


def encode_prompt(turns: Sequence[Turn], template: str, tokenizer: Tokenizer) -> list[int]:
    """Renders and tokenizes a conversation up to the start of the assistant's answer.

    Args:
      turns: at most one system turn, then alternating user and assistant turns, the user last; with `OWN`, whatever
        the model's template accepts.
      template: a name in `TEMPLATES`, or `OWN`.

    Returns:
      The token ids. Followed by the answer's, they equal those of `encode_conversation`.

    Raises:
      InputError: as for `encode_conversation`.
    """
    check_template(template)
    if template == OWN:
        return tokenizer.encode(_render_own(turns, tokenizer, add_generation_prompt=True).text, special=True)
    *before, last = exchanges([*turns, Turn("assistant", "")])
    encoded = [_encode_exchange(exchange, template, tokenizer) for exchange in before]
    opening = takewhile(lambda segment: not segment.is_response, TEMPLATES[template](last))
    return concatenate([*encoded, _encode_segments(opening, template, tokenizer)]).tokens.tolist()


def answer_ends(template: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens that end an answer.

    Args:
      template: a name in `TEMPLATES`, or `OWN` for the special token, if any, that the model's template writes after
        an answer.

    Raises:
      InputError: as for `encode_conversation`.
    """
    check_template(template)
    if template == OWN:
        return _own_ends(tokenizer)
    segments = TEMPLATES[template](Exchange("", "", None, True))
    return [_special_id(s.text, template, tokenizer) for s in segments if s.is_special and s.is_response]


def encode_conversation(turns: Sequence[Turn], template: str, tokenizer: Tokenizer) -> Encoded:
    """Renders and tokenizes a whole conversation.

    Args:
      turns: at most one system turn, then alternating user and assistant turns, the assistant last.
      template: a name in `TEMPLATES`, or `OWN`.

    Returns:
      int32 tokens [length] and bool mask [length]: true on the assistant's tokens and on the token that ends its turn;
      with `OWN`, on the text that the model's template marks with `{% generation %}`.

    Raises:
      InputError: the turns do not alternate, the template is unknown, the tokenizer lacks one of its special tokens, or
        the model's own template marks nothing.
    """
    return encode_beginning(turns, template, tokenizer, math.inf)


def encode_beginning(turns: Sequence[Turn], template: str, tokenizer: Tokenizer, enough: float) -> Encoded:
    """Renders and tokenizes the first exchanges of a conversation, until there are `enough` tokens.

    Args:
      turns: as in `encode_conversation`.
      template: a name in `TEMPLATES`, or `OWN`, which renders the whole conversation.
      enough: the number of tokens wanted.

    Returns:
      The tokens of these exchanges and their mask, not truncated.

    Raises:
      InputError: as for `encode_conversation`.
    """
    check_template(template)
    paired = exchanges(turns)
    if template == OWN:
        return _encode_own(turns, tokenizer)
    encoded: list[Encoded] = []
    length = 0
    for exchange in paired:
        encoded.append(_encode_exchange(exchange, template, tokenizer))
        length += len(encoded[-1].tokens)
        if length >= enough:
            break
    return concatenate(encoded)


def split_conversation(
    turns: Sequence[Turn], template: str, tokenizer: Tokenizer, *, min_tokens: int, max_tokens: int
) -> list[Encoded]:
    """Splits a conversation into pieces of whole exchanges, each as long as allowed.

    Every piece is rendered as a separate conversation and repeats the system prompt. A single exchange that is too long
    is cut at `max_tokens`. Pieces that are too short, or have nothing left to learn, are dropped.

    Args:
      turns: as in `encode_conversation`.
      template: a name in `TEMPLATES`, or `OWN`.
      min_tokens, max_tokens: limits on the tokens of a piece.

    Raises:
      InputError: as for `encode_conversation`.
    """
    check_template(template)
    pieces = (
        _own_pieces(turns, tokenizer, max_tokens)
        if template == OWN
        else _named_pieces(exchanges(turns), template, tokenizer, max_tokens)
    )
    cut = [truncate(piece, max_tokens) for piece in pieces]
    return [piece for piece in cut if len(piece.tokens) >= min_tokens and piece.loss_mask.any()]


def _named_pieces(paired: Sequence[Exchange], template: str, tokenizer: Tokenizer, max_tokens: int) -> list[Encoded]:
    """Builds the pieces of a conversation from exchanges that are encoded one by one."""
    pieces: list[Encoded] = []
    current: list[Encoded] = []
    length = 0
    for exchange in paired:
        encoded = _encode_exchange(exchange, template, tokenizer)
        if current and length + len(encoded.tokens) > max_tokens:
            pieces.append(concatenate(current))
            opening = exchange._replace(system=paired[0].system, is_first=True)
            current = [_encode_exchange(opening, template, tokenizer)]
            length = len(current[0].tokens)
        else:
            current.append(encoded)
            length += len(encoded.tokens)
    return [*pieces, concatenate(current)]


def _own_pieces(turns: Sequence[Turn], tokenizer: Tokenizer, max_tokens: int) -> list[Encoded]:
    """Builds the pieces of a conversation with the model's template, which renders only whole conversations."""
    spoken = 2 * len(exchanges(turns))
    system = turns[:-spoken]
    pieces: list[Encoded] = []
    begin = len(system)
    current = _encode_own(turns[: begin + 2], tokenizer)
    for end in range(begin + 4, len(turns) + 1, 2):
        longer = _encode_own([*system, *turns[begin:end]], tokenizer)
        if len(longer.tokens) > max_tokens:
            pieces.append(current)
            begin = end - 2
            longer = _encode_own([*system, *turns[begin:end]], tokenizer)
        current = longer
    return [*pieces, current]


def concatenate(encoded: Sequence[Encoded]) -> Encoded:
    """Joins encoded exchanges into one."""
    tokens, masks = zip(*encoded, strict=True)
    return Encoded(np.concatenate(tokens), np.concatenate(masks))


def truncate(encoded: Encoded, max_tokens: int) -> Encoded:
    """Keeps the first `max_tokens` tokens."""
    return Encoded(encoded.tokens[:max_tokens], encoded.loss_mask[:max_tokens])


def _encode_segments(segments: Iterable[Segment], template: str, tokenizer: Tokenizer) -> Encoded:
    """Tokenizes segments; text between two special tokens is tokenized as one, as in the rendered conversation."""
    tokens: list[int] = []
    mask: list[bool] = []
    for is_special, run in groupby(segments, key=lambda segment: segment.is_special):
        if is_special:
            for segment in run:
                tokens.append(_special_id(segment.text, template, tokenizer))
                mask.append(segment.is_response)
        else:
            ids, learned = _encode_text(list(run), tokenizer)
            tokens += ids
            mask += learned
    return Encoded(np.asarray(tokens, np.int32), np.asarray(mask, np.bool_))


def _own_template(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is None:
        unnamed = f"no default chat template, only {', '.join(sorted(tokenizer.chat_templates))}"
        raise InputError(
            f"the model's tokenizer has {unnamed if tokenizer.chat_templates else 'no chat template'}: name the one "
            f"that the model was trained with: --template {', '.join(sorted(TEMPLATES))}"
        )
    return tokenizer.chat_template


def _render_own(turns: Sequence[Turn], tokenizer: Tokenizer, *, add_generation_prompt: bool) -> Rendered:
    source = _own_template(tokenizer)
    return render(source, turns, tokenizer.special_tokens, add_generation_prompt=add_generation_prompt)


def _encode_own(turns: Sequence[Turn], tokenizer: Tokenizer) -> Encoded:
    """Encodes with the model's own template; the mask is true on tokens that overlap a marked stretch."""
    rendered = _render_own(turns, tokenizer, add_generation_prompt=False)
    if not rendered.is_marked:
        raise InputError(
            "the model's chat template does not mark what to learn (with {% generation %}): name a "
            f"template that does: --template {', '.join(sorted(TEMPLATES))}"
        )
    ids, offsets = tokenizer.encode_with_offsets(rendered.text)
    mask = np.zeros(len(ids), np.bool_)
    stretches = iter(rendered.learned)
    stretch = next(stretches, None)
    for i, (begin, end) in enumerate(offsets):
        while stretch is not None and begin >= stretch[1]:
            stretch = next(stretches, None)
        mask[i] = stretch is not None and end > stretch[0]
    return Encoded(np.asarray(ids, np.int32), mask)


def _own_ends(tokenizer: Tokenizer) -> list[int]:
    """Returns the added token that the model's own template writes after an answer, in a list; empty if none."""
    _own_template(tokenizer)
    answer = "The-answer-is-this."
    try:
        turns = [Turn("user", "A question."), Turn("assistant", answer)]
        text = _render_own(turns, tokenizer, add_generation_prompt=False).text
    except InputError:  # the template may refuse this probe; real faults appear when a conversation is rendered
        return []
    behind = text.rpartition(answer)[2].lstrip() if answer in text else ""
    first = tokenizer.encode(behind, special=True)[:1]
    return [i for i in first if i in tokenizer.added_ids]


def _special_id(name: str, template: str, tokenizer: Tokenizer) -> int:
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    found = named[name] if name in named else tokenizer.token_id(name)
    if found is None:
        raise InputError(
            f"the tokenizer has no {name} token, which the chat template {template!r} needs: "
            f"choose another template ({', '.join(sorted(TEMPLATES))}) or the model's own tokenizer"
        )
    return found


def _encode_text(segments: Sequence[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Tokenizes adjacent segments as one text, and marks the tokens of learned segments.

    A segment's tokens begin at the first one that differs from tokenizing only the text before it.
    """
    ids = tokenizer.encode("".join(segment.text for segment in segments))
    mask = [False] * len(ids)
    begin = 0
    text = ""
    for segment in segments:
        text += segment.text
        is_last = len(text) == sum(len(s.text) for s in segments)
        end = len(ids) if is_last else max(begin, common_prefix(ids, tokenizer.encode(text)))
        mask[begin:end] = [segment.is_response] * (end - begin)
        begin = end
    return ids, mask


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns the length of the common prefix of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
