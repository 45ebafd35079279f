"""Tokenizers: Hugging Face's tokenizer.json and SentencePiece's tokenizer.model, both run by the tokenizers library."""

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
from eabf_jax.interop.directory import read_json_object, write_json

# The generated module defines its classes when it is imported, where no type checker sees them.
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

# transformers' classes that make their own rules around a vocabulary, whatever file it comes from.
_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
# The special tokens that a class has where the files name none; only those that the vocabulary holds count.
_CLASS_TOKENS = {
    **{kind: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} for kind in _LLAMA_CLASSES},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
# What a tokenizer.model may be named as besides: these follow the file.
_GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
_SPACE = "▁"


class Tokenizer:
    """Text to token ids and back, as transformers' `AutoTokenizer` does it for the same directory.

    docs/tokenizers.md lists every file and key that is looked at.

    Attributes:
      vocab_size: one more than the largest token id.
      bos_id, eos_id, unk_id, pad_id: ids of the special tokens, None where the tokenizer has none.
      eos_ids: every id that ends a generation, from generation_config.json where it says so.
      adds_bos: whether a text given to the model is to begin with the token `bos_id`.
      special_tokens: text of each special token that has a name: bos_token, eos_token, and what else there is.
      added_ids: ids of the tokens that are cut out of a text before all else, special or not.
      chat_templates: Jinja source of each chat template by its name.
      chat_template: the one that is called default, or None.
    """

    def __init__(self, directory: Path | str):
        """Reads the tokenizer of a directory; tokenizer.json is preferred where tokenizer.model is there too.

        Raises:
          InputError: no tokenizer there, or a file that cannot be read as what its name says.
        """
        self._directory = Path(directory)
        settings = _read_settings(self._directory)
        self._parsing, self.special_tokens = _build(self._directory, settings)
        self._literal = _without_markup(self._parsing)
        # A tokenizer may be told to take even the names of its special tokens for text.
        self._parsing.encode_special_tokens = bool(settings.values.get("split_special_tokens", False))
        self.vocab_size: int = 1 + max(self._parsing.get_vocab(with_added_tokens=True).values(), default=-1)
        self.added_ids = frozenset(self._parsing.get_added_tokens_decoder())
        generation = _read_json(self._directory / "config.json")
        generation |= _read_json(self._directory / "generation_config.json")
        # Where no file names the token, what is set before each text tells.
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
        """The id of a special token: the tokenizer's, else the model's unless the tokenizer says that there is none."""
        named = self.special_tokens.get(f"{role}_token")
        if named is not None:
            return self._parsing.token_to_id(named)
        if f"{role}_token" in settings.values:
            return None
        ids = _as_ids(f"{role}_token_id", model.get(f"{role}_token_id"))
        return ids[0] if ids else None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Turns text into ids; never adds a beginning or an end token by itself.

        Args:
          special: whether strings such as `<s>` or `<|im_start|>` become the special tokens they name (for chat
            templates); else they are text like any other (for what a user wrote).

        Raises:
          InputError: text with bytes that were no text where it was read.
        """
        return self._encoding(text, special).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Turns text with special tokens in it into ids, each with the begin and end of its characters in the text.

        Raises:
          InputError: as `encode`.
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
        """Turns ids into text; ids outside the vocabulary appear as nothing.

        Args:
          special: whether special tokens appear as their names; else as nothing.
        """
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._parsing.decode(known, skip_special_tokens=not special)

    def token_id(self, piece: str) -> int | None:
        """The id of one piece of the vocabulary (or special token), None where there is no such piece."""
        return self._parsing.token_to_id(piece)

    def save(self, directory: Path | str) -> None:
        """Copies the tokenizer's files, special tokens and chat template included, into a directory."""
        copy_tokenizer_files(self._directory, Path(directory))


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face or native model directory; see `Tokenizer`."""
    return Tokenizer(directory)


def has_tokenizer(directory: Path | str) -> bool:
    """Whether a directory holds a tokenizer that `load_tokenizer` can read."""
    return any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def copy_tokenizer_files(source: Path, destination: Path) -> None:
    """Copies whichever of a tokenizer's files are in `source`; each appears whole or not at all."""
    if source.resolve() == destination.resolve():
        return
    for name in TOKENIZER_FILES:
        if not (source / name).exists():
            continue
        with whole(destination / name) as partial:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial)
            else:
                shutil.copytree(source / name, partial)
                shutil.rmtree(destination / name, ignore_errors=True)


