import pytest

from eabf_jax.data.chat import Turn
from eabf_jax.data.cleaning import (
    Copies,
    clean_conversation,
    clean_passage,
    clean_text,
    is_html,
    language,
    passage_turns,
)
from eabf_jax.data.forms import Passage, Unusable


def clean(*pairs):
    return clean_conversation([Turn(role, text) for role, text in pairs])


@pytest.mark.parametrize(
    ("turns", "left"),
    [
        # Turns before the first question are dropped.
        ("a:z u:a a:b", "u:a a:b"),
        # An unanswered last question is dropped.
        ("u:a a:b u:c", "u:a a:b"),
        # Empty turns are dropped, and their neighbours joined.
        ("u:a a: u:c a:d", "u:a|c a:d"),
        ("u:a a:b u: a:c", "u:a a:b|c"),
        # A repeated turn is kept once.
        ("u:a u:a a:b", "u:a a:b"),
        # System turns at the beginning are joined.
        ("s:s u:a a:b", "s:s u:a a:b"),
        ("s:s s:t s:s a:z u:a a:b", "s:s|t u:a a:b"),
        ("u:a s: a:b", "u:a a:b"),
    ],
)
def test_alternation_is_repaired(turns, left):
    roles = {"u": "user", "a": "assistant", "s": "system"}
    cleaned = clean(*((roles[turn[0]], turn[2:]) for turn in turns.split(" ")))
    text = " ".join(f"{turn.role[0]}:{turn.text}".replace("\n\n", "|") for turn in cleaned.turns)
    assert (text, cleaned.fault) == (left, None)


@pytest.mark.parametrize(
    ("pairs", "fault"),
    [
        ([], "no turns"),
        ([("assistant", "a"), ("system", "b")], "no turns"),
        ([("user", "a"), ("assistant", "\u200b")], "no answer"),
        ([("user", "a"), ("system", "s"), ("assistant", "b")], "later system turn"),
    ],
)
def test_what_cannot_be_repaired_is_dropped(pairs, fault):
    assert clean(*pairs) == ([], fault)


def test_texts_that_come_from_no_page_are_only_stripped():
    turns = [Turn("user", " Write a paragraph.\n"), Turn("assistant", "<p>1 / 2\ud800</p>")]
    assert clean_conversation(turns, from_pages=False).turns == [
        Turn("user", "Write a paragraph."),
        Turn("assistant", "<p>1 / 2\ufffd</p>"),
    ]
    assert clean_conversation(turns).turns[1].text == "1 / 2\ufffd"


def test_passages_are_left_as_they_are():
    assert clean_passage(Passage(" a\r\n", "<p>\ud800</p> ")) == (" a\r\n", "<p>\ufffd</p> ")
    for passage, reason in ((Passage("a", " "), "no answer"), (Passage("", ""), "no text")):
        with pytest.raises(Unusable, match=reason):
            clean_passage(passage)


def test_the_language_of_a_passage_is_that_of_all_of_it():
    header = "This text is in the public domain, and you may copy it, give it away or use it again. " * 5
    text = "Es war einmal ein Müller, der war arm, aber er hatte eine schöne Tochter. " * 100
    assert language(passage_turns(Passage("", header + text))) == "de"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\r\nb  ", "a\nb"),
        ("a\n\n\n \n\nb", "a\n\nb"),
        ("python\nCopy code\nprint(1)", "python\nprint(1)"),
        ("press Copy code twice", "press Copy code twice"),
        ("2 / 2\nanswer", "answer"),
        ("answer\n1 / 3", "answer"),
        ("2 / 2", ""),
        ("first\n1 / 2\nsecond", "first\n1 / 2\nsecond"),
        ("1 / 2 is a half", "1 / 2 is a half"),
        ("continueShare Prompt", "continue"),
        ("a\u200bb\ufeff", "ab"),
        ("a\ud800b", "a\ufffdb"),
    ],
)
def test_page_furniture_is_removed(text, expected):
    assert clean_text(text) == expected


PAGE = (
    '<div class="markdown prose w-full break-words dark:prose-invert light"><p>Use '
    "<strong>two</strong> &lt;b&gt; steps_of_it:</p><ol><li><p>First</p></li><li>Second</li></ol>"
    '<pre><div class="bg-black mb-4"><div class="flex">'
    "<span>python"
    '</span><button class="flex ml-auto"><svg></svg>Copy code</button></div><div class="p-4">'
    '<code class="!whitespace-pre hljs language-python">'
    '<span class="hljs-keyword">def</span> f(x):\n    return x ** 2\n</code></div></div></pre><h2>End</h2>'
    "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>"
)


def test_a_rendered_page_becomes_markdown():
    assert clean_text(PAGE).split("\n") == [
        "Use **two** <b> steps_of_it:",
        "",
        "1. First",
        "2. Second",
        "",
        "```python",
        "def f(x):",
        "    return x ** 2",
        "```",
        "",
        "## End",
        "",
        "| a | b |",
        "| --- | --- |",
        "| 1 | 2 |",
    ]


def test_a_block_without_code_is_kept():
    assert "plain" in clean_text("<p>x</p><pre>plain</pre>")


@pytest.mark.parametrize(
    "text",
    [
        "Use <p> for a paragraph, as in <p>this</p>",
        '<div class="modal fade" id="successModal"><p>code someone asked for</p></div>',
        "```html\n<p>code</p>\n```",
        "<p>only an opening",
        "a < b",
    ],
)
def test_text_about_html_is_left_alone(text):
    assert not is_html(text)
    assert clean_text(text) == text


def conversation(*texts):
    return [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]


def test_copies_are_found():
    copies = Copies()
    assert copies.is_new(conversation("hi", "hello"))
    assert not copies.is_new(conversation("hi", "hello"))
    assert not copies.is_new([Turn("system", "s"), *conversation("hi", "hello")])
    assert copies.is_new(conversation("hi", "hello", "more", "text"))
    long = "x" * 400
    assert copies.is_new(conversation(long, "answer", "b", "c"))
    assert not copies.is_new(conversation(long, "answer"))
    assert copies.is_new(conversation(long, "another answer"))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("How do I sort a list in Python?", "Call sorted on it. ```xs = sorted(liste, schlüssel=größe)```"), "en"),
        (("Wie sortiere ich eine Liste?", "Mit der eingebauten Funktion, die eine neue Liste zurückgibt."), "de"),
        (("Comment trier une liste ?", "Avec la fonction intégrée, qui renvoie une nouvelle liste triée."), "fr"),
        (
            ("我需要建立一個powerpoint你幫我摘要一篇內容", "當然,我很樂意幫助你建立 PowerPoint。以下是我建議的步驟"),
            None,
        ),
    ],
)
def test_languages(texts, expected):
    found = language(conversation(*texts))
    assert found == expected if expected else found != "en"


def test_english_mixed_with_another_script_is_not_english():
    english = "There is a business that supports research so that researchers can work in this field of science. "
    assert language(conversation(english, english)) == "en"
    assert language(conversation(english, "한국어 문장입니다. " * 6)) != "en"
