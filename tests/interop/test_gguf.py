"""GGUF against the model it was written from, against transformers, and against SmolLM2's real file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2

from eabf_jax.errors import InputError
from eabf_jax.interop.gguf import from_gguf
from eabf_jax.interop.huggingface import config_from_hf
from eabf_jax.interop.tokenizer import load_tokenizer
from eabf_jax.rope import scheme

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
    """Names and permutes as llama.cpp's convert_hf_to_gguf.py does."""
    out: Tensors = {}
    for name, value in state.items():
        array = value.numpy()
        heads = HEADS if "q_proj" in name else KEY_HEADS if "k_proj" in name else None
        if heads:
            pairs = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        out[name] = np.ascontiguousarray(array)
    return out


def write(
    path: Path, values: Metadata, tensors: Tensors, kinds: dict[str, Any] | None = None, arch: str = "llama"
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        data = array if kind is None else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config_of(directory: Path) -> Any:
    return config_from_hf(json.loads((directory / "config.json").read_text()))


def test_float_file_is_the_model_again(tmp_path: Path) -> None:
    state = model()
    path = write(tmp_path / "m.gguf", metadata(), as_gguf(state))
    done = from_gguf(path, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == state.keys() and done.tensors == len(state)
    for name, value in state.items():
        assert torch.equal(found[name], value), name
    config = config_of(tmp_path / "hf")
    assert config.attention_bias and not config.tie_word_embeddings and config.rms_norm_eps == 1e-5
    assert config.rope == scheme("default", base=10_000.0) and config.max_position_embeddings == 4096
    assert not (tmp_path / "hf" / "tokenizer_config.json").exists()
    from_gguf(path, tmp_path / "hf", dtype="bfloat16", overwrite=True)
    half = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in state.items())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_files_hold_what_the_package_dequantises(tmp_path: Path, kind: str) -> None:
    state = {name: value for name, value in model().items() if "bias" not in name and name != "lm_head.weight"}
    tensors = as_gguf(state)
    wanted = getattr(gguf.GGMLQuantizationType, kind)
    kinds = {name: wanted for name, array in tensors.items() if array.ndim == 2}
    from_gguf(write(tmp_path / "m.gguf", metadata(), tensors, kinds), tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert config_of(tmp_path / "hf").tie_word_embeddings and found.keys() == state.keys()
    for name, value in state.items():
        # Quantisation works along rows, which the permutation moves whole: it may be done before or after.
        if value.ndim == 2:
            value = torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), wanted), wanted))
        assert torch.equal(found[name], value.float()), name


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_factors() -> np.ndarray:
    """What llama.cpp stores for Llama 3.1: each frequency's divisor, from transformers' own frequencies."""
    settings = {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=HEAD_DIM, rope_parameters=settings
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "none", "factor": 4.0}, scheme("default", base=10_000.0)),
        ({"type": "linear", "factor": 4.0}, scheme("pi", base=10_000.0, factor=4.0)),
        ({"factor": 2.0}, scheme("pi", base=10_000.0, factor=2.0)),
        ({"type": "yarn", "factor": 4.0}, scheme("yarn", base=10_000.0, factor=4.0, pretrained_window=1024)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 2048, "attn_factor": 0.5},
            scheme(
                "yarn", base=10_000.0, factor=4.0, pretrained_window=2048,
                attention_factor=0.5 * (0.1 * np.log(4.0) + 1.0),
            ),
        ),
    ],
)  # fmt: skip
def test_rope_scaling(tmp_path: Path, settings: Metadata, expected: object) -> None:
    values = metadata() | {f"llama.rope.scaling.{key}": value for key, value in settings.items()}
    from_gguf(write(tmp_path / "m.gguf", values, as_gguf(model())), tmp_path / "hf")
    assert config_of(tmp_path / "hf").rope == expected


