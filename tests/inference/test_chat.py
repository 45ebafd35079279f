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
    with pytest.raises(InputError, match=r"no chat template: .*--template chatml, llama-2, vicuna"):
        chat_format(load_tokenizer(tmp_path))
    with pytest.raises(InputError, match="unknown chat template 'vicunna': did you mean 'vicuna'"):
        chat_format(tiny, "vicunna")
    with pytest.raises(InputError, match=r"no <\|im_end\|> token, which the chat template 'chatml' needs"):
        chat_format(tiny, "chatml")
    assert "chatml" in TEMPLATES
