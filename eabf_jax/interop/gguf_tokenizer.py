"""Writes the tokenizer in a GGUF file's metadata as Hugging Face files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from eabf_jax.errors import one_line, unknown_name
from eabf_jax.interop.directory import write_json
from eabf_jax.interop.gguf_file import FLAG, NUMBERS, TEXT, TEXTS, WHOLE_NUMBERS, GgufFile, Kind, only
from eabf_jax.interop.tokenizer import MODEL_PROTO, PIECE_KINDS

PREFIX = "tokenizer."
MODEL = "tokenizer.ggml.model"
PRE = "tokenizer.ggml.pre"
PIECES = "tokenizer.ggml.tokens"
TYPES = "tokenizer.ggml.token_type"
SCORES = "tokenizer.ggml.scores"
MERGES = "tokenizer.ggml.merges"
ADD_BOS = "tokenizer.ggml.add_bos_token"
ADD_EOS = "tokenizer.ggml.add_eos_token"
ADD_PREFIX = "tokenizer.ggml.add_space_prefix"
TEMPLATE = "tokenizer.chat_template"
TEMPLATE_NAMES = "tokenizer.chat_templates"

IDS: Mapping[str, str] = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}

READ = (
    *(MODEL, PRE, PIECES, TYPES, SCORES, MERGES, ADD_BOS, ADD_EOS, ADD_PREFIX, TEMPLATE, TEMPLATE_NAMES),
    *IDS.values(),
)

# Keys that have no effect here: tokens of other tasks, and copies of other keys.
HARMLESS = (
    *(f"tokenizer.ggml.{name}_token_id" for name in ("seperator", "cls", "mask", "prefix", "suffix", "middle")),
    *(f"tokenizer.ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    "tokenizer.ggml.token_type_count",
    "tokenizer.huggingface.json",
    "tokenizer.rwkv.world",
)

# Keys of features that LLaMA's tokenizers lack, with the values that turn them off.
FIXED: Mapping[str, Kind] = {
    "tokenizer.ggml.add_sep_token": only("false: no separator ends a text", False),
    "tokenizer.ggml.remove_extra_whitespaces": only("false: LLaMA's tokenizers keep them", False),
    "tokenizer.ggml.precompiled_charsmap": only("none: LLaMA's tokenizers change no characters", []),
    "tokenizer.ggml.normalizer.lowercase": only("false: LLaMA's tokenizers change no characters", False),
    "tokenizer.ggml.normalizer.strip_accents": only("false: LLaMA's tokenizers change no characters", False),
    "tokenizer.ggml.suppress_tokens": only("none: every token may be generated", []),
}

# llama.cpp's defaults for ids that the file does not name.
DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "gpt2": {}}

# Control tokens that, as in llama.cpp, end a turn or a text even if no key names them: older files have no such keys.
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>")

_TOKEN_ID = Kind("a token id", lambda value: type(value) is int and value >= 0)
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace("{1,3}", "")
# As in the model's own tokenizer.json, and so in transformers; llama.cpp's expression knows capitals only in ASCII.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Splitting(NamedTuple):
    """The rules that split text before byte-pair merging.

    Attributes:
      patterns: applied in turn; each splits every piece into its matches and the text between them.
      ignores_merges: whether a piece that is itself a token skips the merges.
      adds_bos: whether texts begin with BOS if the file does not say.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False


