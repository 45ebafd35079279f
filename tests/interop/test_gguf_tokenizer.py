"""Tokenizers from GGUF compared with sentencepiece, transformers, and other libraries' pre-tokenizers."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from gguf_files import Metadata, Tensors, assert_refused, changed, config_of, converted, merged
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from eabf_jax.interop.gguf_tokenizer import SPLITTINGS, pre_tokenizer
from eabf_jax.interop.tokenizer import load_tokenizer


def test_sentencepiece_tokenizer_comes_back(tmp_path: Path, sentencepiece_directory: Path, texts: list[str]) -> None:
    source = sentencepiece_directory / "tokenizer.model"
    proto = vars(sentencepiece_model_pb2)["ModelProto"].FromString(source.read_bytes())
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.chat_template": "{{ messages }}",
    }  # no ids: llama.cpp's defaults are 1, 2 and 0
    found = load_tokenizer(converted(tmp_path, values))
    library = sentencepiece.SentencePieceProcessor(model_file=str(source))
    for text in [*texts, "日本 🎉", "  two"]:
        assert found.encode(text) == library.encode(text)
    assert (found.bos_id, found.eos_id, found.unk_id, found.pad_id) == (1, 2, 0, None)
    assert found.chat_template == "{{ messages }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode("hello there") == [1, *library.encode("hello there")]


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("smollm", ["1", "2", "3", "4", "ĊĊ", "1"]),  # each digit alone
        ("llama-bpe", ["123", "4", "ĊĊ", "1"]),  # at most three digits
        ("gpt-2", ["1234", "Ċ", "Ċ", "1"]),  # a run of digits; the last space belongs to what follows
        ("default", ["123", "4", "Ċ", "Ċ", "1"]),  # as gpt-2, then three digits at a time
    ],
)
def test_text_is_cut_as_the_file_says(tmp_path: Path, before: str, expected: list[str]) -> None:
    values = merged(before, adds_bos=before == "llama-bpe")
    directory = converted(tmp_path, values)
    found = load_tokenizer(directory)
    pieces = values["tokenizer.ggml.tokens"]
    assert [pieces[i] for i in found.encode("1234\n\n1")] == expected
    assert found.encode("<|a|><|u|>", special=True) == [0, 14]
    assert found.encode("1<|u|>") == [2, 14]
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.encode("1") == ([0, 2] if before == "llama-bpe" else [2])


def test_splittings_are_those_of_the_libraries(texts: list[str]) -> None:
    """Compares with other libraries' pre-tokenizers; what llama.cpp's `default` adds to GPT-2's is written out."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    punctuation = pre_tokenizers.Split(tokenizers.Regex(r"[\p{P}$+<=>^~|]+"), "isolated")
    numbers = pre_tokenizers.Sequence([punctuation, plain])
    for text in texts[:40]:
        for name, expected in (("gpt-2", plain), ("smollm", digits)):
            assert cut(name, text) == [piece for piece, _ in expected.pre_tokenize_str(text)], name
        threes = [
            part
            for piece, _ in numbers.pre_tokenize_str(text)
            for number in re.split(r"([0-9]+)", piece)
            for part in (re.findall(r"[0-9]{1,3}", number) if number.isdecimal() else [number])
            if part
        ]
        assert [piece for piece in cut("default", text) if piece != "Ġ"] == [piece for piece in threes if piece != "Ġ"]
    assert cut("default", "a, 12345") == ["a", ",", "Ġ", "123", "45"]
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    assert SPLITTINGS["llama3"].patterns == (pattern,)


