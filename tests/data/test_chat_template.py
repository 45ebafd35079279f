"""Chat templates in Jinja compared with transformers' `apply_chat_template`."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from talk import SYSTEM, TALK

from eabf_jax.data import chat_template
from eabf_jax.data.chat import Turn
from eabf_jax.errors import InputError
from eabf_jax.inference.chat import chat_format, render
from eabf_jax.interop.tokenizer import Tokenizer, load_tokenizer

TINY = Path(__file__).parents[2] / "assets/tiny"


@pytest.mark.parametrize("turns", [TALK, [SYSTEM, *TALK], TALK[:1]])
def test_templates_are_rendered_as_in_transformers(tokenizer: Tokenizer, turns: list[Turn]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    source = (
        "{%- for message in messages %}\n    {%- if loop.index0 > 5 %}{% break %}{% endif %}\n"
        "<{{ message.role }}>{{ message['content'] | trim }}{{ eos_token }}\n{%- endfor %}\n"
        "{% if add_generation_prompt %}{{ bos_token }}{{ messages | tojson }}{% endif %}"
    )
    for template in (source, tokenizer.chat_template):
        assert template is not None
        expected = theirs.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        assert render(template, turns, tokenizer) == expected
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_format(tokenizer).encode(turns) == expected


# Everything that transformers offers a template: each text changes if something is missing or has another value.
CONTEXT = (
    "{{ tools is none }} {{ documents is none }} {% if tools %}tools{% endif %} {{ tools }}",
    "{% if not tools is defined %}no {% endif %}tools, {% if documents is defined %}documents{% endif %}",
    "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ cls_token is defined }}|{{ note_token }}",
    "{{ messages | tojson }} {{ {'é': [1, 2], 'a': '<&>'} | tojson }}",
    "{{ {'é': 1, 'a': 2} | tojson(ensure_ascii=true, indent=2, sort_keys=true) }}",
    "{{ {'é': [1, 2]} | tojson(ensure_ascii=False, separators=(',', ':')) }} {{ [1] | tojson(indent=4) }}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ dict(a=1) | tojson }} {{ strftime_now('%Y') | length }} {{ '  a ' | trim }} {{ messages[0].name is defined }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n  {%- generation -%} x "
    "{%- endgeneration %}{% endfor %}{{ add_generation_prompt }}",
    "{% macro say(m) %}[{{ m.content }}]{% endmacro %}\n    {% if true %}\n  {{ say(messages[0]) }}\n  {% endif %}\n",
)


def test_what_a_template_can_use(tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "pad_token_id": 2}')
    settings = {"tokenizer_class": "LlamaTokenizer", "pad_token": "<unk>", "note_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK]
    for template in CONTEXT:
        expected = theirs.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        assert render(template, TALK, ours) == expected, template


def test_a_token_without_a_name_is_undefined(tmp_path: Path) -> None:
    """The model's pad_token_id does not define a pad_token of the tokenizer."""
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "pad_token_id": 2}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    source = "{{ pad_token is defined }}{{ pad_token }}|{{ bos_token }}"
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "x"}], chat_template=source, add_generation_prompt=True, tokenize=False
    )
    assert render(source, TALK[:1], load_tokenizer(tmp_path)) == expected == "False|<s>"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only one turn') }}", "does not accept this conversation: only one turn"),
        ("{% if %}", "does not accept this conversation"),
        ("{{ messages[9].content.strip() }}", "does not accept this conversation"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "does not accept this conversation"),
    ],
)
def test_templates_that_fail(tokenizer: Tokenizer, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render(source, TALK, tokenizer)


# Templates from strangers that would run for ever or fill the memory, and the end of each.
HOSTILE = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "takes more than",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}": "takes more than",
    "{% set ns = namespace(a=1) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}": "more",
    "{{ lipsum(n=10**7) }}": "takes more than",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": "renders more than",
    "{{ 'x' * 10**12 }}": "more than 2 GiB",
    "{{ 'x' | center(10**11) }}": "more than 2 GiB",
    "{{ [1] * 10**11 }}": "more than 2 GiB",
    "{{ '%100000000000d' % 1 }}": "does not accept",
    "{{ messages | tojson(indent=10**11) }}": "does not accept",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "recursion",
    "{{ raise_exception('two\nlines') }}": "two lines",
}


@pytest.mark.parametrize(("source", "message"), HOSTILE.items(), ids=[source[:40] for source in HOSTILE])
def test_hostile_templates_end(
    tokenizer: Tokenizer, source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    with pytest.raises(InputError, match=message) as caught:
        render(source, TALK, tokenizer)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert render("{{ messages[0].role }}", TALK, tokenizer) == TALK[0].role  # the next one is rendered again
