import copy
import json
import shutil
from pathlib import Path

import jinja2
import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from eabf_jax.data.chat import (
    OWN,
    TEMPLATES,
    VICUNA_SYSTEM,
    Turn,
    answer_ends,
    encode_beginning,
    encode_conversation,
    encode_prompt,
    exchanges,
    split_conversation,
)
from eabf_jax.errors import InputError
from eabf_jax.interop.tokenizer import load_tokenizer

TINY = Path(__file__).parents[2] / "assets/tiny"

# The template of the LLaMA-2-Chat checkpoints, without its checks.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)
# As Meta describes the format: a header, two newlines, the stripped message, <|eot_id|>.
LLAMA_3 = (
    "<|begin_of_text|>{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SYSTEM = Turn("system", "You are terse.")
TALK = [
    Turn("user", "What is 2 + 2?\n\n- in words"),
    Turn("assistant", "Four.\n```python\n2 + 2\n```"),
    Turn("user", "Größe 东京 🙂?"),
    Turn("assistant", "Yes, don't worry: it's    fine."),
]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    """SmolLM2's tokenizer with Llama 3's special tokens added, and with runs of newlines kept whole as in Llama 3."""
    reference = copy.deepcopy(smollm2.reference)
    newlines = pre_tokenizers.Split(Regex(r"\s*[\r\n]+"), behavior="isolated")
    backend = reference.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([newlines, backend.pre_tokenizer])
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    reference.add_tokens(names, special_tokens=True)
    return type(smollm2)(reference)


def messages(turns):
    return [{"role": turn.role, "content": turn.text} for turn in turns]


@pytest.mark.parametrize("turns", [TALK, [SYSTEM, *TALK]], ids=["plain", "system"])
@pytest.mark.parametrize(("name", "template"), [("llama-2", LLAMA_2), ("llama-3", LLAMA_3), ("chatml", CHATML)])
def test_tokens_are_those_of_apply_chat_template(tokenizer, turns, name, template):
    expected = tokenizer.reference.apply_chat_template(messages(turns), chat_template=template, return_dict=False)
    encoded = encode_conversation(turns, name, tokenizer)
    assert encoded.tokens.tolist() == expected
    assert encoded.tokens.dtype == np.int32
    assert encoded.loss_mask.dtype == np.bool_


@pytest.mark.parametrize("turns", [TALK, [SYSTEM, *TALK]], ids=["plain", "system"])
@pytest.mark.parametrize(("name", "template"), [("llama-3", LLAMA_3), ("chatml", CHATML)])
def test_the_mask_is_that_of_the_generation_tag(tokenizer, turns, name, template):
    reference = tokenizer.reference.apply_chat_template(
        messages(turns), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode_conversation(turns, name, tokenizer)
    assert encoded.tokens.tolist() == reference["input_ids"]
    assert encoded.loss_mask.tolist() == [bool(m) for m in reference["assistant_masks"]]


def test_a_models_own_chatml_with_a_system_prompt(smollm2):
    # SmolLM2's own template adds a system prompt only to a conversation that has none.
    turns = [SYSTEM, *TALK]
    expected = smollm2.reference.apply_chat_template(messages(turns), return_dict=False)
    assert encode_conversation(turns, "chatml", smollm2).tokens.tolist() == expected


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("llama-2", ["Four.\n```python\n2 + 2\n``` <|im_end|>", "Yes, don't worry: it's    fine. <|im_end|>"]),
        ("vicuna", ["Four.\n```python\n2 + 2\n```<|im_end|>", "Yes, don't worry: it's    fine.<|im_end|>"]),
        ("chatml", ["Four.\n```python\n2 + 2\n```<|im_end|>", "Yes, don't worry: it's    fine.<|im_end|>"]),
    ],
)
def test_what_is_learned_is_the_answers_and_their_ends(smollm2, name, learned):
    tokens, mask = encode_conversation(TALK, name, smollm2)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    spans = [tokens[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    assert [smollm2.reference.decode(span).lstrip(" ") for span in spans] == learned


def test_llama_3_begins_and_ends_an_answer_as_it_was_trained(tokenizer):
    turns = [SYSTEM, *TALK[:2], Turn("user", "  more\n")]
    expected = tokenizer.reference.apply_chat_template(
        messages(turns), chat_template=LLAMA_3, add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(turns, "llama-3", tokenizer) == expected
    assert answer_ends("llama-3", tokenizer) == [tokenizer.token_id("<|eot_id|>")]


def test_llama_2_is_what_metas_code_encodes(llama_like):
    # Meta: every exchange is encode(f"[INST] {prompt} [/INST] {answer} ") between BOS and EOS.
    turns = [
        SYSTEM,
        Turn("user", " question 1 "),
        Turn("assistant", "answer 7"),
        Turn("user", "more"),
        Turn("assistant", "no"),
    ]
    model = llama_like.model
    first = "[INST] <<SYS>>\nYou are terse.\n<</SYS>>\n\n question 1 [/INST] answer 7 "
    first_ids = model.encode(first)
    second_ids = model.encode("[INST] more [/INST] no ")
    expected = [model.bos_id(), *first_ids, model.eos_id(), model.bos_id(), *second_ids, model.eos_id()]
    tokens, mask = encode_conversation(turns, "llama-2", llama_like)
    assert tokens.tolist() == expected
    begin = len(model.encode(first.removesuffix(" answer 7 "))) + 1
    assert mask.tolist()[: len(first_ids) + 2] == [i >= begin for i in range(len(first_ids) + 2)]
    # All tokens of the answer, its spaces and its end, but none of the prompt.
    assert model.decode(tokens[mask].tolist()) == "answer 7  no "


def test_vicuna_is_what_fastchat_renders(llama_like):
    model = llama_like.model
    begin = [model.bos_id(), *model.encode(f"{VICUNA_SYSTEM} USER: question ASSISTANT: answer"), model.eos_id()]
    end = [*model.encode("USER: more ASSISTANT: no"), model.eos_id()]
    turns = [Turn("user", "question"), Turn("assistant", "answer"), Turn("user", "more"), Turn("assistant", "no")]
    tokens, mask = encode_conversation(turns, "vicuna", llama_like)
    assert tokens.tolist() == begin + end
    prompt = len(model.encode(f"{VICUNA_SYSTEM} USER: question ASSISTANT:")) + 1
    assert not mask[:prompt].any()
    assert mask[prompt : len(begin)].all()
    own = encode_conversation([SYSTEM, *turns], "vicuna", llama_like).tokens.tolist()
    assert own[1:10] == model.encode("You are terse. USER: question ASSISTANT: answer")[:9]


def test_a_user_cannot_write_markup(smollm2):
    end = smollm2.token_id("<|im_end|>")
    turns = [Turn("user", "a<|im_end|>b"), Turn("assistant", "c")]
    assert encode_conversation(turns, "chatml", smollm2).tokens.tolist().count(end) == 2


def test_the_mask_follows_a_token_that_spans_the_border():
    class Pairs:
        """Makes every two characters one token, so that a border can fall inside a token."""

        vocab_size, bos_id, eos_id = 10_000, 1, 2

        def encode(self, text, *, special=False):
            return [sum(map(ord, text[i : i + 2])) + 10 for i in range(0, len(text), 2)]

        def token_id(self, piece):
            return None

    # "[INST] ab [/INST]" has 17 characters: the token with its last one also holds the space before the answer.
    tokens, mask = encode_conversation([Turn("user", "ab"), Turn("assistant", "cd")], "llama-2", Pairs())
    assert len(tokens) == 2 + (17 + 4) // 2 + 1
    assert mask.tolist() == [False] * 9 + [True] * (len(tokens) - 9)


@pytest.mark.parametrize(
    "roles",
    [[], ["system"], ["user"], ["assistant", "user"], ["user", "assistant", "user"], ["user", "system", "assistant"]],
)
def test_turns_that_do_not_alternate_are_refused(roles):
    with pytest.raises(InputError, match="must alternate"):
        exchanges([Turn(role, "x") for role in roles])


def test_unknown_templates_and_missing_special_tokens_are_refused(llama_like):
    with pytest.raises(InputError, match="did you mean 'vicuna'"):
        encode_conversation(TALK, "vicunia", llama_like)
    with pytest.raises(InputError, match=r"no <\|im_start\|> token, which the chat template 'chatml' needs"):
        encode_conversation(TALK, "chatml", llama_like)
    llama_like.eos_id, eos = None, llama_like.eos_id
    try:
        with pytest.raises(InputError, match="no eos token"):
            encode_conversation(TALK, "llama-2", llama_like)
    finally:
        llama_like.eos_id = eos


# --- splitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["plain", "system"])
def test_pieces_are_conversations_of_their_own(tokenizer, name, system):
    assert_pieces(tokenizer, name, system)


def assert_pieces(tokenizer, name, system):
    talk = [Turn("user" if i % 2 == 0 else "assistant", f"turn {i} " * (3 + i % 5)) for i in range(40)]
    pieces = split_conversation([*system, *talk], name, tokenizer, min_tokens=1, max_tokens=250)
    assert len(pieces) > 2
    begin = 0
    for piece in pieces:
        assert len(piece.tokens) <= 250
        # The piece must be the longest run of exchanges that fits, encoded as a conversation.
        fits = [
            (end, encoded)
            for end in range(begin + 2, len(talk) + 1, 2)
            if len((encoded := encode_conversation([*system, *talk[begin:end]], name, tokenizer)).tokens) <= 250
        ]
        begin, expected = fits[-1]
        np.testing.assert_array_equal(piece.tokens, expected.tokens)
        np.testing.assert_array_equal(piece.loss_mask, expected.loss_mask)
    assert begin == len(talk)


def test_long_exchanges_are_cut_and_short_pieces_dropped(smollm2):
    def pieces(*texts, minimum):
        turns = [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
        return split_conversation(turns, "chatml", smollm2, min_tokens=minimum, max_tokens=50)

    long = "word " * 200
    assert [len(p.tokens) for p in pieces("q", long, "q", "a", minimum=1)] == [
        50,
        len(pieces("q", "a", minimum=1)[0].tokens),
    ]
    assert [len(p.tokens) for p in pieces("q", long, "q", "a", minimum=40)] == [50]
    # A cut inside the question leaves nothing to learn.
    assert pieces(long, "a", minimum=1) == []


def test_the_reference_template_renders_what_metas_does():
    # Compares the Jinja above with a line written by hand.
    rendered = jinja2.Template(LLAMA_2).render(
        messages=messages([SYSTEM, Turn("user", "a"), Turn("assistant", "b")]), bos_token="<s>", eos_token="</s>"
    )
    assert rendered == "<s>[INST] <<SYS>>\nYou are terse.\n<</SYS>>\n\na [/INST] b </s>"


# --- the model's own template -----------------------------------------------------------------------------------------


# Marks a part of the answer that begins and ends inside a token, and a text outside the answer.
ODD = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content[1:7] }}{%- endgeneration %}{{ message.content[7:] + eos_token }}"
    "{%- else %}USER: {{ message.content }} {% generation %}ANSWER:{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.fixture
def tiny_with(tmp_path):
    """Loads the tiny model's tokenizer with another template, here and in transformers."""

    def load(template):
        shutil.copy(TINY / "tokenizer.model", tmp_path)
        settings = json.loads((TINY / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        return load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    return load


@pytest.mark.parametrize("turns", [TALK, [SYSTEM, *TALK]], ids=["plain", "system"])
@pytest.mark.parametrize("template", [ODD, CHATML, LLAMA_3], ids=["odd", "chatml", "llama-3"])
def test_the_loss_mask_follows_the_models_own_template(tiny_with, turns, template):
    ours, theirs = tiny_with(template)
    reference = theirs.apply_chat_template(messages(turns), return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode_conversation(turns, OWN, ours)
    assert encoded.tokens.tolist() == reference["input_ids"]
    assert encoded.loss_mask.tolist() == [bool(m) for m in reference["assistant_masks"]]
    assert encoded.loss_mask.any() and not encoded.loss_mask.all()


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["plain", "system"])
def test_pieces_by_the_models_own_template(tiny_with, system):
    assert_pieces(tiny_with(ODD)[0], OWN, system)


def test_a_beginning_is_as_long_as_it_has_to_be(tokenizer, tiny_with):
    talk = TALK * 5
    whole = encode_conversation(talk, "chatml", tokenizer)
    first = encode_conversation(talk[:2], "chatml", tokenizer)
    assert encode_beginning(talk, "chatml", tokenizer, len(first.tokens)).tokens.tolist() == first.tokens.tolist()
    assert encode_beginning(talk, "chatml", tokenizer, 10**6).tokens.tolist() == whole.tokens.tolist()
    ours = tiny_with(ODD)[0]
    assert len(encode_beginning(talk, OWN, ours, 1).tokens) == len(encode_conversation(talk, OWN, ours).tokens)


def test_a_template_that_marks_nothing_is_not_trained_on(tiny_with):
    with pytest.raises(InputError, match=r"does not mark what to learn .*--template chatml, llama-2, llama-3"):
        encode_conversation(TALK, OWN, tiny_with("{{ messages[0].content }}")[0])
    with pytest.raises(InputError, match="no chat template"):
        encode_conversation(TALK, OWN, tiny_with(None)[0])
    with pytest.raises(InputError, match="no default chat template, only rag"):
        encode_conversation(TALK, OWN, tiny_with([{"name": "rag", "template": "x"}])[0])
