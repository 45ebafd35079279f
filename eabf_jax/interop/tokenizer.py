"""Tokenizers: Hugging Face's tokenizer.json and SentencePiece's tokenizer.model behind one small class."""

import re
import shutil
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from eabf_jax.errors import InputError
from eabf_jax.interop.directory import read_json_object

# The generated module defines its classes when it is imported, where no type checker sees them.
MODEL_PROTO: Any = vars(sentencepiece_proto)["ModelProto"]
PIECE_KINDS: Any = MODEL_PROTO.SentencePiece

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Tokenizer:
    """Text to token ids and back, as the Hugging Face tokenizer of the same directory does it.

    A SentencePiece model with a dummy prefix (LLaMA's) puts its leading space before the very first piece of text
    only: text that follows a special token gets none. That is what Hugging Face calls `legacy=False`; a
    tokenizer_config.json that says `"legacy": true` gets a leading space after every special token instead. Text that
    begins with a space gets the dummy prefix too, as in SentencePiece itself.

    Attributes:
      vocab_size: one more than the largest token id.
      bos_id, eos_id, unk_id, pad_id: ids of the special tokens, None where the tokenizer has none.
      eos_ids: every id that ends a generation, from generation_config.json where it says so.
      adds_bos: whether a text given to the model is to begin with the token `bos_id`.
      chat_template: the Jinja source of the chat template, or None.
    """

    def __init__(self, directory: Path | str):
        """Reads the tokenizer of a directory; tokenizer.json is preferred where tokenizer.model is there too.

        Args:
          directory: folder that holds tokenizer.json or tokenizer.model.

        Raises:
          InputError: no tokenizer there, or a file that cannot be read as what its name says.
        """
        self._directory = Path(directory)
        settings = _read_json(self._directory / "tokenizer_config.json")
        if (self._directory / "tokenizer.json").is_file():
            self._backend: _JsonBackend | _SentencePieceBackend = _JsonBackend(
                self._directory / "tokenizer.json", settings
            )
        elif (self._directory / "tokenizer.model").is_file():
            self._backend = _SentencePieceBackend(self._directory / "tokenizer.model", settings)
        else:
            raise InputError(f"no tokenizer in {self._directory}: neither tokenizer.json nor tokenizer.model is there")
        self.vocab_size: int = self._backend.vocab_size
        generation = {
            **_read_json(self._directory / "config.json"),
            **_read_json(self._directory / "generation_config.json"),
        }
        names = {**_read_json(self._directory / "special_tokens_map.json"), **settings}
        self.bos_id = self._special_id("bos", names, generation)
        self.eos_id = self._special_id("eos", names, generation)
        self.pad_id = self._special_id("pad", names, generation)
        self.unk_id = self._special_id("unk", names, {})
        ends = _as_ids(generation.get("eos_token_id"))
        self.eos_ids: tuple[int, ...] = ends or (() if self.eos_id is None else (self.eos_id,))
        self.adds_bos: bool = self.bos_id is not None and bool(
            settings.get("add_bos_token", self._backend.opening() == [self.bos_id])
        )
        self.chat_template = _chat_template(self._directory, settings)

    def _special_id(self, role: str, names: dict[str, Any], generation: dict[str, Any]) -> int | None:
        """The id of a special token: by its name in the tokenizer's files, else the backend's, else the model's."""
        named = _content(names.get(f"{role}_token"))
        if named is not None and (found := self.token_id(named)) is not None:
            return found
        if f"{role}_token" not in names and (own := self._backend.special_ids.get(role)) is not None:
            return own
        ids = _as_ids(generation.get(f"{role}_token_id"))
        return ids[0] if ids else None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Turns text into ids; never adds a beginning or an end token by itself.

        Args:
          text: any string.
          special: whether strings such as `<s>` or `<|im_start|>` become the special tokens they name (for chat
            templates); else they are text like any other (for what a user wrote).

        Returns:
          The token ids.
        Raises:
          InputError: text with bytes that were no text where it was read.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a text is no UTF-8: {error.reason} at character {error.start}") from error
        return self._backend.encode(text, special)

    def decode(self, ids: Iterable[int], *, special: bool = True) -> str:
        """Turns ids into text; ids outside the vocabulary appear as nothing.

        Args:
          ids: token ids.
          special: whether special tokens appear as their names; else as nothing.

        Returns:
          The text.
        """
        return self._backend.decode([int(i) for i in ids if 0 <= int(i) < self.vocab_size], special)

    def token_id(self, piece: str) -> int | None:
        """The id of one piece of the vocabulary (or special token), None where there is no such piece."""
        return self._backend.token_id(piece)

    def save(self, directory: Path | str) -> None:
        """Copies the tokenizer's files, special tokens and chat template included, into a directory.

        Args:
          directory: an existing folder.
        """
        copy_tokenizer_files(self._directory, Path(directory))


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face or native model directory.

    Args:
      directory: folder with tokenizer.json or tokenizer.model.

    Returns:
      The tokenizer.

    Raises:
      InputError: no tokenizer there, or an unreadable one.
    """
    return Tokenizer(directory)


def has_tokenizer(directory: Path | str) -> bool:
    """Whether a directory holds a tokenizer that `load_tokenizer` can read."""
    return any((Path(directory) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def copy_tokenizer_files(source: Path, destination: Path) -> None:
    """Copies whichever of a tokenizer's files are in `source`; each appears whole or not at all.

    Args:
      source: folder that holds them.
      destination: an existing folder.
    """
    if source.resolve() == destination.resolve():
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            partial = destination / f"{name}.partial"
            shutil.copyfile(source / name, partial)
            partial.replace(destination / name)


class _JsonBackend:
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self._parsing = _open_json(path)
        self._literal = _open_json(path)
        extra = [
            tokenizers.AddedToken(**{key: entry[key] for key in _ADDED_TOKEN_FIELDS if key in entry})
            for _, entry in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
            if self._parsing.token_to_id(entry["content"]) is None
        ]
        for side in (self._parsing, self._literal):
            side.no_truncation()
            side.no_padding()
            side.add_tokens(extra)
        self._literal.encode_special_tokens = True
        self.vocab_size = 1 + max(self._parsing.get_vocab(with_added_tokens=True).values(), default=-1)
        unknown = getattr(self._parsing.model, "unk_token", None)
        self.special_ids = {} if unknown is None else {"unk": self._parsing.token_to_id(unknown)}

    def encode(self, text: str, special: bool) -> list[int]:
        side = self._parsing if special else self._literal
        return side.encode(text, add_special_tokens=False).ids

    def opening(self) -> list[int]:
        """The special tokens that the file sets before a text."""
        return self._parsing.encode("", add_special_tokens=True).ids[:1]

    def decode(self, ids: Sequence[int], special: bool) -> str:
        return self._parsing.decode(ids, skip_special_tokens=not special)

    def token_id(self, piece: str) -> int | None:
        return self._parsing.token_to_id(piece)


_ADDED_TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def _open_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise InputError(
            f"{path}: not a tokenizer.json that the tokenizers library reads: {_one_line(error)}"
        ) from error


class _SentencePieceBackend:
    """A tokenizer.model, run by the `sentencepiece` library, with special tokens split out as Hugging Face does."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        proto = _read_sentencepiece(path)
        if not proto.pieces:  # an empty file parses
            raise InputError(f"{path}: not a whole SentencePiece model: it has no pieces; copy it again")
        self._leading = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        # Text after a special token has no dummy prefix, so a second processor goes without.
        proto.normalizer_spec.add_dummy_prefix = False
        self._following = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._prefix_everywhere = bool(settings.get("legacy", False))
        kinds = PIECE_KINDS
        by_name = {piece.piece: (i, piece.type) for i, piece in enumerate(proto.pieces)}
        specials = {text: i for text, (i, kind) in by_name.items() if kind in (kinds.CONTROL, kinds.UNKNOWN)}
        always = {text: i for text, (i, kind) in by_name.items() if kind == kinds.USER_DEFINED}
        for text, (i, special) in _added_tokens(path.parent, settings).items():
            (specials if special else always)[text] = i
        self._special = {**always, **specials}
        self._silent = frozenset(specials.values())
        self._names = {i: text for text, i in self._special.items()}
        self._split_special = _splitter(self._special)
        self._split_always = _splitter(always)
        self.vocab_size = max([len(proto.pieces), *(1 + i for i in self._special.values())])
        model = self._leading
        roles = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id(), "unk": model.unk_id()}
        self.special_ids = {role: i for role, i in roles.items() if i >= 0}

    def encode(self, text: str, special: bool) -> list[int]:
        splitter = self._split_special if special else self._split_always
        if splitter is None:
            return self._leading.encode(text) if text else []
        ids: list[int] = []
        for index, part in enumerate(splitter.split(text)):
            if index % 2:
                ids.append(self._special[part])
            elif part:
                first = index == 0 or self._prefix_everywhere
                ids.extend((self._leading if first else self._following).encode(part))
        return ids

    def opening(self) -> list[int]:
        """The special token that LLaMA's tokenizer sets before a text."""
        return [self.special_ids[role] for role in ("bos",) if role in self.special_ids]

    def decode(self, ids: Sequence[int], special: bool) -> str:
        if not special:
            ids = [i for i in ids if i not in self._silent]
        parts: list[str] = []
        for is_named, group in groupby(ids, key=lambda i: i in self._names):
            members = list(group)
            parts.extend(self._names[i] for i in members) if is_named else parts.append(self._following.decode(members))
        text = "".join(parts)
        return text.removeprefix(" ") if ids and ids[0] not in self._names else text

    def token_id(self, piece: str) -> int | None:
        if piece in self._special:
            return self._special[piece]
        found = self._leading.piece_to_id(piece)
        return None if found == self._leading.unk_id() else found


def _read_sentencepiece(path: Path) -> Any:
    data = path.read_bytes()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=data)
        return MODEL_PROTO.FromString(data)
    except (OSError, RuntimeError, DecodeError) as error:
        raise InputError(f"{path}: not a SentencePiece model: {_one_line(error)}") from error


def _added_tokens(directory: Path, settings: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Tokens beside the SentencePiece vocabulary: text -> (id, whether special)."""
    added = {text: (int(i), True) for text, i in _read_json(directory / "added_tokens.json").items()}
    for i, entry in settings.get("added_tokens_decoder", {}).items():
        added[entry["content"]] = (int(i), bool(entry.get("special", False)))
    return added


def _splitter(pieces: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern whose split alternates text and pieces, longest piece first; None for no pieces."""
    ordered = sorted(pieces, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _content(token: Any) -> str | None:
    """The text of a special token, which the files spell as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(i, int) for i in ids):
        raise InputError(f"special token id {value!r} in config.json or generation_config.json; expected an integer")
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
