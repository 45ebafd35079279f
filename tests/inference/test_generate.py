"""The generator against the full forward pass, token by token."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import random_params

from eabf_jax import load
from eabf_jax.data.chat import Turn
from eabf_jax.errors import InputError
from eabf_jax.inference import Completion, Generator, Sampling, generate
from eabf_jax.inference.chat import chat_format
from eabf_jax.inference.generate import TOKENS_AT_ONCE
from eabf_jax.inference.sampling import split
from eabf_jax.interop.tokenizer import Tokenizer
from eabf_jax.model import Llama, LlamaConfig, decoder
from eabf_jax.model.attention import BACKENDS
from eabf_jax.model.kv_cache import empty_cache
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.parallel.topology import compile_only_devices, tpu_slice
from eabf_jax.rope import Scheme, compose, scheme

TINY = Path(__file__).parents[2] / "assets/tiny"
WINDOW = 16
NEW = 20  # more than one call of the loop generates
# Nearly all the time is compilation, so tests share this size, and lengths with caches of 32, 48 or 64 slots.
CHUNK = 16
# The promised bound; float32 sums in another order differ by about 1e-5 here.
PROMISED = 1e-4

EABF = scheme("eabf", pretrained_window=WINDOW, unscaled_layers=1)
ALL_SCALED = scheme("eabf", pretrained_window=WINDOW, unscaled_layers=0)
DYNAMIC = scheme("dynamic_ntk", factor=2.0, pretrained_window=WINDOW)
BY_PARTS: dict[str, Any] = {"pretrained_window": WINDOW, "beta_fast": 2.0, "beta_slow": 0.5}


# One scheme of each kind; tests/model/test_decoder.py compares the cached logits of all.
SCHEMES = {
    "eabf": EABF,
    "yarn": scheme("yarn", factor=4.0, **BY_PARTS),
    "dynamic_ntk": DYNAMIC,
    "compose": compose(scheme("dynamic_yarn", **BY_PARTS), EABF),
}


def model_of(rope: Scheme, layers: int = 2) -> Llama:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=WINDOW, eos_token_id=None, rope=rope,
    )  # fmt: skip
    return Llama.from_params(config, random_params(config), attention="reference")


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, 64, length).tolist() for length in lengths]


class FullForward:
    """Logits of up to three rows of at most 64 tokens, without a cache, in one program."""

    def __init__(self, model: Llama):
        self._run = jax.jit(lambda tokens, positions: model(tokens, positions))

    def logits(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the logits after each token of each row; those past its end are undefined."""
        tokens = np.zeros((3, 64), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        ends = np.zeros((3, 1), np.int32)
        ends[: len(rows), 0] = [len(row) - 1 for row in rows]
        # Constant positions after the end give a dynamic scheme the row's own length; causality hides those tokens.
        return np.asarray(self._run(tokens, jnp.minimum(np.arange(64), ends)))[: len(rows)]

    def __call__(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the logits after the last token of each row."""
        return np.stack([found[len(row) - 1] for found, row in zip(self.logits(rows), rows, strict=True)])

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        rows = [list(prompt) for prompt in prompts]
        for _ in range(count):
            for row, token in zip(rows, self(rows).argmax(-1).tolist(), strict=True):
                row.append(token)
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@functools.cache
def full_forward(name: str) -> FullForward:
    return FullForward(model_of(SCHEMES[name]))


@pytest.fixture(scope="module")
def eabf() -> Llama:
    return model_of(EABF)


@pytest.mark.parametrize("name", SCHEMES)
def test_greedy_text_is_the_full_forwards(name: str) -> None:
    """One batch has prompts that stay within the pretrained window, that cross it, and that begin beyond it."""
    full = full_forward(name)
    # A scheme that follows the length reads the row again for each token; these lengths need few programs.
    beyond, count = (20, 12) if SCHEMES[name].depends_on_length else (33, 16)
    prompts, generator = prompts_of(3, 13, beyond), Generator(model_of(SCHEMES[name]), prefill_chunk=CHUNK)
    np.testing.assert_allclose(generator.next_token_logits(prompts), full(prompts), atol=PROMISED, rtol=0)
    completions = generator.generate(prompts, count)
    assert [completion.tokens for completion in completions] == full.greedy(prompts, count)
    assert {completion.finish for completion in completions} == {"length"}


def test_a_backend_that_cannot_join_chunks_is_refused_before_the_first(eabf: Llama) -> None:
    generator = Generator(eabf, prefill_chunk=CHUNK, attention="splash")
    with pytest.raises(
        InputError, match=r"attention backend 'splash' cannot return log-sum-exps, which prompts longer"
    ):
        generator.generate(prompts_of(CHUNK + 1), 1)


def test_a_long_text_outgrows_its_cache(eabf: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    grown = generate._grown
    monkeypatch.setattr(generate, "_grown", lambda cache, slots, mesh: sizes.append(slots) or grown(cache, slots, mesh))
    prompts = prompts_of(3, 9)
    found = Generator(eabf, prefill_chunk=CHUNK).generate(prompts, 50)
    assert [completion.tokens for completion in found] == full_forward("eabf").greedy(prompts, 50)
    assert sizes == [64, 64]  # from 32, in both layers


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        # The device computes the next chunk while the host handles this one.
        ("cpu", [(1, 0), (17, 2), (33, 3), (40, 3)]),
        # The call that starts a chunk waits for its end, so tokens are returned before the next chunk starts.
        ("gpu", [(1, 0), (17, 1), (33, 2), (40, 3)]),
    ],
)
def test_tokens_are_told_as_they_come(
    eabf: Llama, platform: str, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[int] = []
    decode = generate._decode
    monkeypatch.setattr(generate, "_decode", lambda *arguments: chunks.append(1) or decode(*arguments))
    generator = Generator(eabf, prefill_chunk=CHUNK)
    monkeypatch.setattr(generate.jax, "default_backend", lambda: platform)
    stream = generator.stream(prompts_of(3, 14), 40)
    assert [(len(completions[0].tokens), len(chunks)) for completions in stream] == expected


def test_the_tpu_compiler_copies_no_cache() -> None:
    (device, *_) = compile_only_devices(tpu_slice("v4-8"))
    heads = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    config = dataclasses.replace(model_of(EABF).config, **heads)
    dtype = jnp.dtype("bfloat16")
    steps, numbers = split(Sampling())

    def arguments() -> tuple[decoder.Weights, generate._State, generate._Choice]:
        caches = tuple(empty_cache(1, 8, 18_432, 128, dtype) for _ in range(config.num_hidden_layers))
        row = jnp.zeros(1, jnp.int32)
        return (
            decoder.weights_of(decoder.source_of(Llama(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))),
            generate._State(caches, row, row, row > 0, None, jnp.int32(1)),
            generate._Choice(jax.tree.map(jnp.asarray, numbers), jax.random.key(0)[None], row),
        )

    def there(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    weights, state, choice = jax.tree.map(there, jax.eval_shape(arguments))
    setup = generate._Setup(config, dtype, BACKENDS["splash"], 8192, None, None)
    compiled = generate._decode.lower(setup, steps, weights, state, choice, 16).compile()
    keys = state.caches[0].k
    assert compiled.memory_analysis().temp_size_in_bytes < keys.size * keys.dtype.itemsize / 2


def tokens_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def test_a_dynamic_scheme_keeps_its_cache_within_the_pretrained_window() -> None:
    prompts = prompts_of(3, 6, 5)
    found = list(Generator(model_of(DYNAMIC), prefill_chunk=CHUNK).stream(prompts, 14))
    assert tokens_of(found[-1]) == full_forward("dynamic_ntk").greedy(prompts, 14)
    # The first token, ten from one call of the loop up to the window, and one from each further pass over the text.
    assert [len(completions[1].tokens) for completions in found] == [1, 11, 12, 13, 14]


def test_a_fixed_length_is_that_of_the_whole_text() -> None:
    """Every logit is that of a full forward pass over a text of the fixed length."""
    full, (prompt,) = full_forward("dynamic_ntk"), prompts_of(10)
    generator = Generator(model_of(DYNAMIC), rope_length=10 + NEW)
    (completion,) = generator.generate([prompt], NEW)
    (whole,) = full.logits([[*prompt, *completion.tokens]])
    assert whole[9 : 9 + NEW].argmax(-1).tolist() == completion.tokens
    assert full.greedy([prompt], NEW) != [completion.tokens]


def test_a_row_does_not_depend_on_its_neighbours(eabf: Llama) -> None:
    generator = Generator(eabf, prefill_chunk=CHUNK)
    prompts = prompts_of(5, 29, 11)
    sampling = Sampling(temperature=1.5, top_k=40, top_p=0.95, repetition_penalty=1.1)
    together = tokens_of(generator.generate(prompts, NEW, sampling=sampling, seeds=[7, 8, 9]))
    for row, seed in ((0, 7), (2, 9)):
        beside = [*prompts_of(29, 2), prompts[row]]
        assert tokens_of(generator.generate(beside, NEW, sampling=sampling, seeds=[4, 7, seed]))[2] == together[row]
    other = tokens_of(generator.generate(prompts, NEW, sampling=sampling, seeds=1))
    assert all(mine != theirs for mine, theirs in zip(other, together, strict=True))


def test_a_repetition_penalty_counts_prompt_and_text(eabf: Llama) -> None:
    """With so large a penalty, no token with a positive logit repeats while another has a positive logit."""
    generator, (prompt,) = Generator(eabf, prefill_chunk=CHUNK), prompts_of(9)
    (tokens,) = tokens_of(generator.generate([prompt], NEW, sampling=Sampling(repetition_penalty=1e6)))
    row = list(prompt)
    for token in tokens:
        logits = full_forward("eabf")([row])[0].astype(np.float64)
        used = np.array(sorted(set(row)))
        logits[used] = np.where(logits[used] < 0, logits[used] * 1e6, logits[used] / 1e6)
        assert token == logits.argmax()
        row.append(token)


def test_stop_tokens_end_a_row_and_not_the_others(eabf: Llama) -> None:
    generator, prompts = Generator(eabf, prefill_chunk=CHUNK), prompts_of(5, 12)
    first, second = tokens_of(generator.generate(prompts, NEW))
    stop = next(token for token in first[1:] if token not in second)
    place = first.index(stop)
    found = generator.generate(prompts, NEW, stop_tokens=[63 if stop != 63 else 62, stop])
    assert found[0] == Completion(first[:place], "", "stop_token")
    assert found[1].tokens[: len(second)] == second[: len(found[1].tokens)]
    assert found == list(generator.stream(prompts, NEW, stop_tokens=[63 if stop != 63 else 62, stop]))[-1]


def test_the_loop_hands_tokens_out_as_they_come(eabf: Llama) -> None:
    generator, prompts = Generator(eabf, prefill_chunk=CHUNK), prompts_of(5, 12)
    count = TOKENS_AT_ONCE + 4
    *before, last = generator.stream(prompts, count)
    assert [len(found[0].tokens) for found in before] == [1, 1 + TOKENS_AT_ONCE]
    assert all(completion.finish is None for found in before for completion in found)
    assert [completion.tokens[:1] for completion in last] == [completion.tokens for completion in before[0]]
    assert [len(completion.tokens) for completion in last] == [count, count]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Records the logits of the first new token each time prompts are read."""
    found: list[np.ndarray] = []
    logits = generate._logits

    def recorded(*arguments: Any) -> jax.Array:
        found.append(np.asarray(logits(*arguments)))
        return logits(*arguments)

    monkeypatch.setattr(generate, "_logits", recorded)
    return found


def test_int8_cache_is_near(eabf: Llama, read: list[np.ndarray]) -> None:
    """The prompt is read in chunks, and attends through the cache to all but the last one."""
    prompts = prompts_of(29, 17, 22)
    near, tokens = (
        tokens_of(Generator(eabf, cache=kind, prefill_chunk=CHUNK).generate(prompts, NEW)) for kind in ("int8", "model")
    )
    rounded, exact = read
    # Keys and values are off by up to 1/254 of their largest number; with sharp random weights, logits by up to 5 %.
    assert 1e-4 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()
    assert near[0][:3] == tokens[0][:3]


@pytest.mark.parametrize(("cache", "count", "chunk"), [("model", 17, 16), ("int8", 40, 8)])
def test_eight_devices_are_one(cache: str, count: int, chunk: int, read: list[np.ndarray]) -> None:
    """Two devices share the heads, and four rows of the mesh share three prompts; in a long text the caches grow."""
    prompts = prompts_of(3, 14, 12)
    sampling = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2)
    meshes, model = (None, make_mesh(MeshConfig(2, 2, 2))), model_of(ALL_SCALED, layers=1)
    one, eight = (Generator(model, mesh=mesh, cache=cache, prefill_chunk=chunk) for mesh in meshes)
    assert one.generate(prompts, count, sampling=sampling) == eight.generate(prompts, count, sampling=sampling)
    alone, shared = read
    np.testing.assert_allclose(alone, shared[:3], atol=PROMISED)
    if cache == "model":
        np.testing.assert_allclose(one.next_token_logits(prompts), eight.next_token_logits(prompts), atol=PROMISED)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 1, "tensor": 8}, "tensor=8 does not divide the model's 2 key-value heads"),
        ({"fsdp": 4, "context": 2}, "context=2: generation takes data, fsdp and tensor"),
    ],
)
def test_meshes_that_do_not_fit(eabf: Llama, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Generator(eabf, mesh=make_mesh(MeshConfig(**sizes)))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 64]], {}, "prompt 0: 64 is out of range, expected 0 to 63"),
        ([[-1]], {}, "prompt 0: -1 is out of range"),
        (["text"], {}, "prompt 0 is the text 'text'; token ids are needed, as tokenizer.encode gives them"),
        ("text", {}, "prompts is 'text'; a list of prompts is needed, each a list of token ids"),
        (7, {}, "prompts is 7; a list of prompts"),
        ([1, 2], {}, "prompt 0 is 1; a list of whole numbers is needed"),
        ([[1.0]], {}, r"prompt 0 is \[1.0\]; a list of whole numbers"),
        ([[True]], {}, r"prompt 0 is \[True\]"),
        ([[[1]]], {}, r"prompt 0 is \[\[1\]\]"),
        (np.ones((1, 1, 2), np.int32), {}, "prompt 0 is array"),
        ([np.ones(2)], {}, "prompt 0 is array"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens is 2.5; a positive whole number is needed"),
        ([[1]], {"max_new_tokens": "2"}, "max_new_tokens is '2'"),
        ([[1]], {"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ([[1]], {"seeds": -1}, "seeds: -1 is out of range"),
        ([[1]], {"seeds": 0.5}, "seeds is 0.5; a list of whole numbers"),
        ([[1]], {"stop_tokens": 2}, "stop_tokens is 2; a list of whole numbers"),
        ([[1]], {"stop_tokens": [64]}, "stop_tokens: 64 is out of range, expected 0 to 63"),
        ([[1]], {"stop_strings": "###"}, "stop_strings is '###'; a list of strings is needed"),
        ([[1]], {"sampling": {"temperature": 1}}, "sampling is .*; a Sampling is needed"),
        ([[1]], {"stop_strings": ["a"]}, "stop strings need a tokenizer"),
    ],
)
def test_bad_input(eabf: Llama, prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Generator(eabf).generate(prompts, **{"max_new_tokens": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "int4"}, "unknown kind of cache 'int4'"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"rope_length": -3}, "rope_length is -3"),
        ({"prefill_chunk": 16.0}, "prefill_chunk is 16.0; a positive whole number is needed"),
        ({"attention": "flash"}, "unknown attention backend 'flash'"),
    ],
)
def test_bad_options(eabf: Llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Generator(eabf, **options)


@pytest.fixture(scope="module")
def tiny() -> tuple[Generator, Tokenizer]:
    model, tokenizer = load(TINY, dtype="float32")
    assert tokenizer is not None
    return Generator(model, tokenizer), tokenizer


# Prompts of 49 to 64 tokens with this many new tokens share their programs.
FEW = 31


def test_text_is_the_tokens_and_ends_before_a_stop_string(tiny: tuple[Generator, Tokenizer]) -> None:
    generator, tokenizer = tiny
    prompt = [1, *tokenizer.encode("The history of the town. " * 7 + "The history of")]
    (whole,) = generator.generate([prompt], FEW)
    text = tokenizer.decode(prompt + whole.tokens)
    assert text == tokenizer.decode(prompt) + whole.text and whole.text.startswith(" ")
    stop = whole.text[20:24]
    *before, (last,) = generator.stream([prompt], FEW, stop_strings=["never there", stop])
    assert last.finish == "stop_string" and last.text == whole.text[: whole.text.index(stop)]
    assert whole.tokens[: len(last.tokens)] == last.tokens
    assert tokenizer.decode(prompt + last.tokens).find(stop, len(tokenizer.decode(prompt))) >= 0
    assert all(last.text.startswith(found.text) for (found,) in before)
    with pytest.raises(InputError, match="a stop string is empty"):
        generator.generate([prompt], 4, stop_strings=[""])


def test_the_tokenizers_end_token_ends_a_text(tiny: tuple[Generator, Tokenizer]) -> None:
    """The tiny model gives short answers to prompts in the form it was trained on."""
    generator, tokenizer = tiny
    (found,) = generator.generate([chat_format(tokenizer).encode([Turn("user", "Hi")])], FEW)
    assert found.finish == "stop_token" and 2 not in found.tokens
    assert found.text == " Hello! How can I assist you today?"
