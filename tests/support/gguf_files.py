"""A tiny LLaMA and its GGUF files, written by the gguf package as llama.cpp would write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from eabf_jax.errors import InputError
from eabf_jax.interop.gguf import from_gguf
from eabf_jax.interop.huggingface import config_from_hf

HIDDEN, WIDE, LAYERS, HEADS, KEY_HEADS, HEAD_DIM, VOCABULARY = 64, 96, 2, 4, 2, 16, 1500

Metadata = dict[str, Any]
Tensors = dict[str, np.ndarray]


def metadata() -> Metadata:
    return {
        "llama.context_length": 4096, "llama.embedding_length": HIDDEN, "llama.feed_forward_length": WIDE,
        "llama.block_count": LAYERS, "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KEY_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 10_000.0,
    }  # fmt: skip


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, attention_bias=True,
    )  # fmt: skip
    state = transformers.LlamaForCausalLM(config).state_dict()
    return {name: torch.randn_like(value) for name, value in state.items()}


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def as_gguf(state: dict[str, torch.Tensor]) -> Tensors:
    """Names and permutes tensors like llama.cpp's convert_hf_to_gguf.py."""
    out: Tensors = {}
    for name, value in state.items():
        array = value.numpy()
        heads = HEADS if "q_proj" in name else KEY_HEADS if "k_proj" in name else None
        if heads:
            pairs = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        for hf, short in NAMES.items():
            name = name.replace(hf, short)
        out[name] = np.ascontiguousarray(array)
    return out


def write(
    path: Path,
    values: Metadata,
    tensors: Tensors,
    kinds: dict[str, Any] | None = None,
    arch: str = "llama",
    **options: Any,
) -> Path:
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:  # an empty array has no type, and the writer would drop it
            writer.add_array(key, value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        data = array if kind is None else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=None if data.dtype == np.float16 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config_of(directory: Path) -> Any:
    return config_from_hf(json.loads((directory / "config.json").read_text()))


def scaling(settings: Metadata) -> Metadata:
    return {f"llama.rope.scaling.{key}": value for key, value in settings.items()}


def converted(directory: Path, values: Metadata, tensors: Tensors | None = None) -> Path:
    """Converts the tiny model, with other metadata, to a Hugging Face directory."""
    directory.mkdir(exist_ok=True)
    path = write(directory / "m.gguf", metadata() | values, as_gguf(model()) if tensors is None else tensors)
    from_gguf(path, directory / "hf")
    return directory / "hf"


def merged(before: str, adds_bos: bool) -> Metadata:
    """Builds a tiny vocabulary: digits, pairs and triples of digits, a special and a user-defined token."""
    pieces = ["<|a|>", *"0123456789", "12", "123", "1234", "<|u|>", "Ċ", "ĊĊ"]
    kinds = [3, *[1] * 13, 4, 1, 1]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": before, "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "Ċ Ċ"],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": adds_bos,
    }  # fmt: skip


def changed(**changes: Any) -> Callable[[Metadata, Tensors], None]:
    def change(values: Metadata, tensors: Tensors) -> None:
        for key, value in changes.items():
            name = key.replace("__", ".")
            values.pop(name, None)
            if value is not None:
                values[name] = value

    return change


def assert_refused(directory: Path, spoil: Callable[[Metadata, Tensors], object], message: str) -> None:
    """Asserts that converting the tiny model's file, once damaged, writes nothing and gives a one-line error."""
    values, tensors = metadata(), as_gguf(model())
    spoil(values, tensors)
    path = write(directory / "m.gguf", values, tensors)
    with pytest.raises(InputError, match=message) as caught:
        from_gguf(path, directory / "out" / "hf")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (directory / "out" / "hf").exists()
