"""Tokenizers against transformers' own on real text, and the special-token files by hand."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from eabf_jax.errors import InputError
from eabf_jax.interop.tokenizer import load_tokenizer

ODD = ["", "<s>hi", "</s> hi", "a<tool>b", "<tool> b", "日本 🎉\n\n  x\t", "hi <unk> x", "x  <s>  y</s>\n", "12345"]


def test_sentencepiece_agrees_with_transformers(sentencepiece_directory: Path, texts: list[str]) -> None:
    ours = load_tokenizer(sentencepiece_directory)
    theirs = LlamaTokenizer.from_pretrained(sentencepiece_directory, legacy=False)
    for text in texts + ODD:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.pad_id) == (1, 2, 0, None)
    assert ours.vocab_size == 1500 and ours.eos_ids == (2,) and ours.chat_template is None
    assert ours.token_id("<tool>") == theirs.convert_tokens_to_ids("<tool>")
    assert ours.token_id("no such piece") is None


def test_sentencepiece_text_is_what_the_library_says(sentencepiece_directory: Path, texts: list[str]) -> None:
    """Without special tokens a text is exactly SentencePiece's own, leading spaces and all, and survives."""
    ours = load_tokenizer(sentencepiece_directory)
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    for text in [*texts, "  two  spaces ", "<s> is text here", "▁"]:
        assert ours.encode(text) == library.encode(text)
    assert ours.decode(ours.encode("  <s> 日本 \n")) == "  <s> 日本 \n"
    assert ours.decode([99_999, *ours.encode("x"), -1]) == "x"


def test_legacy_gives_every_piece_a_leading_space(sentencepiece_directory: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_directory / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": true}')
    ours = load_tokenizer(tmp_path)
    assert ours.encode("</s>hello", special=True) == [2, *ours.encode("hello")]


def test_tokens_beside_the_sentencepiece_vocabulary(sentencepiece_directory: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_directory / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 1500}')
    plain = {"content": "<plain>", "special": False}
    settings = {
        "pad_token": {"content": "<pad>"},
        "added_tokens_decoder": {"1501": plain, "1500": {"content": "<pad>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == 1502 and ours.pad_id == 1500
    assert ours.encode("<pad><plain>", special=True) == [1500, 1501]
    assert ours.encode("<pad>")[0] != 1500
    assert ours.encode("<plain>") == [1501]
    assert ours.decode([1500, 1501]) == "<pad><plain>"


@pytest.fixture
def json_directory(tmp_path: Path) -> Path:
    """A byte-level BPE tokenizer.json with the files that Hugging Face keeps beside it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>", "<|im_start|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4, pad_id=0, pad_token="<|end|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<|im_start|>", "lstrip": False},
        "eos_token": "<|end|>",
        "added_tokens_decoder": {"300": {"content": "<|new|>", "special": True, "rstrip": False}},
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "in config"}],
    }
    size = tokenizer.get_vocab_size()
    settings["added_tokens_decoder"] = {str(size): settings["added_tokens_decoder"]["300"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 5], "pad_token_id": 0}')
    return tmp_path


def test_tokenizer_json_agrees_with_transformers(json_directory: Path, texts: list[str]) -> None:
    ours = load_tokenizer(json_directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(json_directory)
    for text in [*texts[:50], "<|im_start|>user\nthe fox<|end|><|new|>", ""]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (1, 0, 0, None)
    assert ours.eos_ids == (0, 5)
    assert ours.chat_template == "in config"
    assert 0 not in ours.encode("<|end|>") and ours.decode(ours.encode("<|end|>")) == "<|end|>"


@pytest.mark.parametrize("setting", [True, False])
def test_a_text_begins_as_in_transformers(sentencepiece_directory: Path, tmp_path: Path, setting: bool) -> None:
    shutil.copy(sentencepiece_directory / "tokenizer.model", tmp_path)
    # Meta's code, which knows no such file, begins every text; transformers 4 did and 5 does not.
    assert load_tokenizer(tmp_path).adds_bos
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": setting}))
    theirs = LlamaTokenizer.from_pretrained(tmp_path, legacy=False)
    ids = theirs.encode("hello")
    ours = load_tokenizer(tmp_path)
    assert [1] * ours.adds_bos + ours.encode("hello") == ids
    # The same as tokenizer.json, whose post-processor says it too.
    (tmp_path / "fast").mkdir()
    theirs.backend_tokenizer.save(str(tmp_path / "fast/tokenizer.json"))
    (tmp_path / "fast/tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert load_tokenizer(tmp_path / "fast").adds_bos == ours.adds_bos == (ids[0] == 1)


def test_a_template_file_goes_before_the_config(json_directory: Path) -> None:
    (json_directory / "chat_template.jinja").write_text("in file")
    assert load_tokenizer(json_directory).chat_template == "in file"


def test_save_copies_everything(json_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("saved")
    ours = load_tokenizer(json_directory)
    ours.save(target)
    ours.save(json_directory)  # onto itself: nothing to do, nothing lost
    names = {path.name for path in target.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    again = load_tokenizer(target)
    assert again.encode("the lazy fox") == ours.encode("the lazy fox") and again.eos_ids == (0, 5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "neither tokenizer.json nor tokenizer.model"),
        ("tokenizer.json", b"{", "not a tokenizer.json"),
        ("tokenizer.model", b"junk", "not a SentencePiece model"),
        ("tokenizer.model", b"", "not a whole SentencePiece model"),
        ("tokenizer_config.json", b"[]", "expected an object"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
    ],
)
def test_bad_files(tmp_path: Path, name: str | None, content: bytes, message: str) -> None:
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
