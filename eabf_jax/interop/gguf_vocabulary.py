"""Describes a directory's tokenizer in the keys of a GGUF file, which `gguf_tokenizer` reads."""

import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from eabf_jax.errors import InputError
from eabf_jax.interop.directory import read_json_object
from eabf_jax.interop.gguf_file import GgufFile
from eabf_jax.interop.gguf_tokenizer import (
    ADD_BOS,
    ADD_EOS,
    ADD_PREFIX,
    ENDS,
    IDS,
    MERGES,
    MODEL,
    PIECES,
    PRE,
    SCORES,
    SPLITTINGS,
    TEMPLATE,
    TEMPLATE_NAMES,
    TYPES,
    Splitting,
    pre_tokenizer,
    read_vocabulary,
    write_tokenizer,
)
from eabf_jax.interop.native import check_vocabulary
from eabf_jax.interop.tokenizer import PIECE_KINDS, Tokenizer, has_tokenizer, load_tokenizer, read_sentencepiece
from eabf_jax.model.config import LlamaConfig

_BYTE = re.compile("<0x[0-9A-F]{2}>")

# One character of each class that splitting rules tell apart; their triples show how a rule treats each context.
_CLASSES = ("a", "B", "é", "中", "1", "٣", "'", ".", "$", "_", " ", "\u00a0", "\n", "\t", "🎉", "\u0301")
_WORDS = "We'll see: I'm, don't, they've, it's, he'd, YOU'RE; 1234567 12345678\n\n  x   =  3.14\r\n\tdéjà 東京 مرحبا "

# Pieces of the vocabulary that are tokenized together in the comparison.
_TOGETHER = 64