def export_tokenizer(source: Path, destination: Path, window: int) -> None:
    """Copies a tokenizer's files into an exported model's directory, so that every release of transformers reads them.

    What the releases take for granted differently is spelled out: the class, without which transformers 4 asks for
    leave to run the model's code; whether a text begins with BOS; and the rules of LLaMA's class, which go into a
    tokenizer.json. `model_max_length` grows to the model's window.

    Args:
      source: folder that holds the files, or no tokenizer at all.
      window: the model's, in tokens.
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
    """Writes a tokenizer.json that holds the rules in force, and returns the settings that belong to it."""
    tokenizer = Tokenizer(directory)
    kind = _class(settings, directory) or _GENERIC_CLASSES[0]
    # transformers 4 knows only one of their names.
    spelled: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} if kind in _GENERIC_CLASSES else {}
    if kind in _LLAMA_CLASSES:
        spelled |= {"add_bos_token": tokenizer.adds_bos, "legacy": bool(settings.get("legacy", False))}
    if kind in _LLAMA_CLASSES or not (directory / "tokenizer.json").is_file():
        tokenizer._parsing.save(str(directory / "tokenizer.json"))
        spelled |= {role: text for role, text in tokenizer.special_tokens.items() if role not in settings}
    return spelled


# --- the files of settings --------------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """What the JSON files beside a vocabulary say.

    Attributes:
      values: tokenizer_config.json, with special_tokens_map.json over it where that is still in force.
      added: tokens that are given an id, by that id.
      named: special tokens that have a name, such as bos_token.
      extra: special tokens without one.
      source: the file to name in messages.
    """

    values: dict[str, Any]
    added: dict[int, AddedToken]
    named: dict[str, AddedToken]
    extra: list[AddedToken]
    source: Path


def _read_settings(directory: Path) -> _Settings:
    """Reads the files beside the vocabulary: `added_tokens_decoder` makes the two older files void."""
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
    """The special tokens that have a name, as bos_token and whatever else ends like that, and those without one."""
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
    """A token, which the files spell as a string or as an object with flags."""
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
    """Every chat template by name; those in files of their own take the place of all in tokenizer_config.json."""
    files = {path.stem: path for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: _read_text(path) for name, path in files.items()}
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
    """A JSON object from a file, empty where there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid UTF-8: {error.reason} at byte {error.start}") from error


def _short(value: Any) -> str:
    return repr(value)[:80]


# --- the vocabulary and its rules -------------------------------------------------------------------------------------


def _build(directory: Path, settings: _Settings) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Makes the tokenizer of a directory: its vocabulary and rules, and the tokens beside them.

    Returns:
      The tokenizer, and the text of each special token that has a name.
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
        proto = _read_sentencepiece(directory / "tokenizer.model")
        backend, settings = _from_sentencepiece(proto, directory, kind, settings)
        roles = {role: getattr(proto.trainer_spec, f"{role}_id") for role in ("bos", "eos", "unk")}
        defaults = {f"{role}_token": proto.pieces[i].piece for role, i in roles.items() if 0 <= i < len(proto.pieces)}
        # Meta's code begins every text with BOS, and so did transformers until release 5, which wants to be told.
        begins = bool(values.get("add_bos_token", True))
    else:
        raise InputError(f"no tokenizer in {directory}: neither tokenizer.json nor tokenizer.model is there")
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
    """The name of the tokenizer's class, empty where no file names one."""
    named = values.get("tokenizer_class") or _read_json(directory / "config.json").get("tokenizer_class")
    kind = str(named or "").removesuffix("Fast")
    code = values.get("auto_map")
    code = code.get("AutoTokenizer") if isinstance(code, dict) else code
    if code and kind not in (*_GENERIC_CLASSES, *_CLASS_TOKENS):
        raise InputError(
            f"{directory}: the tokenizer is code of the model's own (auto_map: {_short(code)}), which is not run; "
            "save it with transformers as a tokenizer.json whose class is PreTrainedTokenizerFast"
        )
    versions = values.get("fast_tokenizer_files") or ["tokenizer.json"]
    if versions != ["tokenizer.json"]:
        raise InputError(
            f"{directory}: fast_tokenizer_files names a tokenizer for each release ({_short(versions)}); expected "
            "tokenizer.json alone: copy the one that is meant there, and take the key out"
        )
    return kind


def _add_tokens(backend: tokenizers.Tokenizer, settings: _Settings) -> None:
    """Adds the tokens beside the vocabulary; a new one gets the next free id, so the order is that of transformers."""
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
                f"{settings.source.parent}: the added token {token.content!r} is to have the id {i}, and the "
                f"vocabulary gives it {found}; expected ids that go on where the vocabulary ends, without gaps"
            )


