"""Cleans conversations: converts HTML, removes remains of web pages, repairs turns, detects copies and languages."""

import hashlib
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import bs4
import markdownify
import py3langid

from eabf_jax.data.chat import Turn
from eabf_jax.data.forms import Passage, Unusable

# Conversations with the same first exchange of at least this many characters are one conversation, shared at different
# lengths. Shorter openings ("hi" - "Hello! How can I help you?") also occur in unrelated conversations.
SHARED_OPENING = 400

# Labels of buttons, of the page or of browser extensions, that were copied with a turn.
_BUTTONS = ("Share Prompt", "지금 번역하기")
_COPY_CODE = re.compile(r"^[ \t]*Copy code[ \t]*\n?", re.MULTILINE)
_PAGE = r"[ \t]*\d+ / \d+[ \t]*"
_PAGINATION = re.compile(rf"\A\s*{_PAGE}(?:\n|\Z)|\n{_PAGE}\s*\Z")
_INVISIBLE = re.compile("[\u200b\u2060\ufeff]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")

_BLOCK = "div|p|ul|ol|h[1-6]|pre|table|blockquote"
_STARTS_AS_HTML = re.compile(
    rf"\s*<(?:(?:{_BLOCK})\s*>|div\s+class=\"[^\"]*\b(?:markdown|prose|whitespace-pre-wrap)\b)", re.IGNORECASE
)
_ENDS_AS_HTML = re.compile(rf"</(?:{_BLOCK})>\s*\Z", re.IGNORECASE)

_CODE = re.compile(r"```.*?(?:```|\Z)|https?://\S+", re.DOTALL)
_SAMPLED_TURNS = 12
_SAMPLED_CHARACTERS = 300
# py3langid separates languages of Latin script well, but too often takes text in several scripts for English.
_LATIN_SHARE = 0.9
_LAST_LATIN = "\u024f"


class Cleaned(NamedTuple):
    """A cleaned conversation."""

    turns: list[Turn]  # alternating user and assistant, after at most one system turn
    fault: Literal["no turns", "no answer", "later system turn"] | None  # why there are no turns left


def clean_conversation(raw: Sequence[Turn], *, from_pages: bool = True) -> Cleaned:
    """Cleans every turn and repairs the alternation.

    Empty turns are dropped. Consecutive turns of one speaker are joined, or deduplicated if they are equal. Turns
    before the first user turn, except system turns, and an unanswered last question are dropped. A conversation with a
    later system turn is rejected: the answers after it depend on it, but templates have no place for it.

    Args:
      from_pages: whether the texts may be HTML or have remains of web pages; otherwise they are only stripped.

    Returns:
      The remaining turns, or the reason why there are none.
    """
    turns: list[Turn] = []
    system: list[str] = []
    for role, value in raw:
        text = clean_text(value) if from_pages else without_surrogates(value).strip()
        if not text:
            continue
        if role == "system":
            if turns:
                return Cleaned([], "later system turn")
            system += [] if text in system else [text]
        elif turns and turns[-1].role == role:
            if turns[-1].text != text:
                turns[-1] = Turn(role, f"{turns[-1].text}\n\n{text}")
        elif turns or role == "user":
            turns.append(Turn(role, text))
    if not turns:
        return Cleaned([], "no turns")
    if turns[-1].role == "user":
        turns.pop()
    if not turns:
        return Cleaned([], "no answer")
    return Cleaned([Turn("system", "\n\n".join(system)), *turns] if system else turns, None)


