"""SmolLM2-135M-Instruct's real GGUF file, converted here, compared with transformers' GGUF loading."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from gguf_once import read_once
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

import eabf_jax
from eabf_jax.inference import Generator
from eabf_jax.interop.tokenizer import load_tokenizer
from eabf_jax.model.llama import Llama

PROMPTS = ("The history of the Roman Empire begins", "def quicksort(values):\n", "Dear customer,\nwe are sorry to")
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def read_by_transformers(
    smollm2_gguf: Path,
) -> tuple[transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast]:
    """The model and the tokenizer that transformers loads from the GGUF file."""
    with read_once():
        file: dict[str, Any] = {"pretrained_model_name_or_path": smollm2_gguf.parent, "gguf_file": smollm2_gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32).eval()
        return model, transformers.AutoTokenizer.from_pretrained(**file)


@pytest.fixture(scope="module")
def reference(read_by_transformers: tuple[transformers.LlamaForCausalLM, Any]) -> transformers.LlamaForCausalLM:
    return read_by_transformers[0]


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Llama:
    """The model loaded from the converted directory."""
    return eabf_jax.load(smollm2, dtype="float32")[0]


def forward(model: Llama, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model, x: model(x))(model, tokens))


def test_tensors_are_bit_equal(smollm2: Path, reference: transformers.LlamaForCausalLM) -> None:
    found, expected = load_file(smollm2 / "model.safetensors"), reference.state_dict()
    assert expected.keys() - found.keys() == {"lm_head.weight"}  # tied
    for name, value in found.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name]), name
    config = json.loads((smollm2 / "config.json").read_text())
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size", "max_position_embeddings"):
        assert config[name] == getattr(reference.config, name)
    assert config["rope_theta"] == 100_000.0 and config["tie_word_embeddings"]


def test_token_ids_on_real_text(
    smollm2: Path,
    read_by_transformers: tuple[Any, transformers.PreTrainedTokenizerFast],
    texts: list[str],
) -> None:
    found, (_, theirs) = load_tokenizer(smollm2), read_by_transformers
    # Unlike llama.cpp and the original, transformers ignores the file's pre-tokenizer, which separates all digits.
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    template = found.chat_template
    assert template == theirs.chat_template
    chat = theirs.apply_chat_template([{"role": "user", "content": texts[0]}], tokenize=False)
    for text in [*texts, chat]:
        ids = found.encode(text, special=True)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert found.decode(ids) == text
    assert (found.bos_id, found.eos_id, found.pad_id, found.unk_id) == (1, 2, 2, 0)
    assert found.eos_ids == (2,) and found.vocab_size == 49_152
    auto = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert auto.encode(chat) == found.encode(chat, special=True)


def test_logits_on_real_tokens(
    smollm2: Path, ours: Llama, reference: transformers.LlamaForCausalLM, texts: list[str]
) -> None:
    tokenizer = load_tokenizer(smollm2)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text)
    tokens = np.array([ids[:128]])
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    found = forward(ours, tokens)
    # float32 sums in two orders differ by about 2e-4 after 30 layers.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_greedy_text_is_that_of_transformers(
    smollm2: Path, ours: Llama, reference: transformers.LlamaForCausalLM
) -> None:
    """Compares token by token; our prompts are one batch, theirs are not. benchmarks/greedy_parity.py runs longer."""
    tokenizer = load_tokenizer(smollm2)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )[0]
        assert len(found) == len(prompt) + NEW_TOKENS  # the model did not end earlier
        expected.append(found[len(prompt) :].tolist())
    completions = Generator(ours, tokenizer).generate(prompts, NEW_TOKENS)
    assert [completion.tokens for completion in completions] == expected