def tokenizer_keys(directory: Path, config: LlamaConfig) -> dict[str, Any]:
    """Describes a tokenizer in GGUF's keys.

    The keys are read back as `from_gguf` reads them, and the result must tokenize like the source: probes for the
    splitting rules, and every piece of the vocabulary. Two differences remain for SentencePiece: llama.cpp puts a space
    before each text that follows a special token, and before a text that begins with one.

    Args:
      directory: of a Hugging Face or native model; it may have no tokenizer.

    Returns:
      Values by key.

    Raises:
      InputError: the tokenizer is invalid, or GGUF has no keys for its rules.
    """
    if not has_tokenizer(directory):
        return {MODEL: "none"}
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config, directory)
    state = json.loads(tokenizer.backend.to_str())
    if state["model"]["type"] != "BPE":
        raise _refused(directory, f"the tokenizer's model is {state['model']['type']}, expected BPE")
    byte_level = '"ByteLevel"' in json.dumps(state["pre_tokenizer"])
    stored = {} if byte_level else _sentencepiece(directory)
    by_id = {i: piece for piece, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    # llama.cpp needs a token for each row of the embedding; these names are its converter's.
    pieces = [by_id.get(i, f"[PAD{i}]") for i in range(config.vocab_size)]
    stored = {i: piece for i, piece in stored.items() if i < len(pieces) and piece.piece == pieces[i]}
    added = {i: token.special for i, token in tokenizer.backend.get_added_tokens_decoder().items()}

    def kind(i: int, piece: str) -> int:
        if i not in by_id:
            return PIECE_KINDS.UNUSED
        if not byte_level and piece == state["model"]["unk_token"]:
            return PIECE_KINDS.UNKNOWN
        if i in added:
            return PIECE_KINDS.CONTROL if added[i] else PIECE_KINDS.USER_DEFINED
        if i in stored:
            return stored[i].type
        return PIECE_KINDS.BYTE if not byte_level and _BYTE.fullmatch(piece) else PIECE_KINDS.NORMAL

    types = [kind(i, piece) for i, piece in enumerate(pieces)]
    keys = {
        PIECES: pieces,
        TYPES: types,
        **_special(directory, tokenizer, config, pieces, types),
        **_templates(tokenizer.chat_templates),
    }
    merges = [(first, second) for first, second in state["model"]["merges"]]
    rules = _byte_pair_rules(tokenizer, merges) if byte_level else _sentencepiece_rules(stored, merges, pieces)
    plain = [i for i, kind in enumerate(types) if kind in (PIECE_KINDS.NORMAL, PIECE_KINDS.BYTE)]
    defined = [pieces[i] for i, kind in enumerate(types) if kind == PIECE_KINDS.USER_DEFINED]
    probes = [*_probes(spaces=byte_level), *(f"a {piece}" for piece in defined)]
    for begin in range(0, len(plain), _TOGETHER):
        text = tokenizer.decode(plain[begin : begin + _TOGETHER])
        probes.append(text if byte_level else text.lstrip())
    reason = f"the tokenizer cuts texts by a rule that {PRE} has no name for"
    for rule in rules:
        candidate = {**keys, **rule}
        again = _read_back(directory, candidate)
        difference = next((text for text in probes if tokenizer.encode(text) != again.encode(text)), None)
        if difference is None:
            return candidate
        reason = f"the tokenizer splits texts, for example {difference[:40]!r}, in a way that GGUF has no keys for"
    raise _refused(directory, reason)


def _refused(directory: Path, message: str) -> InputError:
    return InputError(
        f"{directory}: {message}: copy the model without its tokenizer's files to convert only the weights, or serve "
        "its Hugging Face directory (convert/to_hf.py) with transformers"
    )


def _sentencepiece(directory: Path) -> dict[int, Any]:
    """Reads the pieces of a tokenizer.model, by id; empty if there is no such file."""
    path = directory / "tokenizer.model"
    return dict(enumerate(read_sentencepiece(path).pieces)) if path.is_file() else {}


def _byte_pair_rules(tokenizer: Tokenizer, merges: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yields the rules that split all probes as the tokenizer does."""
    cut = tokenizer.backend.pre_tokenizer
    assert cut is not None  # a byte-level vocabulary is recognised by it
    names: dict[Splitting, str] = {}
    for name, splitting in SPLITTINGS.items():
        names.setdefault(splitting, name)
    for splitting, name in names.items():
        own = pre_tokenizer(splitting)
        if all(cut.pre_tokenize_str(text) == own.pre_tokenize_str(text) for text in _probes(spaces=True)):
            yield {MODEL: "gpt2", PRE: name, MERGES: [f"{first} {second}" for first, second in merges]}


def _sentencepiece_rules(
    stored: Mapping[int, Any], merges: list[tuple[str, str]], pieces: list[str]
) -> Iterator[dict[str, Any]]:
    """Yields rules with the scores of the tokenizer.model, or else with scores that give the same order of merges."""
    order = {piece: -float(rank) for rank, piece in enumerate(dict.fromkeys(map("".join, merges)))}
    derived = [order.get(piece, -float(len(order) + i)) for i, piece in enumerate(pieces)]
    kept = [stored[i].score if i in stored else score for i, score in enumerate(derived)]
    for scores, prefix in itertools.product([kept, derived] if stored else [derived], (True, False)):
        yield {MODEL: "llama", PRE: "default", SCORES: scores, ADD_PREFIX: prefix}


def _special(
    directory: Path, tokenizer: Tokenizer, config: LlamaConfig, pieces: list[str], types: list[int]
) -> dict[str, Any]:
    """Returns the ids of the special tokens, and which of them are put around a text."""
    configured = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    ends = dict.fromkeys(i for i in (tokenizer.eos_id, *tokenizer.eos_ids, *configured) if i is not None)
    if not ends:
        raise _refused(directory, "the tokenizer has no EOS token, and llama.cpp would take another one for it")
    if max(ends) >= len(pieces):
        raise InputError(f"{directory}: eos_token_id is {max(ends)}, expected one of the {len(pieces)} tokens")
    eos, *others = ends
    others = [i for i in others if pieces[i] not in ENDS or types[i] != PIECE_KINDS.CONTROL]  # those have no key
    if len(others) > 2:
        raise _refused(directory, f"{len(others) + 1} tokens end a text, and GGUF has keys for three")
    found = {
        "bos": config.bos_token_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "eos": eos,
        **dict(zip(("eot", "eom"), others, strict=False)),
        "unk": tokenizer.unk_id,
        "pad": config.pad_token_id if tokenizer.pad_id is None else tokenizer.pad_id,
    }
    before, after = _around(tokenizer.backend)
    if before not in ([], [found["bos"]]) or after not in ([], [eos]):
        raise _refused(
            directory, f"the tokenizer puts {before} before a text and {after} after it, expected only BOS and EOS"
        )
    adds_eos = bool(after)
    if not (directory / "tokenizer.json").is_file() and (directory / "tokenizer_config.json").is_file():
        adds_eos |= read_json_object(directory / "tokenizer_config.json").get("add_eos_token") is True
    ids = {IDS[role]: i for role, i in found.items() if i is not None}
    return {**ids, ADD_BOS: bool(before), ADD_EOS: adds_eos}


def _around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids of the tokens that are put before and after each text."""
    plain, whole = (backend.encode(_WORDS, add_special_tokens=special).ids for special in (False, True))
    begin = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), len(whole))
    return whole[:begin], whole[begin + len(plain) :]


def _templates(templates: Mapping[str, str]) -> dict[str, Any]:
    others = {name: template for name, template in templates.items() if name != "default"}
    keys: dict[str, Any] = {TEMPLATE: templates["default"]} if "default" in templates else {}
    if others:
        keys |= {TEMPLATE_NAMES: list(others), **{f"{TEMPLATE}.{name}": source for name, source in others.items()}}
    return keys


def _read_back(directory: Path, keys: Mapping[str, Any]) -> Tokenizer:
    """Loads the tokenizer that `from_gguf` makes of these keys."""
    vocabulary = read_vocabulary(GgufFile(directory, keys, {}))
    assert vocabulary is not None
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), vocabulary)
        return load_tokenizer(folder)


def _probes(spaces: bool) -> list[str]:
    """Returns short texts with every combination of three character classes, and one of words and numbers.

    Args:
      spaces: whether some texts begin with a space.
    """
    triples = map("".join, itertools.product(_CLASSES, repeat=3))
    return [text for text in (*triples, _WORDS) if spaces or not text.startswith(" ")]