def without_surrogates(text: str) -> str:
    """Replaces lone surrogates, which JSON allows but UTF-8 does not."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def clean_passage(passage: Passage) -> Passage:
    """Replaces only lone surrogates; raises `Unusable` if there is nothing to learn."""
    if not passage.text.strip():
        raise Unusable("no answer" if passage.prompt else "no text")
    return Passage(*map(without_surrogates, passage))


def passage_turns(passage: Passage) -> list[Turn]:
    """Converts a passage to turns for `Copies` and `language`: its prompt, and slices of its text."""
    text, size = passage.text, _SAMPLED_CHARACTERS
    slices = [Turn("assistant", text[begin : begin + size]) for begin in range(0, len(text), size)]
    return [Turn("user", passage.prompt), *slices]


def clean_text(text: str) -> str:
    """Cleans and strips the text of a turn: converts HTML to Markdown, removes page remains and extra blank lines."""
    text = without_surrogates(text.replace("\r\n", "\n"))
    if is_html(text):
        text = html_to_markdown(text)
    text = _INVISIBLE.sub("", text)
    text = _COPY_CODE.sub("", text)
    text = _PAGINATION.sub("", text).strip()
    for button in _BUTTONS:
        text = text.removesuffix(button).rstrip()
    return _BLANK_LINES.sub("\n\n", text)


def is_html(text: str) -> bool:
    """Tells whether a turn is rendered HTML, as opposed to text about HTML.

    A rendered turn begins with a bare block tag or the page's `div`, and ends with the end tag of a block. Text with a
    code fence is already Markdown.
    """
    return "```" not in text and _STARTS_AS_HTML.match(text) is not None and _ENDS_AS_HTML.search(text) is not None


def html_to_markdown(text: str) -> str:
    """Converts a turn's HTML to Markdown, with fenced code blocks and without buttons and pictures."""
    soup = bs4.BeautifulSoup(text, "html.parser")
    for furniture in soup.find_all(["button", "svg", "script", "style", "img"]):
        furniture.decompose()
    for block in soup.find_all("pre"):
        code = block.find("code")
        if code is None:
            continue
        language = _code_language(code)
        # The block also has a bar with the language's name, which is not part of the code.
        plain = soup.new_tag("code", attrs={"class": f"language-{language}"} if language else {})
        plain.string = code.get_text().rstrip("\n")
        block.clear()
        block.append(plain)
    return markdownify.MarkdownConverter(
        heading_style=markdownify.ATX,
        bullets="-",
        escape_underscores=False,
        escape_asterisks=False,
        code_language_callback=lambda block: _code_language(block.find("code")) or "",
    ).convert_soup(soup)


def _code_language(code: bs4.element.Tag | None) -> str | None:
    """Returns the language named by a code block's class."""
    classes = code.get("class") if code is not None else None
    return next((name.removeprefix("language-") for name in classes or () if name.startswith("language-")), None)


class Copies:
    """Detects copies of earlier conversations by digests of their text.

    Two conversations are copies, whatever their system turns, if all other turns are equal, or if they begin with the
    same exchange of at least `SHARED_OPENING` characters. This keeps a conversation that was shared twice out of both
    splits at once.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def is_new(self, turns: Sequence[Turn]) -> bool:
        """Records a cleaned conversation; returns False if it is a copy of an earlier one."""
        spoken = [turn.text for turn in turns if turn.role != "system"]
        opening = spoken[:2]
        digests = {_text_digest(spoken)}
        if sum(map(len, opening)) >= SHARED_OPENING:
            digests.add(_text_digest(["opening", *opening]))
        is_new = self._seen.isdisjoint(digests)
        self._seen |= digests
        return is_new


def _text_digest(texts: Sequence[str]) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()


def language(turns: Sequence[Turn]) -> str:
    """Identifies the language of a cleaned conversation from sampled turns, without code and addresses.

    Returns:
      ISO 639 code such as "en"; "mul" for text in several scripts that the identifier takes for English.
    """
    stride = max(1, len(turns) // _SAMPLED_TURNS)
    sampled = [_CODE.sub(" ", turn.text)[:_SAMPLED_CHARACTERS] for turn in turns[::stride]]
    text = "\n".join(sampled)
    letters = [letter for letter in text if letter.isalpha()]
    name = str(py3langid.classify(text)[0])
    if name == "en" and sum(letter <= _LAST_LATIN for letter in letters) < _LATIN_SHARE * len(letters):
        return "mul"
    return name