def test_names_of_splittings_are_those_of_transformers_and_llama_cpp() -> None:
    """Compares each name that transformers knows; the others are in llama.cpp's groups of the same expression."""
    shared = GGUF_PRE_TOKENIZER_SPLITS.keys() & SPLITTINGS.keys()
    assert {"llama3", "pixtral", "smaug-bpe", "dbrx", "tekken", "qwen2", "deepseek-r1-qwen"} <= shared
    for name in shared:
        assert SPLITTINGS[name].patterns == (GGUF_PRE_TOKENIZER_SPLITS[name],), name
    for name in ("stablelm2", "hunyuan", "solar-open", "grok-2"):
        assert SPLITTINGS[name] == SPLITTINGS["qwen2"]
    for name in ("command-r", "codeshell", "exaone", "starcoder", "refact", "minerva-7b", "mellum2"):
        assert SPLITTINGS[name] == SPLITTINGS["smollm"]
    for name in ("mpt", "olmo", "jais", "trillion", "exaone4", "phi-2", "gigachat", "granite-docling", "mellum"):
        assert SPLITTINGS[name] == SPLITTINGS["gpt-2"]
    whole = {name for name, splitting in SPLITTINGS.items() if splitting.ignores_merges}
    assert whole == {name for name, splitting in SPLITTINGS.items() if splitting.adds_bos}
    llama3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano")
    assert whole == {*llama3, "tekken"}
    assert cut("tekken", "HelloWorld's 12\n") == ["Hello", "World", "'s", "Ġ", "1", "2", "Ċ"]


@pytest.mark.document_check
def test_the_page_names_every_splitting() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text(encoding="utf-8")
    table = page[page.index("| `tokenizer.ggml.pre` | how text is split |") :].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} | {""} == SPLITTINGS.keys()


def cut(name: str, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizer(SPLITTINGS[name]).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("before", "says", "adds"),
    [
        *((name, None, True) for name in ("llama-bpe", "llama3", "llama-v3", "falcon3")),
        ("llama3", False, False),
        *((name, None, False) for name in ("smollm", "gpt-2", "default", None)),
        ("smollm", True, True),
    ],
)
def test_bos_as_llama_cpp_adds_it(tmp_path: Path, before: str | None, says: bool | None, adds: bool) -> None:
    values = merged(before or "", adds_bos=bool(says))
    for name, given in (("add_bos_token", says), ("pre", before)):
        if given is None:
            del values[f"tokenizer.ggml.{name}"]
    directory = converted(tmp_path, values)
    assert load_tokenizer(directory).adds_bos is adds
    assert transformers.AutoTokenizer.from_pretrained(directory).encode("1") == ([0, 2] if adds else [2])


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"eos": 0}, (0,)),
        ({"eos": 0, "eot": 1}, (0, 1)),
        ({"eos": 0, "eot": 1, "eom": 2}, (0, 1, 2)),
        ({"eos": 0, "eot": 0}, (0,)),
        ({"eot": 1}, (1,)),
        ({}, ()),
    ],
)
def test_every_end_of_a_turn_ends_a_generation(
    tmp_path: Path, named: dict[str, int], expected: tuple[int, ...]
) -> None:
    values = merged("gpt-2", adds_bos=False) | {"tokenizer.ggml.token_type": [3] * 17}
    del values["tokenizer.ggml.eos_token_id"]
    values |= {f"tokenizer.ggml.{role}_token_id": i for role, i in named.items()}
    directory = converted(tmp_path, values)
    assert load_tokenizer(directory).eos_ids == expected
    found = config_of(directory).eos_token_id
    assert found == (expected if len(expected) > 1 else expected[0] if expected else None)
    assert load_tokenizer(directory).eos_id == (expected[0] if expected else None)


def test_llama3_files_without_keys_for_the_ends(tmp_path: Path) -> None:
    """Meta's generation_config.json of Llama 3.1 Instruct lists all three, its GGUF files only the last."""
    values = merged("llama-bpe", adds_bos=True)
    pieces = [*values["tokenizer.ggml.tokens"], "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>"]
    kinds = [*values["tokenizer.ggml.token_type"], 3, 3, 3, 1]  # the fourth is plain text
    values |= {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.eos_token_id": 19,
    }
    directory = converted(tmp_path, values)
    assert load_tokenizer(directory).eos_ids == (19, 17, 18)
    generation = transformers.GenerationConfig.from_pretrained(directory)
    assert generation.eos_token_id == [19, 17, 18] and generation.bos_token_id == 0


