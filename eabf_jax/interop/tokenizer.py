"""Reads tokenizer.json (Hugging Face) and tokenizer.model (SentencePiece) into the tokenizers library."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from eabf_jax.destination import whole
from eabf_jax.errors import InputError, one_line
from eabf_jax.fields import typed
from eabf_jax.interop.directory import is_inside, read_json_object, refuse_pointer, write_json
from eabf_jax.reading import parse_json, read_text, reading

# The generated module defines its classes at import time, which type checkers cannot see.
MODEL_PROTO: Any = vars(sentencepiece_proto)["ModelProto"]
PIECE_KINDS: Any = MODEL_PROTO.SentencePiece

TEMPLATE_FOLDER = "additional_chat_templates"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    TEMPLATE_FOLDER,
    "generation_config.json",
)

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")

# transformers' classes that replace the rules of a vocabulary's file with their own.
_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
# The special tokens of a class if the files name none; those that the vocabulary lacks are ignored.
_CLASS_TOKENS = {
    **{kind: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} for kind in _LLAMA_CLASSES},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
# Classes that keep the rules of the file.
_GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
_SPACE = "▁"


class Tokenizer:
    """A tokenizer that agrees with transformers' `AutoTokenizer` for the same directory.

    docs/tokenizers.md lists every file and key that it reads.

    Attributes:
      vocab_size: one more than the largest token id.
      bos_id, eos_id, unk_id, pad_id: ids of the special tokens; None if there is no such token.
      eos_ids: every id that ends a generation: those in generation_config.json or config.json, else `eos_id`.
      adds_bos: whether texts given to the model begin with `bos_id`.
      special_tokens: text of each special token by its name, such as bos_token.
      added_ids: ids of the tokens, special or not, that are split off before the rest of a text is tokenized.
      chat_templates: Jinja source of each chat template by name.
      chat_template: the template named default, or None.
    """

    def __init__(self, directory: Path | str):
        """Reads the tokenizer of a directory; tokenizer.json takes precedence over tokenizer.model.

        Raises:
          InputError: there is no tokenizer, or a file is invalid or a link that leads out of the directory.
        """
        self._directory = Path(directory)
        _refuse_links_out(self._directory)
        with reading(self._directory, "not a tokenizer that can be read"):
            self._read()

    def _read(self) -> None:
        settings = _read_settings(self._directory)
        self._parsing, self.special_tokens = _build(self._directory, settings)
        self._literal = _without_markup(self._parsing)
        # With this setting, even the names of special tokens are plain text.
        self._parsing.encode_special_tokens = bool(settings.values.get("split_special_tokens", False))
        self.vocab_size: int = 1 + max(self._parsing.get_vocab(with_added_tokens=True).values(), default=-1)
        self.added_ids = frozenset(self._parsing.get_added_tokens_decoder())
        generation = _read_json(self._directory / "config.json")
        generation |= _read_json(self._directory / "generation_config.json")
        # If no file names the token, BOS is the one that the tokenizer puts before each text.
        opening = self._parsing.encode("").ids[:1]
        self.bos_id = self._special_id("bos", settings, {"bos_token_id": opening, **generation})
        self.eos_id = self._special_id("eos", settings, generation)
        self.pad_id = self._special_id("pad", settings, generation)
        self.unk_id = self._special_id("unk", settings, {})
        ends = _as_ids("eos_token_id", generation.get("eos_token_id"))
        self.eos_ids: tuple[int, ...] = ends or (() if self.eos_id is None else (self.eos_id,))
        self.adds_bos: bool = self.bos_id in opening
        self.chat_templates = _chat_templates(self._directory, settings)
        self.chat_template = self.chat_templates.get("default")

    def _special_id(self, role: str, settings: "_Settings", model: Mapping[str, Any]) -> int | None:
        """Finds a special token's id: the tokenizer's, or the model's unless the tokenizer sets the token to null."""
        named = self.special_tokens.get(f"{role}_token")
        if named is not None:
            return self._parsing.token_to_id(named)
        if f"{role}_token" in settings.values:
            return None
        ids = _as_ids(f"{role}_token_id", model.get(f"{role}_token_id"))
        return ids[0] if ids else None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Turns text into ids, without adding a beginning or end token.

        Args:
          special: whether strings such as `<s>` or `<|im_start|>` become special tokens (as chat templates need) or
            stay plain text (for text that a user wrote).

        Raises:
          InputError: the text has lone surrogates, which stand for bytes that could not be decoded.
        """
        return self._encoding(text, special).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Turns text with special tokens into ids, each with the start and end of its characters in the text.

        Raises:
          InputError: as for `encode`.
        """
        encoding = self._encoding(text, special=True)
        return encoding.ids, encoding.offsets

    def _encoding(self, text: str, special: bool) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a text is not valid UTF-8: {error.reason} at character {error.start}") from error
        return (self._parsing if special else self._literal).encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """Turns ids into text; ids outside the vocabulary are skipped.

        Args:
          special: whether special tokens appear by name or are skipped.
        """
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._parsing.decode(known, skip_special_tokens=not special)

    def token_id(self, piece: str) -> int | None:
        """Returns the id of a piece of the vocabulary or of a special token; None if there is no such token."""
        return self._parsing.token_to_id(piece)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizers library's object, with which the names of special tokens become these tokens."""
        return self._parsing

    def save(self, directory: Path | str) -> None:
        """Copies the tokenizer's files into a directory, including special tokens and chat templates."""
        copy_tokenizer_files(self._directory, Path(directory))


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face or native model directory; see `Tokenizer`."""
    return Tokenizer(directory)


def has_tokenizer(directory: Path | str) -> bool:
    """Returns whether a directory holds a file that `load_tokenizer` reads."""
    return any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def copy_tokenizer_files(source: Path, destination: Path) -> None:
    """Copies the tokenizer's files that are in `source`, each of them atomically.

    Raises:
      InputError: a file is a link that leads out of `source`, except to the blobs of the Hub's cache.
    """
    if source.resolve() == destination.resolve():
        return
    _refuse_links_out(source)
    for name in TOKENIZER_FILES:
        if not (source / name).exists():
            continue
        with whole(destination / name) as partial:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial)
            else:
                partial.mkdir()
                for template in (source / name).glob("*.jinja"):
                    shutil.copyfile(template, partial / template.name)
                shutil.rmtree(destination / name, ignore_errors=True)


def _refuse_links_out(directory: Path) -> None:
    """Refuses links to files elsewhere, whose content a converted or exported model would hold."""
    for name in (*TOKENIZER_FILES, "config.json"):
        path = directory / name
        for file in (path, *path.glob("*.jinja")):
            if file.exists() and not is_inside(file, directory):
                raise InputError(
                    f"{file}: a link to {file.resolve()}, which is outside the model's directory; copy the file itself "
                    "there if it belongs to the model"
                )


def export_tokenizer(source: Path, destination: Path, window: int) -> None:
    """Copies a tokenizer's files into an exported model's directory, for every release of transformers.

    Settings whose defaults differ between releases are written out: the class, without which transformers 4 asks for
    permission to run the model's code; whether a text begins with BOS; and the rules of LLaMA's class, as a
    tokenizer.json. A smaller `model_max_length` is raised to the model's window.

    Args:
      source: directory of the files; it may have no tokenizer.
      window: the model's context window, in tokens.
    """
    copy_tokenizer_files(source, destination)
    path = destination / "tokenizer_config.json"
    found = _read_json(path)
    settings = dict(found)
    length = settings.get("model_max_length")
    if isinstance(length, int) and length < window:
        settings["model_max_length"] = window
    if has_tokenizer(destination):
        settings |= _spelled_out(settings, destination)
    if settings != found:
        write_json(path, settings)


def _spelled_out(settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Returns the settings to write out; also writes a tokenizer.json with the current rules if one is needed."""
    tokenizer = Tokenizer(directory)
    kind = _class(settings, directory) or _GENERIC_CLASSES[0]
    # transformers 4 knows only this one of the generic classes.
    spelled: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} if kind in _GENERIC_CLASSES else {}
    if kind in _LLAMA_CLASSES:
        spelled |= {"add_bos_token": tokenizer.adds_bos, "legacy": bool(settings.get("legacy", False))}
    if kind in _LLAMA_CLASSES or not (directory / "tokenizer.json").is_file():
        tokenizer._parsing.save(str(directory / "tokenizer.json"))
        spelled |= {role: text for role, text in tokenizer.special_tokens.items() if role not in settings}
    return spelled


