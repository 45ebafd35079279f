"""Tokenizers in GGUF's keys, compared with sentencepiece, with llama.cpp's own file and with what is read back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from gguf_files import Metadata, converted, merged
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models, normalizers, pre_tokenizers, processors

from eabf_jax.errors import InputError
from eabf_jax.interop.gguf_file import GgufFile, read_gguf
from eabf_jax.interop.gguf_tokenizer import read_vocabulary, write_tokenizer
from eabf_jax.interop.gguf_vocabulary import tokenizer_keys
from eabf_jax.interop.tokenizer import export_tokenizer, load_tokenizer
from eabf_jax.model.config import LlamaConfig

TINY = Path(__file__).parents[2] / "assets" / "tiny"


def config(vocab_size: int, **fields: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size, 64, 96, 2, 4, 2, 16, 4096, **fields)


def read_back(directory: Path, keys: Metadata) -> Any:
    """Loads the tokenizer of a file with these keys."""
    vocabulary = read_vocabulary(GgufFile(directory, keys, {}))
    assert vocabulary is not None
    (directory / "back").mkdir()
    write_tokenizer(directory / "back", vocabulary)
    return load_tokenizer(directory / "back")


def test_sentencepiece(tmp_path: Path, sentencepiece_directory: Path, texts: list[str]) -> None:
    source = sentencepiece_directory / "tokenizer.model"
    keys = tokenizer_keys(sentencepiece_directory, config(1500))
    pieces = vars(sentencepiece_model_pb2)["ModelProto"].FromString(source.read_bytes()).pieces
    assert keys["tokenizer.ggml.tokens"] == [piece.piece for piece in pieces]
    assert keys["tokenizer.ggml.scores"] == [piece.score for piece in pieces]
    assert keys["tokenizer.ggml.token_type"] == [piece.type for piece in pieces]
    told = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items() if not isinstance(value, list)}
    assert told == {
        "model": "llama", "pre": "default", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
        "add_bos_token": True, "add_eos_token": False, "add_space_prefix": True,
    }  # fmt: skip
    library = sentencepiece.SentencePieceProcessor(model_file=str(source))
    found = read_back(tmp_path, keys)
    for text in [*texts, "日本 🎉", "a <tool>"]:
        assert found.encode(text) == library.encode(text)


def test_scores_from_the_merges_of_a_tokenizer_json(tmp_path: Path, texts: list[str]) -> None:
    export_tokenizer(TINY, tmp_path, 512)
    kept = tokenizer_keys(tmp_path, config(4096))
    (tmp_path / "tokenizer.model").unlink()
    keys = tokenizer_keys(tmp_path, config(4096))
    assert {**keys, "tokenizer.ggml.scores": kept["tokenizer.ggml.scores"]} == kept
    found, library = read_back(tmp_path, keys), sentencepiece.SentencePieceProcessor(str(TINY / "tokenizer.model"))
    for text in texts:
        if not text.startswith(" "):
            assert found.encode(text) == library.encode(text)
    assert found.chat_template == load_tokenizer(TINY).chat_template


def test_a_text_without_a_space_before_it(tmp_path: Path) -> None:
    export_tokenizer(TINY, tmp_path, 512)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_prefix_space": False, "add_bos_token": False}))
    (tmp_path / "tokenizer.json").unlink()
    keys = tokenizer_keys(tmp_path, config(4096))
    assert keys["tokenizer.ggml.add_space_prefix"] is False
    text = "Hello there"
    assert read_back(tmp_path, keys).encode(text) == load_tokenizer(tmp_path).encode(text)


@pytest.mark.parametrize("name", ["llama-bpe", "smollm", "gpt-2", "default"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_byte_pair_keys_come_back(tmp_path: Path, name: str, adds_bos: bool) -> None:
    given = merged(name, adds_bos) | {
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.eot_token_id": 15, "tokenizer.ggml.eom_token_id": 16,
        "tokenizer.ggml.add_eos_token": not adds_bos, "tokenizer.chat_template": "a",
        "tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "b",
    }  # fmt: skip
    keys = tokenizer_keys(converted(tmp_path, given), config(19, bos_token_id=0, eos_token_id=(0, 15, 16)))
    # A row of the embedding without a token gets the name that llama.cpp's converter gives it.
    given["tokenizer.ggml.tokens"] += ["[PAD17]", "[PAD18]"]
    given["tokenizer.ggml.token_type"] += [5, 5]
    assert keys == given


def test_the_keys_of_a_real_model_are_those_of_llama_cpps_file(tmp_path: Path, smollm2_gguf: Path) -> None:
    file = read_gguf(smollm2_gguf)
    vocabulary = read_vocabulary(file)
    assert vocabulary is not None
    write_tokenizer(tmp_path, vocabulary)
    found = tokenizer_keys(tmp_path, config(49_152))
    there = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    assert found == {key: there.get(key, False) for key in found}  # the file has no key for EOS after a text
    assert there.keys() <= {*found, "tokenizer.ggml.add_space_prefix"}


def test_no_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_keys(tmp_path, config(40)) == {"tokenizer.ggml.model": "none"}


def byte_pair(**changes: Any) -> tokenizers.Tokenizer:
    """Builds a byte-level tokenizer of single characters, with parts of it replaced."""
    alphabet = {piece: i for i, piece in enumerate(["<|a|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|a|>"])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def no_end(directory: Path) -> None:
    byte_pair().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}")


def unigram(directory: Path) -> None:
    model = tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("<|a|>", -2.0)], unk_id=0))
    model.save(str(directory / "tokenizer.json"))


def saved(**changes: Any) -> Callable[[Path], object]:
    return lambda directory: byte_pair(**changes).save(str(directory / "tokenizer.json"))


ASIDE = pre_tokenizers.Split(tokenizers.Regex(r"\p{Lu}"), "isolated")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TWICE = processors.TemplateProcessing(single=["<|a|>", "<|a|>", "$A"], special_tokens=[("<|a|>", 0)])

BAD: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "unigram": (unigram, {}, "the tokenizer's model is Unigram, expected BPE: copy the model without its tokenizer's"),
    "split": (
        saved(pre_tokenizer=pre_tokenizers.Sequence([ASIDE, BYTES])),
        {},
        "cuts texts by a rule that tokenizer.ggml.pre has no name for: .* serve its Hugging Face directory",
    ),
    "normalizer": (
        saved(normalizer=normalizers.Lowercase()),
        {},
        "splits texts, for example 'aaB', in a way that",
    ),
    "around": (saved(post_processor=TWICE), {}, r"puts \[0, 0\] before a text and \[\] after it, expected"),
    "ends": (saved(), {"eos_token_id": (0, 1, 2, 3)}, "4 tokens end a text, and GGUF has keys for three"),
    "end out of range": (saved(), {"eos_token_id": 999}, "eos_token_id is 999, expected one of the 257 tokens"),
    "no end": (no_end, {"eos_token_id": None}, "the tokenizer has no EOS token, and llama.cpp would take another one"),
    "too many tokens": (saved(), {"vocab_size": 100}, "the tokenizer has 257 tokens, the embedding 100 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_gguf_has_no_key_for_is_refused(tmp_path: Path, case: str) -> None:
    spoil, fields, message = BAD[case]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|a|>"}))
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_keys(tmp_path, config(**{"vocab_size": 257, "eos_token_id": 0, **fields}))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
