"""Conversations to prompts, against transformers' `apply_chat_template` and the form that models are trained on."""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from eabf_jax.data.chat import TEMPLATES, Turn, encode_conversation
from eabf_jax.errors import InputError
from eabf_jax.inference.chat import chat_format, render
from eabf_jax.interop.tokenizer import Tokenizer, load_tokenizer

TINY = Path(__file__).parents[2] / "assets/tiny"
TALK = [Turn("user", "Hello there"), Turn("assistant", "Hi! How are you?"), Turn("user", "  Fine, <s> thanks.")]
SYSTEM = Turn("system", "Be brief.")


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return load_tokenizer(TINY)


def test_the_tiny_models_template_is_the_one_that_it_was_trained_on(tiny: Tokenizer) -> None:
    spoken = [*TALK[:2], Turn("user", "Fine, thanks.")]
    for turns in (spoken, [SYSTEM, *spoken]):
        trained = encode_conversation([*turns, Turn("assistant", "Bye")], "vicuna", tiny).tokens.tolist()
        found = chat_format(tiny).encode(turns)
        assert trained[: len(found)] == found
        assert tiny.decode(trained[len(found) :]) == "Bye</s>"
        assert chat_format(tiny, "vicuna").encode(turns) == found
    assert chat_format(tiny).stop_tokens == (2,)


@pytest.mark.parametrize("turns", [TALK, [SYSTEM, *TALK], TALK[:1]])
def test_templates_are_rendered_as_in_transformers(tiny: Tokenizer, turns: list[Turn]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    source = (
        "{%- for message in messages %}\n    {%- if loop.index0 > 5 %}{% break %}{% endif %}\n"
        "<{{ message.role }}>{{ message['content'] | trim }}{{ eos_token }}\n{%- endfor %}\n"
        "{% if add_generation_prompt %}{{ bos_token }}{{ messages | tojson }}{% endif %}"
    )
    for template in (source, tiny.chat_template):
        assert template is not None
        expected = theirs.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        assert render(template, turns, tiny) == expected
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_format(tiny).encode(turns) == expected


# What transformers gives a template: each of these renders another text where it is missing or has another value.
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
    """The model's pad_token_id does not make a pad_token of the tokenizer's."""
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "pad_token_id": 2}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    source = "{{ pad_token is defined }}{{ pad_token }}|{{ bos_token }}"
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "x"}], chat_template=source, add_generation_prompt=True, tokenize=False
    )
    assert render(source, TALK[:1], load_tokenizer(tmp_path)) == expected == "False|<s>"


LLAMA_3_OWN = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content "
    "| trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (LLAMA_3_OWN, ["</s>", "<|eot_id|>"]),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", ["</s>"]),
        # Nothing is written behind an answer, or no special token, or the template refuses what it is tried with.
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}", ["</s>"]),
        ("{% for m in messages %}{{ m.content }} END\n{% endfor %}", ["</s>"]),
        ("{{ raise_exception('no') if messages | length > 1 }}", ["</s>"]),
    ],
)
def test_an_answer_ends_where_the_template_ends_it(tmp_path: Path, own: str, expected: list[str]) -> None:
    """Also where no generation_config.json says so."""
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    settings = {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": names, "chat_template": own}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.decode([i]) for i in chat_format(tokenizer).stop_tokens] == expected
    assert [tokenizer.decode([i]) for i in chat_format(tokenizer, "llama-3").stop_tokens] == ["</s>", "<|eot_id|>"]


@pytest.mark.parametrize("template", ["llama-2", "vicuna"])
def test_a_named_template_leads_to_the_answer_that_is_trained(tiny: Tokenizer, template: str) -> None:
    for turns in (TALK, [SYSTEM, *TALK]):
        found = chat_format(tiny, template).encode(turns)
        trained, mask = encode_conversation([*turns, Turn("assistant", "Bye")], template, tiny)
        assert trained.tolist()[: len(found)] == found
        assert mask[len(found) :].all() and not mask[len(found) - 4 : len(found)].any()


def test_what_a_user_writes_is_no_markup_in_a_named_template(tiny: Tokenizer) -> None:
    assert chat_format(tiny, "vicuna").encode(TALK).count(1) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only one turn') }}", "does not take this conversation: only one turn"),
        ("{% if %}", "does not take this conversation"),
        ("{{ messages[9].content.strip() }}", "does not take this conversation"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "does not take this conversation"),
    ],
)
def test_templates_that_fail(tiny: Tokenizer, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render(source, TALK, tiny)


def test_no_template_and_unknown_templates(tiny: Tokenizer, tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    with pytest.raises(InputError, match=r"no chat template: .*--template chatml, llama-2, llama-3, vicuna"):
        chat_format(load_tokenizer(tmp_path))
    with pytest.raises(InputError, match="unknown chat template 'vicunna': did you mean 'vicuna'"):
        chat_format(tiny, "vicunna")
    with pytest.raises(InputError, match=r"no <\|im_end\|> token, which the chat template 'chatml' needs"):
        chat_format(tiny, "chatml")
    assert "chatml" in TEMPLATES
