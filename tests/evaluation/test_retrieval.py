"""Prompts of an exact length, and scores against greedy generation and NumPy."""

import numpy as np
import pytest
from flax import nnx

from eabf_jax.errors import InputError
from eabf_jax.evaluation.retrieval import Prompt, Wording, encode, fitted, measure
from eabf_jax.inference import Generator
from eabf_jax.interop.tokenizer import Tokenizer
from eabf_jax.model import Llama, LlamaConfig
from eabf_jax.rope import Scheme, scheme

WINDOW = 16
SCHEMES = {
    "default": scheme("default"),
    "eabf": scheme("eabf", base=20_000.0, pretrained_window=WINDOW, unscaled_layers=1),
    "yarn": scheme("yarn", factor=4.0, pretrained_window=WINDOW, beta_fast=2.0, beta_slow=0.5),
    "dynamic_ntk": scheme("dynamic_ntk", factor=2.0, pretrained_window=WINDOW),
}


def model_of(rope: Scheme) -> Llama:
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=WINDOW, eos_token_id=None, rope=rope,
        initializer_range=0.5,
    )  # fmt: skip
    return Llama(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", SCHEMES)
def test_hits_are_what_greedy_generation_finds(name: str) -> None:
    model = model_of(SCHEMES[name])
    contexts = np.random.default_rng(1).integers(0, 23, (8, 21)).tolist()
    # A scheme that follows the length uses that of prompt and answer.
    greedy = Generator(model, rope_length=24).generate(contexts, 3, stop_tokens=())
    prompts, expected = [], {}
    for number, (context, completion) in enumerate(zip(contexts, greedy, strict=True)):
        wrong = list(completion.tokens)
        wrong[number % 3] = (wrong[number % 3] + 1) % 23
        for depth, answer in ((2 * number, completion.tokens), (2 * number + 1, wrong)):
            prompts.append(Prompt(26, depth, context + answer, len(context)))
            expected[depth] = int(answer == completion.tokens)
    done: list[int] = []
    cells = measure(model, prompts, progress=done.append)
    assert {cell.depth: cell.hits for cell in cells} == expected
    assert [cell.total for cell in cells] == [1] * 16
    assert done == list(range(1, 17))


def test_cells_count_and_average_prompts_of_several_lengths() -> None:
    model = model_of(SCHEMES["eabf"])
    random = np.random.default_rng(2)
    prompts = [
        Prompt(length, depth, random.integers(0, 23, length - number % 2).tolist(), length - 3)
        for length in (30, 20)
        for depth in (0, 50)
        for number in range(3)
    ]
    cells = measure(model, prompts, batch_size=2)
    # No earlier token attends to the padding.
    padded = np.array([prompt.tokens + [0] * (30 - len(prompt.tokens)) for prompt in prompts], np.int32)
    all_scores = np.asarray(nnx.jit(lambda model, x: model(x))(model, padded), np.float64)
    assert [(cell.length, cell.depth, cell.total) for cell in cells] == [
        (30, 0, 3), (30, 50, 3), (20, 0, 3), (20, 50, 3)
    ]  # fmt: skip
    for cell in cells:
        hits, losses = [], []
        for prompt, row in zip(prompts, all_scores, strict=True):
            if (prompt.length, prompt.depth) != (cell.length, cell.depth):
                continue
            scores = row[prompt.begin - 1 : len(prompt.tokens) - 1]
            answer = prompt.tokens[prompt.begin :]
            probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            losses.append(-np.log(probabilities[np.arange(len(answer)), answer]).mean())
            hits.append(scores.argmax(axis=1).tolist() == answer)
        assert cell.hits == sum(hits)
        assert cell.loss == pytest.approx(np.mean(losses), abs=1e-5)  # float32 in the model


def plain(count: int) -> Wording:
    return Wording("Read this. " + "word and " * count + "What is it?", "It is ", "4711")


@pytest.mark.parametrize("guess", [0, 1, 37, 40, 500])
@pytest.mark.parametrize("chat", [True, False])
def test_the_longest_text_that_fits_is_found_from_any_guess(tokenizer: Tokenizer, guess: int, chat: bool) -> None:
    tokens, begin, count = fitted(tokenizer, plain, 200, guess=guess, chat=chat)
    assert tokens == encode(tokenizer, plain(count), chat=chat)
    assert len(tokens) <= 200 < len(encode(tokenizer, plain(count + 1), chat=chat))
    assert tokenizer.decode(tokens[begin:]) == "4711"
    assert tokenizer.decode(tokens[:begin]).endswith("It is ")


def test_the_answer_begins_with_the_token_that_holds_its_first_character(tokenizer: Tokenizer) -> None:
    """The tokenizer has one token for " the"; without "the", the space is a separate token."""

    def worded(count: int) -> Wording:
        return Wording("word " * count, "It is ", "the")

    tokens, begin, _ = fitted(tokenizer, worded, 99, guess=9, chat=False)
    assert tokens[begin:] == tokenizer.encode("It is the")[-1:] != tokenizer.encode("It is ")[-1:]


def test_a_length_that_the_question_alone_exceeds_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="length 10: the question alone has"):
        fitted(tokenizer, plain, 10, guess=7, chat=False)


def test_the_reply_is_begun_in_the_chat_template(tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(encode(tokenizer, Wording("How?", "Like", " this"), chat=True))
    assert text.startswith("<s> A chat between")
    assert text.endswith(" USER: How? ASSISTANT: Like this")
    assert tokenizer.decode(encode(tokenizer, Wording("How?", "Like", " this"), chat=False)) == "<s> How? Like this"


def test_a_template_may_strip_the_reply(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for message in messages %}{{ message.content | trim }}</s>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    tokens, begin, _ = fitted(tokenizer, plain, 200, guess=40, chat=True)
    assert tokenizer.decode(tokens[begin:]) == "4711"


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ raise_exception('no') }}"])
def test_a_template_that_does_not_show_the_reply_is_refused(
    tokenizer: Tokenizer, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(InputError, match="--no-chat-template leaves the template out"):
        encode(tokenizer, plain(1))