# --- settings files ---------------------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """The settings in the JSON files beside a vocabulary.

    Attributes:
      values: tokenizer_config.json, overridden by special_tokens_map.json if that applies.
      added: tokens with an explicit id, by that id.
      named: special tokens that have a name, such as bos_token.
      extra: special tokens without a name.
      source: the file to name in messages.
    """

    values: dict[str, Any]
    added: dict[int, AddedToken]
    named: dict[str, AddedToken]
    extra: list[AddedToken]
    source: Path


def _read_settings(directory: Path) -> _Settings:
    """Reads the files beside the vocabulary; with `added_tokens_decoder`, the two older files are ignored."""
    path = directory / "tokenizer_config.json"
    values = _read_json(path)
    named, extra = _special_tokens(values, path)
    listed = values.get("added_tokens_decoder")
    if listed is not None:
        if not isinstance(listed, dict):
            raise InputError(f"{path}: added_tokens_decoder is {_short(listed)}, expected an object of id to token")
        added = {_id(i, path): _token(entry, path) for i, entry in listed.items()}
        return _Settings(values, added, named, extra, path)
    older = directory / "special_tokens_map.json"
    special_map = _read_json(older)
    named_there, extra_there = _special_tokens(special_map, older)
    named = {role: token for role, token in named.items() if role not in special_map} | named_there
    extra += extra_there
    special = {token.content for token in [*named.values(), *extra]}
    older = directory / "added_tokens.json"
    added = {
        _id(i, older): AddedToken(text, special=text in special, normalized=text not in special)
        for text, i in _read_json(older).items()
    }
    return _Settings(values | special_map, added, named, extra, path)


def _special_tokens(values: Mapping[str, Any], path: Path) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Returns the special tokens under keys such as bos_token (any `…_token`), and those without a name."""
    named = {role: values[role] for role in ROLES if role in values}
    named |= {key: value for key, value in values.items() if key.endswith("_token") and isinstance(value, str | dict)}
    unnamed: list[Any] = []
    for key in ("extra_special_tokens", "additional_special_tokens"):
        listed = values.get(key) or []
        if isinstance(listed, dict):
            named |= listed
        elif isinstance(listed, list):
            unnamed += listed
        else:
            raise InputError(f"{path}: {key} is {_short(listed)}, expected a list of tokens")
    tokens = {key: _token(value, path, special=True) for key, value in named.items() if value is not None}
    return tokens, [_token(entry, path, special=True) for entry in unnamed]