def test_llama3_factors(tmp_path: Path) -> None:
    values, tensors = metadata() | {"llama.rope.freq_base": 500_000.0}, as_gguf(model())
    tensors["rope_freqs.weight"] = llama3_factors()
    from_gguf(write(tmp_path / "m.gguf", values, tensors), tmp_path / "hf")
    assert config_of(tmp_path / "hf").rope == scheme("llama3", base=500_000.0, factor=8.0, pretrained_window=8192)
    tensors["rope_freqs.weight"] = llama3_factors() + np.arange(HEAD_DIM // 2, dtype=np.float32)
    with pytest.raises(InputError, match="holds factors that are not Llama 3's"):
        from_gguf(write(tmp_path / "n.gguf", values, tensors), tmp_path / "other")


def test_sentencepiece_tokenizer_comes_back(tmp_path: Path, sentencepiece_directory: Path, texts: list[str]) -> None:
    source = sentencepiece_directory / "tokenizer.model"
    proto = vars(sentencepiece_model_pb2)["ModelProto"].FromString(source.read_bytes())
    values = metadata() | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    from_gguf(write(tmp_path / "m.gguf", values, as_gguf(model())), tmp_path / "hf")
    found = load_tokenizer(tmp_path / "hf")
    library = sentencepiece.SentencePieceProcessor(model_file=str(source))
    for text in [*texts, "日本 🎉", "  two"]:
        assert found.encode(text) == library.encode(text)
    assert (found.bos_id, found.eos_id, found.unk_id, found.pad_id) == (1, 2, 0, None)
    assert found.chat_template == "{{ messages }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode("hello there") == [1, *library.encode("hello there")]


def merged(before: str, adds_bos: bool) -> Metadata:
    """A tiny vocabulary: digits, pairs and triples of digits, a special and a user-defined token."""
    pieces = ["<|a|>", *"0123456789", "12", "123", "1234", "<|u|>", "Ċ", "ĊĊ"]
    kinds = [3, *[1] * 13, 4, 1, 1]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": before, "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "Ċ Ċ"],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": adds_bos,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("smollm", ["1", "2", "3", "4", "ĊĊ", "1"]),  # every digit by itself
        ("llama-bpe", ["123", "4", "ĊĊ", "1"]),  # at most three digits
        ("gpt-2", ["1234", "Ċ", "Ċ", "1"]),  # a run of digits; the last space belongs to what follows
    ],
)
def test_text_is_cut_as_the_file_says(tmp_path: Path, before: str, expected: list[str]) -> None:
    values = metadata() | merged(before, adds_bos=before == "llama-bpe")
    tensors = as_gguf(model())
    from_gguf(write(tmp_path / "m.gguf", values, tensors), tmp_path / "hf")
    found = load_tokenizer(tmp_path / "hf")
    pieces = values["tokenizer.ggml.tokens"]
    assert [pieces[i] for i in found.encode("1234\n\n1")] == expected
    assert found.encode("<|a|><|u|>", special=True) == [0, 14]
    assert found.encode("1<|u|>") == [2, 14]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode("1") == ([0, 2] if before == "llama-bpe" else [2])


def changed(**changes: Any) -> Callable[[Metadata, Tensors], None]:
    def change(values: Metadata, tensors: Tensors) -> None:
        for key, value in changes.items():
            name = key.replace("__", ".")
            values.pop(name, None)
            if value is not None:
                values[name] = value

    return change


BAD: dict[str, tuple[Callable[[Metadata, Tensors], object], str]] = {
    "missing key": (changed(llama__block_count=None), "metadata has no llama.block_count"),
    "experts": (changed(llama__expert_count=8), "a mixture of 8 experts"),
    "partial rotation": (changed(llama__rope__dimension_count=8), "only 8 of 16 head dimensions are rotated"),
    "rope kind": (
        changed(llama__rope__scaling__type="longrope", llama__rope__scaling__factor=2.0),
        "rope scaling type is 'longrope', expected none, linear or yarn",
    ),
    "tokenizer kind": (
        changed(tokenizer__ggml__model="bert", tokenizer__ggml__tokens=["a"]),
        "tokenizer model is 'bert', expected 'gpt2'",
    ),
    "pre-tokenizer": (
        lambda values, tensors: values.update(merged("smolm", adds_bos=False)),
        "unknown pre-tokenizer .* 'smolm': did you mean 'smollm'",
    ),
    "missing tensor": (
        lambda values, tensors: tensors.pop("blk.1.ffn_up.weight"),
        r"tensor blk.1.ffn_up.weight is missing; expected shape \[96, 64\]",
    ),
    "no embedding": (lambda values, tensors: tensors.pop("token_embd.weight"), "token_embd.weight is missing"),
    "mis-shaped tensor": (
        lambda values, tensors: tensors.update({"output_norm.weight": np.ones(32, np.float32)}),
        r"tensor output_norm.weight has shape \[32\], expected \[64\]",
    ),
    "extra tensor": (
        lambda values, tensors: tensors.update({"blk.0.more": np.ones(32, np.float32)}),
        r"tensor blk.0.more is not part of a LLaMA model \(1 such\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    values, tensors = metadata(), as_gguf(model())
    spoil(values, tensors)
    path = write(tmp_path / "m.gguf", values, tensors)
    with pytest.raises(InputError, match=message) as caught:
        from_gguf(path, tmp_path / "out" / "hf")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "out" / "hf").exists()


def test_other_files_are_refused(tmp_path: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", metadata(), as_gguf(model()), arch="qwen2")
    with pytest.raises(InputError, match="architecture is 'qwen2', expected 'llama'"):
        from_gguf(path, tmp_path / "hf")
    with pytest.raises(InputError, match="dtype is 'int8', expected one of float32"):
        from_gguf(path, tmp_path / "hf", dtype="int8")
    with pytest.raises(InputError, match="no such file"):
        from_gguf(tmp_path / "none.gguf", tmp_path / "hf")
    (tmp_path / "text.gguf").write_text("not a model")
    cut = shutil.copy(smollm2_gguf, tmp_path / "cut.gguf")
    os.truncate(cut, 50_000_000)
    for bad in (tmp_path / "text.gguf", cut):
        with pytest.raises(InputError, match="not a whole GGUF file"):
            from_gguf(bad, tmp_path / "hf")
    path = write(tmp_path / "m.gguf", metadata(), as_gguf(model()))

    def unknown(*arguments: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", unknown)
    with pytest.raises(InputError, match=r"is quantised as F32, which the gguf package does not dequantise"):
        from_gguf(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".*"))
