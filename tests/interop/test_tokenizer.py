"""Tokenizers compared with transformers' `AutoTokenizer` for the same directory, and hand-written token files."""

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, LlamaTokenizer

from eabf_jax.errors import InputError
from eabf_jax.interop.huggingface import MODELING_FILE, MODELING_SOURCE
from eabf_jax.interop.tokenizer import MODEL_PROTO, Tokenizer, copy_tokenizer_files, export_tokenizer, load_tokenizer

ODD = ["", "<s>hi", "</s> hi", "a<tool>b", "<tool> b", "日本 🎉\n\n  x\t", "hi <unk> x", "x  <s>  y</s>\n", "12345"]
SPACED = [" hello", "  hello  world ", "▁x ▁", "a ====== ----    \n\n b"]
# Each new token alone, in a word, and between spaces, which its flags may absorb.
ADDED = ["a<new>b", "x  <new>  y", "<extra> <new>", "a <pad> b<extra>"]
LLAMA = {"tokenizer_class": "LlamaTokenizer"}


def write(directory: Path, files: dict[str, Any]) -> None:
    for name, content in {"config.json": {"model_type": "llama"}, **files}.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def agree(directory: Path, texts: list[str]) -> Tokenizer:
    """Loads a directory with both libraries, and compares everything that both offer."""
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
        assert ours.decode(ids, special=False) == theirs.decode(ids, skip_special_tokens=True), text
    assert ours.special_tokens == theirs.special_tokens_map
    for role in ("bos", "eos", "unk", "pad"):
        if role == "bos" and theirs.bos_token is None and ours.adds_bos:
            continue  # transformers adds it to each text, but does not name it
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_token_id"), role
    assert ours.vocab_size == len(theirs)
    return ours


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "chat_template.jinja", "generation_config.json", "additional_chat_templates/tool.jinja"]
)
def test_a_link_that_leads_out_of_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    """The content of a linked file would become part of a converted model; links of the Hub's cache are its files."""
    repository, secret = tmp_path / "models--x", tmp_path / "secret"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    shutil.copytree("assets/tiny", snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    blobs.mkdir()
    path = snapshot / name
    path.parent.mkdir(exist_ok=True)
    content = path.read_bytes() if path.exists() else b"{}"
    up = Path(*[".."] * len(path.relative_to(repository).parent.parts))

    def link(to: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(to)

    for outside in (secret, blobs / "0"):
        outside.write_bytes(content)
    (snapshot / "inner").write_bytes(content)
    for number, allowed in enumerate((up / "blobs" / "0", snapshot / "inner")):
        link(allowed)
        (tmp_path / str(number)).mkdir()
        load_tokenizer(snapshot).save(tmp_path / str(number))
        copy = tmp_path / str(number) / name
        assert copy.read_bytes() == content and not copy.is_symlink()
    (blobs / "1").symlink_to(secret)
    for refused in (secret, up / ".." / "secret", up / "blobs" / "1"):
        link(refused)
        with pytest.raises(InputError, match=f"{name}: a link to {secret}, which is outside the model's dir"):
            load_tokenizer(snapshot)
        with pytest.raises(InputError, match="outside the model's directory"):
            copy_tokenizer_files(snapshot, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.fixture(scope="session")
def vocabularies(sentencepiece_directory: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model, the tokenizer.json that LLaMA 2 would have for it, and byte-level BPE."""
    root = tmp_path_factory.mktemp("vocabularies")
    for kind in ("sentencepiece", "llama", "bytes"):
        (root / kind).mkdir()
    shutil.copy(sentencepiece_directory / "tokenizer.model", root / "sentencepiece")
    # As in LLaMA 2's file: vocabulary, merges, and a normalizer for white space, which transformers 5 ignores.
    proto = MODEL_PROTO.FromString((sentencepiece_directory / "tokenizer.model").read_bytes())
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (piece.piece for piece in proto.pieces if piece.type == 1)
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)  # type: ignore[arg-type]
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(root / "llama/tokenizer.json"))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|end|>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts[:100], trainer)
    backend.save(str(root / "bytes/tokenizer.json"))
    return root


@pytest.mark.parametrize(
    "settings",
    [None, {}, {"legacy": False}, LLAMA, LLAMA | {"legacy": True}, LLAMA | {"add_prefix_space": False}],
    ids=json.dumps,
)
@pytest.mark.parametrize("kind", ["sentencepiece", "llama", "bytes"])
def test_white_space_is_that_of_the_class(
    vocabularies: Path, texts: list[str], tmp_path: Path, kind: str, settings: dict[str, Any] | None
) -> None:
    shutil.copytree(vocabularies / kind, tmp_path, dirs_exist_ok=True)
    if kind == "bytes" and settings is not None:  # transformers names no tokens for this class and file
        settings = {"bos_token": None, "eos_token": None, "unk_token": None, **settings}
    write(tmp_path, {} if settings is None else {"tokenizer_config.json": settings})
    agree(tmp_path, [*texts[:12], *ODD, *SPACED])


def entry(content: str, **flags: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True} | flags
    return {"content": content, **flags}


def typed(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **entry(content, **flags)}


CONFIG, MAP, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
BESIDE: dict[str, dict[str, Any]] = {
    "added_tokens.json": {ADDED_FILE: {"<new>": 1500, "<pad>": 1501}},
    "added_tokens.json and pad_token": {ADDED_FILE: {"<new>": 1500, "<pad>": 1501}, CONFIG: {"pad_token": "<pad>"}},
    "a new pad_token": {CONFIG: {"pad_token": "<pad>"}},
    "a pad_token of the map": {MAP: {"pad_token": entry("<pad>", lstrip=True), "bos_token": "<s>"}},
    "the map over the config": {CONFIG: {"eos_token": "<s>"}, MAP: {"eos_token": "</s>"}},
    "no map beside added_tokens_decoder": {
        CONFIG: {"eos_token": "<s>", "added_tokens_decoder": {"1": entry("<s>"), "2": entry("</s>")}},
        MAP: {"eos_token": "</s>"},
        ADDED_FILE: {"<new>": 1500},
    },
    "extra_special_tokens of the map": {
        MAP: {"extra_special_tokens": ["<new>", {"content": "<extra>", "rstrip": True}]}
    },
    "additional_special_tokens": {CONFIG: {"additional_special_tokens": ["<new>", typed("<extra>", lstrip=True)]}},
    "extra_special_tokens": {CONFIG: {"extra_special_tokens": ["<new>", typed("<extra>", rstrip=True)]}},
    "extra_special_tokens by name": {CONFIG: {"extra_special_tokens": {"new_token": "<new>", "other": "<extra>"}}},
    "a name of its own": {CONFIG: {"new_token": "<new>", "mask_token": "<extra>"}},
    "bos_token as an object": {CONFIG: {"bos_token": typed("<s>", lstrip=True, rstrip=True)}},
    "no bos_token": {CONFIG: {"bos_token": None}},
    "the class in config.json": {"config.json": {"model_type": "llama", **LLAMA}, CONFIG: {"legacy": True}},
    "split_special_tokens": {CONFIG: {"split_special_tokens": True}},
    "clean_up_tokenization_spaces": {CONFIG: {"clean_up_tokenization_spaces": True}},
    **{
        f"added_tokens_decoder with {flag}": {
            CONFIG: {
                "added_tokens_decoder": {
                    "1": entry("<s>", **{flag: True}),
                    "2": entry("</s>"),
                    "1500": entry("<new>", special=False, **{flag: True}),
                    "1501": entry("<extra>"),
                }
            }
        }
        for flag in ("lstrip", "rstrip", "single_word", "normalized")
    },
}


@pytest.mark.parametrize("case", BESIDE)
@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece without a class", "llama", "bytes"])
def test_tokens_beside_the_vocabulary(vocabularies: Path, tmp_path: Path, kind: str, case: str) -> None:
    shutil.copytree(vocabularies / kind.split()[0], tmp_path, dirs_exist_ok=True)
    files = {name: dict(content) for name, content in BESIDE[case].items()}
    settings = files.setdefault(CONFIG, {})
    if kind in ("sentencepiece", "llama"):
        settings |= LLAMA
    write(tmp_path, files)
    # transformers 5 loses user-defined pieces if other tokens are named; see the test below.
    agree(tmp_path, [text for text in [*ODD, *SPACED, *ADDED] if "<tool>" not in text])


def test_no_named_token_is_lost(vocabularies: Path, tmp_path: Path) -> None:
    """Tokens that SentencePiece and transformers 4 keep whole, but transformers 5 loses."""
    shutil.copytree(vocabularies / "sentencepiece", tmp_path, dirs_exist_ok=True)
    write(tmp_path, {CONFIG: LLAMA, MAP: {"additional_special_tokens": ["<new>"]}})
    ours = load_tokenizer(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert ours.encode("a<tool>b") == library.encode("a<tool>b")
    assert ours.encode("<new>", special=True) == [1500] and ours.decode([1500]) == "<new>"


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_added_tokens_decoder_null_is_as_if_it_were_not_there(vocabularies: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(vocabularies / kind, tmp_path, dirs_exist_ok=True)
    write(tmp_path, {CONFIG: {"pad_token": "<pad>"}, ADDED_FILE: {"<new>": 1500}})
    expected = agree(tmp_path, ["a<new>b<pad>"]).encode("a<new>b<pad>", special=True)
    write(tmp_path, {CONFIG: {"pad_token": "<pad>", "added_tokens_decoder": None}, ADDED_FILE: {"<new>": 1500}})
    assert load_tokenizer(tmp_path).encode("a<new>b<pad>", special=True) == expected


def test_sentencepiece_text_is_what_the_library_says(sentencepiece_directory: Path, texts: list[str]) -> None:
    """Without special tokens, ids are exactly SentencePiece's, and decoding returns the text with leading spaces."""
    ours = load_tokenizer(sentencepiece_directory)
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    for text in [*texts, *SPACED, "<s> is text here", "▁", "a<tool>b"]:
        assert ours.encode(text) == library.encode(text)
    assert ours.decode(ours.encode("  <s> 日本 \n")) == "  <s> 日本 \n"
    assert ours.decode([99_999, *ours.encode("x"), -1]) == "x"
    assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.pad_id) == (1, 2, 0, None)
    assert ours.vocab_size == 1500 and ours.eos_ids == (2,) and ours.chat_template is None
    assert ours.token_id("<tool>") == library.piece_to_id("<tool>") and ours.token_id("no such piece") is None


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": ["<tool>"]},
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    ],
    ids=["unigram", "normalized", "no prefix"],
)
def test_other_sentencepiece_models(
    sentencepiece_directory: Path, texts: list[str], tmp_path: Path, options: dict[str, Any]
) -> None:
    sentencepiece.SentencePieceTrainer.train(
        input=str(sentencepiece_directory / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=800,
        num_threads=2, minloglevel=2, max_sentence_length=2000, input_sentence_size=300, hard_vocab_limit=False,
        **options,
    )  # fmt: skip
    write(tmp_path, {})
    ours = agree(tmp_path, [*texts[:12], *ODD, *SPACED])
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in [*texts[:12], *SPACED, "<s> is </s> text here"]:
        assert ours.encode(text) == library.encode(text), text


def test_reserved_pieces_take_the_names_of_added_tokens(vocabularies: Path, tmp_path: Path) -> None:
    proto = MODEL_PROTO.FromString((vocabularies / "sentencepiece/tokenizer.model").read_bytes())
    proto.pieces[1400].piece = "[UNUSED]"
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    write(tmp_path, {CONFIG: {"added_tokens_decoder": {"1400": entry("<|im_start|>"), "2": entry("</s>")}}})
    ours = agree(tmp_path, ["a<|im_start|>b</s>"])
    assert ours.encode("<|im_start|>", special=True) == [1400] and ours.vocab_size == 1500


@pytest.fixture
def json_directory(tmp_path: Path) -> Path:
    """A byte-level BPE tokenizer.json with the usual files beside it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4, pad_id=0, pad_token="<|end|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<|im_start|>", "lstrip": False},
        "eos_token": "<|end|>",
        "added_tokens_decoder": {str(tokenizer.get_vocab_size()): {"content": "<|new|>", "special": True}},
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "in config"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 5], "pad_token_id": 0}')
    return tmp_path


def test_tokenizer_json_agrees_with_transformers(json_directory: Path, texts: list[str]) -> None:
    write(json_directory, {"config.json": {"model_type": "llama", "eos_token_id": 3}})
    # The file's padding names the pad token, but its truncation and padding themselves are ignored.
    ours = agree(json_directory, [*texts[:50], "<|im_start|>user\nthe fox<|end|><|new|>", ""])
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (1, 0, 0, None)
    assert ours.eos_ids == (0, 5)
    assert 0 not in ours.encode("<|end|>") and ours.decode(ours.encode("<|end|>")) == "<|end|>"


@pytest.mark.parametrize("setting", [True, False])
def test_a_text_begins_as_in_transformers(sentencepiece_directory: Path, tmp_path: Path, setting: bool) -> None:
    shutil.copy(sentencepiece_directory / "tokenizer.model", tmp_path)
    # Without a setting, Meta's code and transformers 4 begin every text with BOS, and transformers 5 does not.
    assert load_tokenizer(tmp_path).adds_bos
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(LLAMA | {"add_bos_token": setting}))
    theirs = LlamaTokenizer.from_pretrained(tmp_path, legacy=False)
    ids = theirs.encode("hello")
    ours = load_tokenizer(tmp_path)
    assert [1] * ours.adds_bos + ours.encode("hello") == ids
    # In the same vocabulary as a tokenizer.json, only the post-processor decides.
    (tmp_path / "fast").mkdir()
    theirs.backend_tokenizer.save(str(tmp_path / "fast/tokenizer.json"))
    for more in ({}, {"add_bos_token": not setting}):
        write(tmp_path / "fast", {CONFIG: {"bos_token": "<s>"} | more})
        assert load_tokenizer(tmp_path / "fast").adds_bos == ours.adds_bos == (ids[0] == 1)
        assert AutoTokenizer.from_pretrained(tmp_path / "fast").encode("hello") == ids


def test_a_token_that_is_said_not_to_be_there_is_not(sentencepiece_directory: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_directory / "tokenizer.model", tmp_path)
    write(tmp_path, {"config.json": {"bos_token_id": 1, "pad_token_id": 7}, CONFIG: {"bos_token": None}})
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.adds_bos) == (None, False)
    assert ours.pad_id == 7  # the model's, because the tokenizer does not mention it


# --- chat templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({CONFIG: {"chat_template": "in config"}}, {"default": "in config"}),
        ({CONFIG: {"chat_template": [{"name": "rag", "template": "no"}]}}, {"rag": "no"}),
        ({CONFIG: {"chat_template": "in config"}, "chat_template.jinja": "in file"}, {"default": "in file"}),
        (
            {"chat_template.jinja": "in file", "additional_chat_templates/rag.jinja": "for documents"},
            {"default": "in file", "rag": "for documents"},
        ),
    ],
)
def test_chat_templates(vocabularies: Path, tmp_path: Path, files: dict[str, Any], expected: dict[str, str]) -> None:
    shutil.copytree(vocabularies / "bytes", tmp_path, dirs_exist_ok=True)
    write(tmp_path, files)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert ours.chat_templates == expected == (theirs if isinstance(theirs, dict) else {"default": theirs} if theirs
                                               else {})  # fmt: skip
    assert ours.chat_template == expected.get("default")


def test_a_byte_order_mark_is_no_text(json_directory: Path) -> None:
    expected = load_tokenizer(json_directory)
    (json_directory / "chat_template.jinja").write_text("in file")
    for path in json_directory.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = load_tokenizer(json_directory)
    assert found.chat_template == "in file"
    assert found.encode("the lazy fox") == expected.encode("the lazy fox") and found.bos_id == expected.bos_id


# --- copies -----------------------------------------------------------------------------------------------------------


def test_save_copies_everything(json_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("saved")
    write(json_directory, {"additional_chat_templates/rag.jinja": "for documents"})
    ours = load_tokenizer(json_directory)
    ours.save(target)
    ours.save(json_directory)  # onto itself: nothing to do, nothing lost
    ours.save(target)  # again: replaced
    names = {str(path.relative_to(target)) for path in target.rglob("*.*") if path.is_file()}
    assert names == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "additional_chat_templates/rag.jinja",
    }
    again = load_tokenizer(target)
    assert again.encode("the lazy fox") == ours.encode("the lazy fox") and again.eos_ids == (0, 5)
    assert again.chat_templates == ours.chat_templates


@pytest.mark.parametrize("settings", [None, {"legacy": False, "model_max_length": 512}, LLAMA], ids=json.dumps)
@pytest.mark.parametrize("kind", ["sentencepiece", "llama", "bytes"])
def test_an_exported_tokenizer_needs_no_code_and_no_answer(
    vocabularies: Path,
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    settings: dict[str, Any] | None,
) -> None:
    """Runs the README's two lines with a config.json that names the exported model code."""
    source = tmp_path / "source"
    shutil.copytree(vocabularies / kind, source)
    write(source, {} if settings is None else {CONFIG: settings})
    target = tmp_path / "exported"
    target.mkdir()
    export_tokenizer(source, target, window=2048)
    auto_map = {"AutoConfig": f"{Path(MODELING_FILE).stem}.EabfLlamaConfig"}
    write(target, {"config.json": {"model_type": "eabf_llama", "auto_map": auto_map}})
    shutil.copy(MODELING_SOURCE, target / MODELING_FILE)

    monkeypatch.setattr(builtins, "input", lambda prompt: pytest.fail(prompt))
    config = AutoConfig.from_pretrained(target, trust_remote_code=True)
    theirs = AutoTokenizer.from_pretrained(target, config=config)
    before, ours = load_tokenizer(source), load_tokenizer(target)
    for text in [*texts[:4], *ODD, *SPACED]:
        ids = before.encode(text, special=True)
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.encode(text) == [1] * before.adds_bos + ids
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (before.bos_id, before.eos_id, before.adds_bos)
    exported = json.loads((target / CONFIG).read_text())
    # Without a class, transformers 4 asks for permission to run the model's code.
    assert exported["tokenizer_class"] in ("LlamaTokenizer", "PreTrainedTokenizerFast")
    assert exported.get("model_max_length") == (2048 if settings and "model_max_length" in settings else None)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "neither tokenizer.json nor tokenizer.model"),
        ("tokenizer.json", b"{", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff", "not valid UTF-8"),
        ("tokenizer.model", b"junk", "not a SentencePiece model"),
        ("tokenizer.model", b"", "not a whole SentencePiece model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "Llama 3's own file: copy its tokenizer.json"),
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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({CONFIG: {"pad_token": 5}}, "a token is 5, expected a string or an object"),
        ({CONFIG: {"pad_token": {"lstrip": True}}}, "expected a string or an object with its `content`"),
        ({CONFIG: {"extra_special_tokens": "<new>"}}, "extra_special_tokens is '<new>', expected a list"),
        ({CONFIG: {"added_tokens_decoder": ["<new>"]}}, "added_tokens_decoder is .*, expected an object"),
        ({CONFIG: {"added_tokens_decoder": {"x": {"content": "<new>"}}}}, "id of an added token is 'x'"),
        ({CONFIG: {"added_tokens_decoder": {"1505": entry("<new>")}}}, "the id 1505, but the vocabulary gives it 1500"),
        ({ADDED_FILE: {"<s>": 7}}, "the id 7, but the vocabulary gives it 1"),
        ({ADDED_FILE: {"<new>": None}}, "id of an added token is None"),
        ({CONFIG: {"chat_template": [{"name": "default"}]}}, "chat_template is .*, expected a string or a list"),
        ({CONFIG: {"tokenizer_class": "T5Tokenizer"}}, "tokenizer_class is 'T5Tokenizer'"),
        ({"config.json": {"tokenizer_class": "T5Tokenizer"}}, "tokenizer_class is 'T5Tokenizer'"),
        ({CONFIG: {"auto_map": {"AutoTokenizer": ["own.Own", None]}}}, r"the model's own code \(auto_map: \['own"),
        ({CONFIG: {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}}, "fast_tokenizer_files names a tokenizer"),
        ({"generation_config.json": {"eos_token_id": "2"}}, "'eos_token_id' is '2'; an integer"),
    ],
)
def test_settings_that_cannot_be_followed(
    vocabularies: Path, tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    shutil.copytree(vocabularies / "sentencepiece", tmp_path, dirs_exist_ok=True)
    write(tmp_path, files)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