def _token(entry: Any, path: Path, special: bool = False) -> AddedToken:
    """Reads a token, which is a string or an object with flags."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str) or not text:
        raise InputError(f"{path}: a token is {_short(entry)}, expected a string or an object with its `content`")
    flags = {} if isinstance(entry, str) else {key: bool(entry[key]) for key in _TOKEN_FLAGS if key in entry}
    is_special = special or (isinstance(entry, dict) and bool(entry.get("special", False)))
    return AddedToken(text, special=is_special, **flags)


def _id(value: Any, path: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InputError(f"{path}: the id of an added token is {_short(value)}, expected a whole number") from None


def _chat_templates(directory: Path, settings: _Settings) -> dict[str, str]:
    """Returns every chat template by name; template files replace all templates in tokenizer_config.json."""
    files = {path.stem: path for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: read_text(path) for name, path in files.items()}
    found = settings.values.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        named = found if isinstance(found, dict) else {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(part, str) for item in named.items() for part in item):
        raise InputError(
            f"{settings.source}: chat_template is {_short(found)}, expected a string or a list of objects with `name` "
            "and `template`"
        )
    return named


def _as_ids(key: str, value: Any) -> tuple[int, ...]:
    ids = typed(int | tuple[int, ...] | None, value, "config.json or generation_config.json: key", key)
    return () if ids is None else ids if isinstance(ids, tuple) else (ids,)


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def _short(value: Any) -> str:
    return repr(value)[:80]


# --- the vocabulary and its rules -------------------------------------------------------------------------------------


def _build(directory: Path, settings: _Settings) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Builds the tokenizer of a directory from its vocabulary, its rules and the settings' tokens.

    Returns:
      The tokenizer, and the text of each special token by name.
    """
    values = settings.values
    kind = _class(values, directory)
    begins = False
    if (directory / "tokenizer.json").is_file():
        backend, kind = _from_json(directory / "tokenizer.json", kind, values)
        defaults = dict(_CLASS_TOKENS.get(kind, {}))
        if backend.padding is not None:
            defaults["pad_token"] = backend.padding["pad_token"]
        backend.no_truncation()
        backend.no_padding()
    elif (directory / "tokenizer.model").is_file():
        proto = read_sentencepiece(directory / "tokenizer.model")
        backend, settings = _from_sentencepiece(proto, directory, kind, settings)
        roles = {role: getattr(proto.trainer_spec, f"{role}_id") for role in ("bos", "eos", "unk")}
        defaults = {f"{role}_token": proto.pieces[i].piece for role, i in roles.items() if 0 <= i < len(proto.pieces)}
        # The default is that of Meta's code and of transformers 4; transformers 5 adds no BOS by default.
        begins = bool(values.get("add_bos_token", True))
    else:
        raise InputError(f"no tokenizer in {directory}: it has neither tokenizer.json nor tokenizer.model")
    named = {
        role: AddedToken(text, special=True)
        for role, text in defaults.items()
        if role not in values and backend.token_to_id(text) is not None
    } | settings.named
    _add_tokens(backend, settings._replace(named=named))
    if begins and "bos_token" in named:
        name = named["bos_token"].content
        backend.post_processor = processors.TemplateProcessing(
            single=[name, "$A"], special_tokens=[(name, backend.token_to_id(name))]
        )
    return backend, {role: token.content for role, token in named.items()}