def test_named_chat_templates_and_eos(tmp_path: Path) -> None:
    values = merged("gpt-2", adds_bos=False) | {
        "tokenizer.chat_template": "a", "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "b", "tokenizer.ggml.add_eos_token": True,
    }  # fmt: skip
    directory = converted(tmp_path, values)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.chat_template == {"default": "a", "tool_use": "b"}
    assert theirs.encode("1") == [2, 0]
    assert load_tokenizer(directory).chat_template == "a"


def tokenizer_changed(**changes: Any) -> Callable[[Metadata, Tensors], None]:
    """Like `changed`, for a file with a tokenizer; keys follow `tokenizer.ggml.`."""

    def change(values: Metadata, tensors: Tensors) -> None:
        values.update(merged("smollm", adds_bos=False))
        changed(**{f"tokenizer__ggml__{key}": value for key, value in changes.items()})(values, tensors)

    return change


def sentencepiece_changed(**changes: Any) -> Callable[[Metadata, Tensors], None]:
    return tokenizer_changed(
        **{"model": "llama", "pre": None, "merges": None, "scores": [0.0] * 17, "unknown_token_id": 0} | changes
    )


BAD: dict[str, tuple[Callable[[Metadata, Tensors], object], str]] = {
    "tokenizer kind": (tokenizer_changed(model="bert"), "tokenizer model is 'bert', expected 'gpt2'"),
    "tokenizer of no kind": (tokenizer_changed(model=None), "metadata has no tokenizer.ggml.model; expected a string"),
    "pre-tokenizer": (tokenizer_changed(pre="smolm"), "unknown pre-tokenizer .* 'smolm': did you mean 'smollm'"),
    "no tokens": (tokenizer_changed(tokens=None), "metadata has no tokenizer.ggml.tokens; expected an array of str"),
    "no token types": (tokenizer_changed(token_type=None), "metadata has no tokenizer.ggml.token_type"),
    "no merges": (tokenizer_changed(merges=None), "metadata has no tokenizer.ggml.merges"),
    "no scores": (sentencepiece_changed(scores=None), "metadata has no tokenizer.ggml.scores"),
    "few token types": (
        tokenizer_changed(token_type=[1]), "token_type has 1 entries, expected one for each of the 17 tokens"
    ),
    "few scores": (sentencepiece_changed(scores=[0.0]), "scores has 1 entries, expected one for each"),
    "strange token type": (tokenizer_changed(token_type=[7] * 17), "token_type has 7, expected 1 to 6"),
    "strange merges": (tokenizer_changed(merges=["1 no"]), "tokenizer.ggml.merges does not form a tokenizer: .*no"),
    "a token twice": (tokenizer_changed(tokens=["a"] * 17), "tokens has 'a' at 0 and at 1; expected each token once"),
    "no unknown piece": (sentencepiece_changed(), "tokens does not form a SentencePiece model: .*unk"),
    "id out of range": (tokenizer_changed(eos_token_id=17), "eos_token_id is 17, expected one of the 17 tokens"),
    "end of turn out of range": (tokenizer_changed(eot_token_id=99), "eot_token_id is 99, expected one of the 17"),
    "BOS asked for without an id": (
        tokenizer_changed(add_bos_token=True, bos_token_id=None),
        "metadata has no tokenizer.ggml.bos_token_id, which tokenizer.ggml.add_bos_token = true requires",
    ),
    "BOS by default without an id": (
        tokenizer_changed(add_bos_token=None, bos_token_id=None, pre="llama-bpe"),
        "metadata has no tokenizer.ggml.bos_token_id, which tokenizer.ggml.pre = 'llama-bpe' requires",
    ),
    "unknown tokenizer key": (tokenizer_changed(byte_order="up"), "tokenizer.ggml.byte_order .* is not understood"),
    "other spaces": (tokenizer_changed(remove_extra_whitespaces=True), "whitespaces is True, expected false: LLaMA's"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tokenizers(tmp_path: Path, case: str) -> None:
    assert_refused(tmp_path, *BAD[case])
