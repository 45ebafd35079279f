import jinja2
import numpy as np
import pytest

from eabf_jax.data.chat import (
    TEMPLATES,
    VICUNA_SYSTEM,
    Turn,
    encode_conversation,
    exchanges,
    split_conversation,
)
from eabf_jax.errors import InputError

# The template that the LLaMA-2-Chat checkpoints carry, without its checks.
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
SYSTEM = Turn("system", "You are terse.")
TALK = [
    Turn("user", "What is 2 + 2?\n\n- in words"),
    Turn("assistant", "Four.\n```python\n2 + 2\n```"),
    Turn("user", "Größe 东京 🙂?"),
    Turn("assistant", "Yes, don't worry: it's    fine."),
]


def messages(turns):
    return [{"role": turn.role, "content": turn.text} for turn in turns]


@pytest.mark.parametrize("turns", [TALK, [SYSTEM, *TALK]], ids=["plain", "system"])
@pytest.mark.parametrize(("name", "template"), [("llama-2", LLAMA_2), ("chatml", CHATML)])
def test_tokens_are_those_of_apply_chat_template(smollm2, turns, name, template):
    expected = smollm2.reference.apply_chat_template(messages(turns), chat_template=template, return_dict=False)
    encoded = encode_conversation(turns, name, smollm2)
    assert encoded.tokens.tolist() == expected
    assert encoded.tokens.dtype == np.int32
    assert encoded.loss_mask.dtype == np.bool_


@pytest.mark.parametrize("turns", [TALK, [SYSTEM, *TALK]], ids=["plain", "system"])
def test_the_mask_of_chatml_is_that_of_the_generation_tag(smollm2, turns):
    reference = smollm2.reference.apply_chat_template(
        messages(turns), chat_template=CHATML, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode_conversation(turns, "chatml", smollm2)
    assert encoded.tokens.tolist() == reference["input_ids"]
    assert encoded.loss_mask.tolist() == [bool(m) for m in reference["assistant_masks"]]


def test_a_models_own_chatml_with_a_system_prompt(smollm2):
    # SmolLM2's own template adds a system prompt only where the conversation has none.
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
    # Every token of the answer, of its spaces and its end; none of the prompt.
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
        """Every two characters are one token, so that a border can fall inside one."""

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
    with pytest.raises(InputError, match="have to alternate"):
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
def test_pieces_are_conversations_of_their_own(smollm2, name, system):
    talk = [Turn("user" if i % 2 == 0 else "assistant", f"turn {i} " * (3 + i % 5)) for i in range(40)]
    pieces = split_conversation([*system, *talk], name, smollm2, min_tokens=1, max_tokens=250)
    assert len(pieces) > 2
    begin = 0
    for piece in pieces:
        assert len(piece.tokens) <= 250
        # The longest run of exchanges that fits, encoded as a conversation, is what the piece has to be.
        fits = [
            (end, encoded)
            for end in range(begin + 2, len(talk) + 1, 2)
            if len((encoded := encode_conversation([*system, *talk[begin:end]], name, smollm2)).tokens) <= 250
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
    # Cut inside the question, nothing is left to learn.
    assert pieces(long, "a", minimum=1) == []


def test_the_reference_template_renders_what_metas_does():
    # The jinja above against one line written out by hand.
    rendered = jinja2.Template(LLAMA_2).render(
        messages=messages([SYSTEM, Turn("user", "a"), Turn("assistant", "b")]), bos_token="<s>", eos_token="</s>"
    )
    assert rendered == "<s>[INST] <<SYS>>\nYou are terse.\n<</SYS>>\n\na [/INST] b </s>"