def _without_markup(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer, to which the name of a special token is text like any other."""
    source = backend.to_str()
    literal = tokenizers.Tokenizer.from_str(source)
    literal.encode_special_tokens = True
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    # A vocabulary may spell such a name out all the same, as the best piece or as the sum of its merges.
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
    """The tokenizer of a tokenizer.json, and the class that it is of."""
    text = _read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises a bare Exception
        raise InputError(
            f"{path}: not a tokenizer.json that the tokenizers library reads: {one_line(error)}"
        ) from error
    # LLaMA's class makes its rules anew, except for a byte-level vocabulary (Llama 3's), which it was not made for.
    if kind in _LLAMA_CLASSES:
        if isinstance(backend.model, models.BPE) and '"ByteLevel"' not in text:
            _set_llama_rules(backend, kind, values)
        else:
            kind = ""
    return backend, kind


def _set_llama_rules(backend: tokenizers.Tokenizer, kind: str, values: Mapping[str, Any]) -> None:
    """White space becomes ▁, one of them before the text, and after each special token with the setting `legacy`.

    Source: transformers, `LlamaTokenizer`.
    """
    prefix = values.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    legacy = bool(values.get("legacy", False)) and kind == "LlamaTokenizer"
    scheme = ("always" if legacy else "first") if prefix else "never"
    # A normalizer cannot be taken away in the library's type stubs.
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    backend.decoder = _space_decoder(strips=prefix)


def _space_decoder(strips: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if strips else steps)


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def _read_sentencepiece(path: Path) -> Any:
    data = path.read_bytes()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=data)
        proto = MODEL_PROTO.FromString(data)
    except (OSError, RuntimeError, DecodeError) as error:
        raise InputError(f"{path}: not a SentencePiece model: {one_line(error)}") from error
    if not proto.pieces:  # an empty file parses
        raise InputError(f"{path}: not a whole SentencePiece model: it has no pieces; copy it again")
    if proto.trainer_spec.model_type not in (proto.trainer_spec.BPE, proto.trainer_spec.UNIGRAM):
        kind = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type)
        raise InputError(f"{path}: the SentencePiece model is of the type {kind}, expected BPE or UNIGRAM")
    return proto


def _from_sentencepiece(
    proto: Any, directory: Path, kind: str, settings: _Settings
) -> tuple[tokenizers.Tokenizer, _Settings]:
    """The same vocabulary and merges in the tokenizers library, by the class' rules, else by the file's own.

    Returns:
      The tokenizer, and the settings with the file's own tokens among them.
    """
    if kind and kind not in (*_LLAMA_CLASSES, *_GENERIC_CLASSES):
        raise InputError(
            f"{directory}: tokenizer_class is {kind!r}, whose rules around a tokenizer.model are not known; expected "
            f"{', '.join(_LLAMA_CLASSES)}, or a tokenizer.json, which holds its rules"
        )
    # Reserved pieces take the names of the added tokens that have their ids.
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
            # Matched in the text as it is, so that the stretches between them get their spaces.
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
    """Every pair of pieces that makes a piece, the best piece's first: SentencePiece merges by the result's score."""
    normal = {
        piece.piece: (-piece.score, i) for i, piece in enumerate(proto.pieces) if piece.type == PIECE_KINDS.NORMAL
    }
    for piece in sorted(normal, key=normal.__getitem__):
        for cut in range(1, len(piece)):
            if piece[:cut] in normal and piece[cut:] in normal:
                yield piece[:cut], piece[cut:]


def _set_sentencepiece_rules(backend: tokenizers.Tokenizer, proto: Any, legacy: bool) -> None:
    """What the model file says of white space; `legacy` sets a space before every stretch between special tokens.

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
        # The step below leaves out the prefix where the text begins with a space; SentencePiece does not.
        steps.append(normalizers.Replace(tokenizers.Regex(rf"\A{_SPACE}"), _SPACE * 2))
    backend.normalizer = normalizers.Sequence(steps)
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if spec.add_dummy_prefix:
        scheme = "always" if legacy else "first"
        cuts.append(pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False))
    defined = [piece.piece for piece in proto.pieces if piece.type == PIECE_KINDS.USER_DEFINED]
    if defined:
        # Such a piece is never merged from others, so it is cut out and found whole.
        if isinstance(backend.model, models.BPE):
            backend.model.ignore_merges = True
        pattern = "|".join(re.escape(piece) for piece in sorted(defined, key=len, reverse=True))
        cuts.append(pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"))
    if cuts:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = _space_decoder(strips=spec.add_dummy_prefix)