def _class(values: Mapping[str, Any], directory: Path) -> str:
    """Returns the name of the tokenizer's class without `Fast`; empty if no file names one."""
    named = values.get("tokenizer_class") or _read_json(directory / "config.json").get("tokenizer_class")
    kind = str(named or "").removesuffix("Fast")
    code = values.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if code and kind not in (*_GENERIC_CLASSES, *_CLASS_TOKENS):
        raise InputError(
            f"{directory}: the tokenizer needs the model's own code (auto_map: {_short(code)}), which is never run; "
            "save it with transformers as a tokenizer.json whose class is PreTrainedTokenizerFast"
        )
    versions = values.get("fast_tokenizer_files") or ["tokenizer.json"]
    if versions != ["tokenizer.json"]:
        raise InputError(
            f"{directory}: fast_tokenizer_files names a tokenizer for each release ({_short(versions)}); expected "
            "only tokenizer.json: copy the right one to that name, and remove the key"
        )
    return kind


def _add_tokens(backend: tokenizers.Tokenizer, settings: _Settings) -> None:
    """Adds the settings' tokens in the order of transformers, because each new token gets the next free id."""
    own = list(backend.get_added_tokens_decoder().values())
    tokens = [token for _, token in sorted(settings.added.items()) if token not in own]
    present = {token.content for token in [*own, *tokens]}
    by_role = sorted(settings.named, key=lambda role: ROLES.index(role) if role in ROLES else len(ROLES))
    for token in [*(settings.named[role] for role in by_role), *settings.extra]:
        if token.content not in present and token not in tokens:
            tokens.append(token)
    names = {token.content for token in settings.named.values()}
    for token in tokens:
        token.special = token.special or token.content in names
    backend.add_tokens(tokens)
    for i, token in settings.added.items():
        if (found := backend.token_to_id(token.content)) != i:
            raise InputError(
                f"{settings.source.parent}: the added token {token.content!r} should have the id {i}, but the "
                f"vocabulary gives it {found}; expected ids that continue the vocabulary without gaps"
            )