# By llama.cpp's names in `tokenizer.ggml.pre`. Each rule has all its names, whatever architecture usually has them.
SPLITTINGS: Mapping[str, Splitting] = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0", "pixtral", "falcon-h1", "lfm2", "jina-v5-nano"),
        Splitting((_LLAMA3_SPLIT,), ignores_merges=True, adds_bos=True),
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Splitting((_LLAMA3_SPLIT,))),
    "tekken": Splitting((_TEKKEN_SPLIT,), ignores_merges=True, adds_bos=True),
    **dict.fromkeys(
        (
            *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
            *("stablelm2", "hunyuan", "solar-open", "grok-2"),
        ),
        Splitting((_QWEN2_SPLIT,)),
    ),
    **dict.fromkeys(
        ("smollm", "refact", "starcoder", "minerva-7b", "command-r", "codeshell", "exaone", "mellum2"),
        Splitting((r"\p{N}", _GPT2_SPLIT)),
    ),
    **dict.fromkeys(
        (
            *("gpt-2", "mellum", "trillion", "granite-docling", "phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat"),
            *("a.x-4.0", "modern-bert", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de"),
        ),
        Splitting((_GPT2_SPLIT,)),
    ),
    **dict.fromkeys(("default", ""), Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]"))),
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF file and their roles.

    Attributes:
      file: the file that they come from.
      kind: "gpt2" (byte-pair) or "llama" (SentencePiece).
      pieces: text of each token.
      types: type of each token, in SentencePiece's numbers, which GGUF shares.
      ids: token id by role: bos, eos, eot, eom, unk, pad, as far as they exist.
      adds_bos, adds_eos: whether texts given to the model begin with BOS and end with EOS.
    """

    file: GgufFile
    kind: str
    pieces: list[str]
    types: list[int]
    ids: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool

    @property
    def ends(self) -> tuple[int, ...]:
        """Every id that ends a generation, EOS first."""
        named = (self.ids[role] for role in ("eos", "eot", "eom") if role in self.ids)
        known = (
            i
            for i, (piece, kind) in enumerate(zip(self.pieces, self.types, strict=True))
            if piece in ENDS and kind == PIECE_KINDS.CONTROL
        )
        return tuple(dict.fromkeys((*named, *known)))


def read_vocabulary(file: GgufFile) -> Vocabulary | None:
    """Reads the tokens and their roles.

    Returns:
      The vocabulary, or None if the file has no tokenizer.

    Raises:
      InputError: metadata is missing, unknown, contradictory or of another kind.
    """
    if not any(key.startswith(PREFIX) for key in file.metadata) or file.metadata.get(MODEL) in ("none", "no_vocab"):
        return None
    kind = file.value(MODEL, TEXT)
    if kind not in DEFAULT_IDS:
        raise file.error(f"tokenizer model is {kind!r}, expected 'gpt2' (byte-pair) or 'llama' (SentencePiece)")
    names = [f"{TEMPLATE}.{name}" for name in file.value(TEMPLATE_NAMES, TEXTS, [])]
    file.refuse_unknown(PREFIX, {*READ, *HARMLESS, *FIXED, *names})
    for key, fixed in FIXED.items():
        file.value(key, fixed, None)
    # llama.cpp gives this name to a token without text.
    pieces = [piece or f"[EMPTY_{i}]" for i, piece in enumerate(file.value(PIECES, TEXTS))]
    first: dict[str, int] = {}
    for i, piece in enumerate(pieces):
        if first.setdefault(piece, i) != i:
            raise file.error(f"{PIECES} has {piece!r} at {first[piece]} and at {i}; expected each token once")
    types = _per_token(file, TYPES, WHOLE_NUMBERS, pieces)
    if strange := sorted(set(types) - set(PIECE_KINDS.Type.values())):
        raise file.error(f"{TYPES} has {strange[0]}, expected 1 to 6")
    ids = {role: i for role, i in DEFAULT_IDS[kind].items() if i < len(pieces)}
    for role, key in IDS.items():
        if key in file.metadata:
            ids[role] = file.value(key, _TOKEN_ID)
            if ids[role] >= len(pieces):
                raise file.error(f"{key} is {ids[role]}, expected one of the {len(pieces)} tokens")
    adds_bos = file.value(ADD_BOS, FLAG, kind == "llama" or _splitting(file).adds_bos)
    adds_eos = file.value(ADD_EOS, FLAG, False)
    for role, key, wanted in (("bos", ADD_BOS, adds_bos), ("eos", ADD_EOS, adds_eos)):
        if wanted and role not in ids:
            why = f"{key} = true" if key in file.metadata else f"{PRE} = {file.metadata.get(PRE)!r}"
            raise file.error(f"metadata has no {IDS[role]}, which {why} requires")
    return Vocabulary(file, kind, pieces, types, ids, adds_bos, adds_eos)


def write_tokenizer(directory: Path, vocabulary: Vocabulary) -> None:
    """Writes the tokenizer's files, including special tokens and chat templates.

    Raises:
      InputError: merges or scores are missing or invalid.
    """
    pieces, ids = vocabulary.pieces, vocabulary.ids
    settings: dict[str, Any] = {
        **(_write_byte_pair if vocabulary.kind == "gpt2" else _write_sentencepiece)(directory, vocabulary),
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        "clean_up_tokenization_spaces": False,
    }
    settings |= {f"{role}_token": pieces[ids[role]] for role in ("bos", "eos", "unk", "pad") if role in ids}
    templates = _chat_templates(vocabulary.file)
    if templates:
        named = [{"name": name, "template": template} for name, template in templates.items()]
        settings["chat_template"] = templates["default"] if templates.keys() == {"default"} else named
    generation: dict[str, Any] = {f"{role}_token_id": ids[role] for role in ("bos", "pad") if role in ids}
    if ends := vocabulary.ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "generation_config.json", generation)


def pre_tokenizer(splitting: Splitting) -> Any:
    """Builds the part of a tokenizer that splits text before byte-pair merging."""
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in splitting.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _per_token(file: GgufFile, key: str, kind: Kind, pieces: list[str]) -> list[Any]:
    found: list[Any] = file.value(key, kind)
    if len(found) != len(pieces):
        raise file.error(f"{key} has {len(found)} entries, expected one for each of the {len(pieces)} tokens")
    return found


def _splitting(file: GgufFile) -> Splitting:
    name = file.value(PRE, TEXT, "default")
    if name not in SPLITTINGS:
        raise unknown_name(f"pre-tokenizer ({PRE}) in {file.path}", name, filter(None, SPLITTINGS))
    return SPLITTINGS[name]


def _chat_templates(file: GgufFile) -> dict[str, str]:
    names = file.value(TEMPLATE_NAMES, TEXTS, [])
    templates = {name: file.value(f"{TEMPLATE}.{name}", TEXT) for name in names}
    default = file.value(TEMPLATE, TEXT, None)
    return templates if default is None else {"default": default, **templates}


def _write_byte_pair(directory: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    file, pieces, ids = vocabulary.file, vocabulary.pieces, vocabulary.ids
    splitting = _splitting(file)
    merges = [(first, second) for first, _, second in (merge.partition(" ") for merge in file.value(MERGES, TEXTS))]
    try:
        model = models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            ignore_merges=splitting.ignores_merges,
        )
    except Exception as error:  # the library raises a bare Exception
        raise file.error(f"{MERGES} does not form a tokenizer: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer(splitting)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(vocabulary, (PIECE_KINDS.CONTROL, PIECE_KINDS.UNKNOWN), special=True))
    tokenizer.add_tokens(_added(vocabulary, (PIECE_KINDS.USER_DEFINED,), special=False))
    before = [(pieces[ids["bos"]], ids["bos"])] if vocabulary.adds_bos else []
    after = [(pieces[ids["eos"]], ids["eos"])] if vocabulary.adds_eos else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*(piece for piece, _ in before), "$A", *(piece for piece, _ in after)],
            special_tokens=list(dict.fromkeys(before + after)),
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    return {"tokenizer_class": "PreTrainedTokenizerFast"}


def _added(vocabulary: Vocabulary, kinds: tuple[int, ...], special: bool) -> list[tokenizers.AddedToken]:
    return [
        tokenizers.AddedToken(piece, normalized=False, special=special)
        for piece, kind in zip(vocabulary.pieces, vocabulary.types, strict=True)
        if kind in kinds
    ]


def _write_sentencepiece(directory: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    file, pieces = vocabulary.file, vocabulary.pieces
    proto = MODEL_PROTO()
    for piece, score, kind in zip(pieces, _per_token(file, SCORES, NUMBERS, pieces), vocabulary.types, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = PIECE_KINDS.BYTE in vocabulary.types
    trainer.vocab_size = len(pieces)
    for role in ("unk", "bos", "eos", "pad"):
        i = vocabulary.ids.get(role, -1)
        setattr(trainer, f"{role}_id", i)
        if i >= 0:
            setattr(trainer, f"{role}_piece", pieces[i])
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = file.value(ADD_PREFIX, FLAG, True)
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    data = proto.SerializeToString()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=data)
    except (OSError, RuntimeError) as error:
        raise file.error(f"{PIECES} does not form a SentencePiece model: {one_line(error)}") from error
    (directory / "tokenizer.model").write_bytes(data)
    # No class, because LlamaTokenizer would ignore `add_space_prefix`; `legacy` gives its old rules.
    return {"legacy": True}
