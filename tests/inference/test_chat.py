"""Prompts from conversations, and the tokens that end an answer, against the form that models are trained on."""

import json
import shutil
from pathlib import Path

import pytest
from talk import SYSTEM, TALK

from eabf_jax.data.chat import TEMPLATES, Turn, encode_conversation
from eabf_jax.errors import InputError
from eabf_jax.inference.chat import chat_format
from eabf_jax.interop.tokenizer import Tokenizer, load_tokenizer

TINY = Path(__file__).parents[2] / "assets/tiny"


def test_the_tiny_models_template_is_the_one_that_it_was_trained_on(tokenizer: Tokenizer) -> None:
    spoken = [*TALK[:2], Turn("user", "Fine, thanks.")]
    for turns in (spoken, [SYSTEM, *spoken]):
        trained = encode_conversation([*turns, Turn("assistant", "Bye")], "vicuna", tokenizer).tokens.tolist()
        found = chat_format(tokenizer).encode(turns)
        assert trained[: len(found)] == found
        assert tokenizer.decode(trained[len(found) :]) == "Bye</s>"
        assert chat_format(tokenizer, "vicuna").encode(turns) == found
    assert chat_format(tokenizer).stop_tokens == (2,)


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
        # The template writes nothing, or no special token, after an answer, or it refuses the trial conversation.
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}", ["</s>"]),
        ("{% for m in messages %}{{ m.content }} END\n{% endfor %}", ["</s>"]),
        ("{{ raise_exception('no') if messages | length > 1 }}", ["</s>"]),
    ],
)
def test_an_answer_ends_where_the_template_ends_it(tmp_path: Path, own: str, expected: list[str]) -> None:
    """This does not need a generation_config.json."""
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    settings = {"tokenizer_class": "LlamaTokenizer", "additional_special_tokens": names, "chat_template": own}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.decode([i]) for i in chat_format(tokenizer).stop_tokens] == expected
    assert [tokenizer.decode([i]) for i in chat_format(tokenizer, "llama-3").stop_tokens] == ["</s>", "<|eot_id|>"]


@pytest.mark.parametrize("template", ["llama-2", "vicuna"])
def test_a_named_template_leads_to_the_answer_that_is_trained(tokenizer: Tokenizer, template: str) -> None:
    for turns in (TALK, [SYSTEM, *TALK]):
        found = chat_format(tokenizer, template).encode(turns)
        trained, mask = encode_conversation([*turns, Turn("assistant", "Bye")], template, tokenizer)
        assert trained.tolist()[: len(found)] == found
        assert mask[len(found) :].all() and not mask[len(found) - 4 : len(found)].any()


def test_what_a_user_writes_is_no_markup_in_a_named_template(tokenizer: Tokenizer) -> None:
    assert chat_format(tokenizer, "vicuna").encode(TALK).count(1) == 1


def test_no_template_and_unknown_templates(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    with pytest.raises(InputError, match=r"no chat template: .*--template chatml, llama-2, llama-3, vicuna"):
        chat_format(load_tokenizer(tmp_path))
    with pytest.raises(InputError, match="unknown chat template 'vicunna': did you mean 'vicuna'"):
        chat_format(tokenizer, "vicunna")
    with pytest.raises(InputError, match=r"no <\|im_end\|> token, which the chat template 'chatml' needs"):
        chat_format(tokenizer, "chatml")
    assert "chatml" in TEMPLATES