def _without_markup(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns the same tokenizer, except that it treats the names of special tokens as plain text."""
    source = backend.to_str()
    literal = tokenizers.Tokenizer.from_str(source)
    literal.encode_special_tokens = True
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    # The vocabulary may still form such a name, as the best piece or by merges.
    spelt = {
        text for text in special if backend.token_to_id(text) in literal.encode(text, add_special_tokens=False).ids
    }
    if not spelt:
        return literal
    contents = json.loads(source)
    model = contents["model"]
    if model["type"] == "Unigram":
        floor = min(score for _, score in model["vocab"]) - 1000.0
        model["vocab"] = [[text, floor if text in spelt else score] for text, score in model["vocab"]]
    else:
        model["merges"] = [pair for pair in model.get("merges", []) if "".join(pair) not in spelt]
    literal = tokenizers.Tokenizer.from_str(json.dumps(contents))
    literal.encode_special_tokens = True
    return literal


def _from_json(path: Path, kind: str, values: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, str]:
    """Reads a tokenizer.json; returns the tokenizer and its class, empty for a LLaMA class that does not apply."""
    refuse_pointer(path)
    text = read_text(path)
    fault = "not a tokenizer.json that the tokenizers library can read"
    with reading(path, fault):
        _check_ids(parse_json(text, path, fault), len(text))
        backend = tokenizers.Tokenizer.from_str(text)
    # LLaMA's class replaces the file's rules, except for a byte-level vocabulary such as Llama 3's.
    if kind in _LLAMA_CLASSES:
        if isinstance(backend.model, models.BPE) and '"ByteLevel"' not in text:
            _set_llama_rules(backend, kind, values)
        else:
            kind = ""
    return backend, kind


def _check_ids(contents: dict[str, Any], limit: int) -> None:
    """Refuses ids beyond the size of the file: the library allocates a table up to the largest, and may abort."""
    vocabulary = contents["model"].get("vocab")
    ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else []
    ids += [token["id"] for token in contents.get("added_tokens") or []]
    for i in ids:
        if type(i) is not int or not 0 <= i < limit:
            raise ValueError(f"a token has the id {i!r:.80}, expected ids from 0 without large gaps")


def _set_llama_rules(backend: tokenizers.Tokenizer, kind: str, values: Mapping[str, Any]) -> None:
    """Sets ▁ for each space, one ▁ before the text, and with `legacy` also one after each special token.

    Source: transformers, `LlamaTokenizer`.
    """
    prefix = values.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    legacy = bool(values.get("legacy", False)) and kind == "LlamaTokenizer"
    scheme = ("always" if legacy else "first") if prefix else "never"
    # Not None, which the library's type stubs do not allow.
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    backend.decoder = _space_decoder(strips=prefix)


def _space_decoder(strips: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if strips else steps)


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def read_sentencepiece(path: Path) -> Any:
    """Reads a tokenizer.model; raises InputError if it is not a whole BPE or Unigram model."""
    refuse_pointer(path)
    data = path.read_bytes()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=data)
        proto = MODEL_PROTO.FromString(data)
    except (OSError, RuntimeError, DecodeError) as error:
        own = "; this is Llama 3's own file: copy its tokenizer.json" if re.match(rb"[\w+/]+={0,2} \d+\n", data) else ""
        raise InputError(f"{path}: not a SentencePiece model: {one_line(error)}{own}") from error
    if not proto.pieces:  # an empty file parses
        raise InputError(f"{path}: not a whole SentencePiece model: it has no pieces; copy it again")
    if proto.trainer_spec.model_type not in (proto.trainer_spec.BPE, proto.trainer_spec.UNIGRAM):
        kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
        raise InputError(f"{path}: the SentencePiece model has the type {kind}, expected BPE or UNIGRAM")
    return proto


def _from_sentencepiece(
    proto: Any, directory: Path, kind: str, settings: _Settings
) -> tuple[tokenizers.Tokenizer, _Settings]:
    """Converts a SentencePiece model to the tokenizers library, with the class's rules or else the file's.

    Returns:
      The tokenizer, and the settings with the file's tokens added.
    """
    if kind and kind not in (*_LLAMA_CLASSES, *_GENERIC_CLASSES):
        raise InputError(
            f"{directory}: tokenizer_class is {kind!r}, whose rules for a tokenizer.model are unknown; expected "
            f"{', '.join(_LLAMA_CLASSES)}, or a tokenizer.json, which holds its rules"
        )
    # A reserved piece takes the name of the added token with its id.
    pieces = {piece.piece for piece in proto.pieces}
    for i, token in settings.added.items():
        if 0 <= i < len(proto.pieces) and token.content not in pieces:
            proto.pieces[i].piece = token.content
    kinds = [PIECE_KINDS.CONTROL]
    backend = tokenizers.Tokenizer(_sentencepiece_model(proto))
    if kind in _LLAMA_CLASSES and proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        _set_llama_rules(backend, kind, settings.values)
        kinds.append(PIECE_KINDS.USER_DEFINED)
    else:
        _set_sentencepiece_rules(backend, proto, legacy=bool(settings.values.get("legacy", True)))
        if proto.normalizer_spec.add_dummy_prefix:
            # Matched before normalization, so that the text between them gets its spaces.
            kept = ("special", "single_word", "lstrip", "rstrip")
            raw = {
                i: AddedToken(token.content, normalized=False, **{flag: getattr(token, flag) for flag in kept})
                for i, token in settings.added.items()
            }
            settings = settings._replace(added=raw)
    own = [
        AddedToken(piece.piece, normalized=False, special=piece.type == PIECE_KINDS.CONTROL)
        for piece in proto.pieces
        if piece.type in kinds
    ]
    return backend, settings._replace(extra=[*settings.extra, *own])


def _sentencepiece_model(proto: Any) -> models.Model:
    unknown = proto.trainer_spec.unk_id
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback)
    return models.BPE(
        vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
        merges=list(_merges(proto)),
        unk_token=proto.pieces[unknown].piece if 0 <= unknown < len(proto.pieces) else None,
        fuse_unk=True,
        byte_fallback=True,
    )


def _merges(proto: Any) -> Iterator[tuple[str, str]]:
    """Yields every pair of pieces that forms a piece, best score first: SentencePiece ranks merges by their result."""
    normal = {
        piece.piece: (-piece.score, i) for i, piece in enumerate(proto.pieces) if piece.type == PIECE_KINDS.NORMAL
    }
    for piece in sorted(normal, key=normal.__getitem__):
        for cut in range(1, len(piece)):
            if piece[:cut] in normal and piece[cut:] in normal:
                yield piece[:cut], piece[cut:]


def _set_sentencepiece_rules(backend: tokenizers.Tokenizer, proto: Any, legacy: bool) -> None:
    """Sets the model file's white space rules; `legacy` adds a space before every text between special tokens.

    Source: SentencePiece, `NormalizerSpec`; transformers, `SpmConverter.build_tokenizer_from_spm_proto`.
    """
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        outer, inner = tokenizers.Regex(r"\A +| +\z"), tokenizers.Regex(" {2,}")
        steps += [normalizers.Replace(outer, ""), normalizers.Replace(inner, " ")]
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if spec.add_dummy_prefix and legacy:
        # If the text begins with a space, SentencePiece still adds the prefix, but the Metaspace step below does not.
        steps.append(normalizers.Replace(tokenizers.Regex(rf"\A{_SPACE}"), _SPACE * 2))
    backend.normalizer = normalizers.Sequence(steps)
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if spec.add_dummy_prefix:
        scheme = "always" if legacy else "first"
        cuts.append(pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False))
    defined = [piece.piece for piece in proto.pieces if piece.type == PIECE_KINDS.USER_DEFINED]
    if defined:
        # Such a piece is never the result of merges, so it is split off and looked up as a whole.
        if isinstance(backend.model, models.BPE):
            backend.model.ignore_merges = True
        pattern = "|".join(re.escape(piece) for piece in sorted(defined, key=len, reverse=True))
        cuts.append(pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"))
    if cuts:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = _space_decoder(strips=spec.add_dummy_prefix)
