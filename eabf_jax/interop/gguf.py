"""GGUF files of the LLaMA architecture to Hugging Face directories, one tensor at a time."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.interop.directory import EXPORT, new_directory, write_json
from eabf_jax.interop.huggingface import MAX_SHARD_BYTES, Summary, write_config
from eabf_jax.interop.layout import parameters
from eabf_jax.interop.safetensors_stream import PlannedTensor, write_sharded
from eabf_jax.interop.tokenizer import MODEL_PROTO, PIECE_KINDS
from eabf_jax.model.config import LlamaConfig
from eabf_jax.rope import Scheme, scheme

ARCHITECTURE = "llama"
DTYPES = ("float32", "bfloat16", "float16")

# Computed from the config by Hugging Face; rotary factors are read into the scheme.
ROTARY_FACTORS = "rope_freqs.weight"

# The window and bands of every Llama 3 release that has rotary factors; GGUF keeps only the factors themselves.
LLAMA3_WINDOW, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _digits_then_bytes() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _llama3() -> Any:
    split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


# How text is cut before byte-pair merging, by `tokenizer.ggml.pre`.
PRE_TOKENIZERS = {
    "smollm": _digits_then_bytes,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "gpt-2": _byte_level,
    "default": _byte_level,
}


def from_gguf(src: Path | str, dst: Path | str, dtype: str = "float32", overwrite: bool = False) -> Summary:
    """Converts a GGUF file to a Hugging Face directory: weights, config, tokenizer, chat template.

    Args:
      src: the .gguf file.
      dst: the Hugging Face directory to make.
      dtype: what the dequantised weights are stored in: float32, bfloat16 or float16.
      overwrite: whether dst may be replaced.

    Returns:
      What was written.

    Raises:
      InputError: not a whole GGUF file, another architecture, a quantisation or tokenizer that is not known, tensors
        that are missing, extra or of another shape.
    Source: llama.cpp, `convert_hf_to_gguf.py` (names, permutation of q and k).
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    path = Path(src)
    metadata, stored = _read(path)
    config = config_from_gguf(metadata, stored, path)
    entries = parameters(config)
    element = np.dtype(jnp.dtype(dtype))
    planned = [PlannedTensor(name, element, entry.hf_shape) for entry in entries for name in entry.hf_names()]
    _check(config, stored, path)

    def tensors() -> Iterator[np.ndarray]:
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for entry in entries:
            for name in entry.gguf_names():
                array = _dequantised(stored[name], path).reshape(entry.hf_shape)
                count = heads.get(entry.path[-2])
                yield (array if count is None else unpermuted(array, count)).astype(element, copy=False)

    with new_directory(dst, EXPORT, overwrite=overwrite, sources=[path]) as partial:
        write_sharded(partial, planned, tensors(), MAX_SHARD_BYTES)
        write_config(partial, config, dtype)
        _write_tokenizer(partial, metadata, path)
    return Summary(len(planned), sum(tensor.nbytes for tensor in planned))


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's permutation, which puts the two halves of each head next to each other in pairs.

    Args:
      rows: [heads * head_dim, …], a q or k weight or bias as GGUF stores it.
      heads: number of heads in it.

    Returns:
      The same shape, in Hugging Face's order of rows.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def config_from_gguf(metadata: Mapping[str, Any], stored: Mapping[str, Any], path: Path) -> LlamaConfig:
    """Reads the model's shape from GGUF metadata.

    Args:
      metadata: the file's key-value pairs.
      stored: its tensors by name.
      path: named in messages.

    Returns:
      The config.

    Raises:
      InputError: another architecture, or a key that is missing.
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise InputError(f"{path}: architecture is {architecture!r}, expected {ARCHITECTURE!r}")

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get(f"{ARCHITECTURE}.{key}", default)
        if found is None:
            raise InputError(f"{path}: metadata has no {ARCHITECTURE}.{key}")
        return found

    if value("expert_count", 0):
        raise InputError(f"{path}: a mixture of {value('expert_count')} experts; expected a dense model")
    hidden, heads = value("embedding_length"), value("attention.head_count")
    head_dim = value("attention.key_length", hidden // heads)
    if value("rope.dimension_count", head_dim) != head_dim:
        raise InputError(
            f"{path}: only {value('rope.dimension_count')} of {head_dim} head dimensions are rotated; expected all"
        )
    embedding = stored.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{path}: tensor token_embd.weight is missing")
    window = value("context_length")
    return LlamaConfig(
        vocab_size=int(embedding.shape[1]),
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=window,
        rms_norm_eps=_shortest(value("attention.layer_norm_rms_epsilon")),
        tie_word_embeddings="output.weight" not in stored,
        attention_bias="blk.0.attn_q.bias" in stored,
        mlp_bias="blk.0.ffn_gate.bias" in stored,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        rope=_rope(metadata, stored, head_dim, window, path),
    )


def _rope(metadata: Mapping[str, Any], stored: Mapping[str, Any], head_dim: int, window: int, path: Path) -> Scheme:
    base = _shortest(metadata.get("llama.rope.freq_base", 10_000.0))
    if ROTARY_FACTORS in stored:
        return _llama3_rope(_dequantised(stored[ROTARY_FACTORS], path).reshape(-1), base, head_dim, path)
    kind = metadata.get("llama.rope.scaling.type", "linear")
    factor = _shortest(metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 1.0)))
    if kind == "none" or factor in (0.0, 1.0):
        return scheme("default", base=base)
    if kind == "linear":
        return scheme("pi", base=base, factor=factor)
    if kind == "yarn":
        pretrained = metadata.get("llama.rope.scaling.original_context_length", round(window / factor))
        own = metadata.get("llama.rope.scaling.attn_factor", 1.0)
        scale = None if own == 1.0 else own * (0.1 * math.log(factor) + 1.0)
        return scheme("yarn", base=base, factor=factor, pretrained_window=pretrained, attention_factor=scale)
    raise InputError(f"{path}: rope scaling type is {kind!r}, expected none, linear or yarn")


def _llama3_rope(factors: np.ndarray, base: float, head_dim: int, path: Path) -> Scheme:
    """The Llama 3 scheme whose division of each frequency is what the file stores."""
    found = scheme(
        "llama3",
        base=base,
        factor=_shortest(factors.max()),
        low_freq_factor=LLAMA3_LOW,
        high_freq_factor=LLAMA3_HIGH,
        pretrained_window=LLAMA3_WINDOW,
    )
    plain = np.asarray(scheme("default", base=base).inverse_frequencies(head_dim))
    expected = plain / np.asarray(found.inverse_frequencies(head_dim))
    # Both are float32 quotients, so they agree to a few units in the last place if they agree at all.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise InputError(f"{path}: {ROTARY_FACTORS} holds factors that are not Llama 3's; no rotary scheme has them")
    return found


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF stores 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a .gguf file")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a whole GGUF file: {' '.join(str(error).split())[:200]}") from error
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _check(config: LlamaConfig, stored: Mapping[str, Any], path: Path) -> None:
    """Refuses tensors that are missing, extra or of another shape, before any is written."""
    expected = {name: entry.hf_shape for entry in parameters(config) for name in entry.gguf_names()}
    for name, shape in expected.items():
        if name not in stored:
            raise InputError(f"{path}: tensor {name} is missing; expected shape {list(shape)}")
        found = tuple(int(length) for length in stored[name].shape[::-1])
        if found != shape:
            raise InputError(f"{path}: tensor {name} has shape {list(found)}, expected {list(shape)}")
    if extra := sorted(stored.keys() - expected.keys() - {ROTARY_FACTORS}):
        raise InputError(f"{path}: tensor {extra[0]} is not part of a LLaMA model ({len(extra)} such)")


def _dequantised(tensor: Any, path: Path) -> np.ndarray:
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise InputError(
            f"{path}: tensor {tensor.name} is quantised as {tensor.tensor_type.name}, which the gguf package does not "
            "dequantise"
        ) from error


def _write_tokenizer(directory: Path, metadata: Mapping[str, Any], path: Path) -> None:
    """Writes the tokenizer that the metadata describes; none where it describes none."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return
    pieces = metadata["tokenizer.ggml.tokens"]
    if kind == "gpt2":
        _byte_pair_tokenizer(metadata, path).save(str(directory / "tokenizer.json"))
    elif kind == "llama":
        (directory / "tokenizer.model").write_bytes(_sentencepiece_model(metadata).SerializeToString())
    else:
        raise InputError(f"{path}: tokenizer model is {kind!r}, expected 'gpt2' (byte-pair) or 'llama' (SentencePiece)")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if kind == "gpt2" else "LlamaTokenizer",
        "add_bos_token": _adds_bos(metadata),
        "clean_up_tokenization_spaces": False,
        "legacy": False,
    }
    generation: dict[str, Any] = {}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if i is not None:
            settings[f"{role}_token"] = pieces[i]
            if role != "unk":
                generation[f"{role}_token_id"] = i
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = template
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "generation_config.json", generation)


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    # llama.cpp's own defaults where the file does not say.
    return bool(metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama"))


def _byte_pair_tokenizer(metadata: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    before = metadata.get("tokenizer.ggml.pre", "default")
    if before not in PRE_TOKENIZERS:
        raise unknown_name(f"pre-tokenizer in {path}", before, PRE_TOKENIZERS)
    pieces, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3's tokens are what its merges would spell, where they are there at all.
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, ignore_merges=before.startswith("llama")
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[before]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(pieces, kinds, PIECE_KINDS.CONTROL, special=True))
    tokenizer.add_tokens(_added(pieces, kinds, PIECE_KINDS.USER_DEFINED, special=False))
    if _adds_bos(metadata):
        i = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{pieces[i]} $A", special_tokens=[(pieces[i], i)]
        )
    return tokenizer


def _added(pieces: list[str], kinds: list[int], wanted: int, special: bool) -> list[tokenizers.AddedToken]:
    return [
        tokenizers.AddedToken(piece, normalized=False, special=special)
        for piece, kind in zip(pieces, kinds, strict=True)
        if kind == wanted
    ]


def _sentencepiece_model(metadata: Mapping[str, Any]) -> Any:
    """A SentencePiece model again: GGUF's token types are SentencePiece's own numbers."""
    proto = MODEL_PROTO()
    for piece, score, kind in zip(
        metadata["tokenizer.ggml.tokens"],
        metadata["tokenizer.ggml.scores"],
        metadata["tokenizer.ggml.token_type"],
        strict=True,
    ):
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = PIECE_KINDS.BYTE in metadata["tokenizer.ggml.token_type"]
    trainer.vocab_size = len(proto.pieces)
    for role, name in (("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        i = metadata.get(f"tokenizer.ggml.{name}_token_id", 0 if role == "unk" else -1)
        setattr(trainer, f"{role}_id", i)
        if i >= 0:
            setattr(trainer, f"{role}_piece", proto.pieces[i].piece)
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return proto
