"""GGUF files that we write, read by the gguf package and converted back, and compared with their source."""

import json
import resource
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import as_gguf, config_of, write
from hf_directories import assert_same_bits, make, tensors
from safetensors.torch import save_file

from eabf_jax.errors import InputError
from eabf_jax.interop import gguf_writer
from eabf_jax.interop.gguf import from_gguf
from eabf_jax.interop.gguf_writer import MARK, to_gguf
from eabf_jax.interop.huggingface import from_hf


def content(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads metadata and tensors with the gguf package's own reader."""
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def set_config(directory: Path, **values: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return directory


MODELS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "biases": (torch.float32, {"attention_bias": True, "mlp_bias": True}),
    "tied": (torch.bfloat16, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "wide heads": (torch.float16, {"head_dim": 16}),
}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_bit_and_the_config_are_the_same(tmp_path: Path, name: str) -> None:
    dtype, settings = MODELS[name]
    source = make(tmp_path / "hf", dtype, **settings)
    done = to_gguf(source, tmp_path / "m.gguf")
    _, found = content(tmp_path / "m.gguf")
    expected = as_gguf({key: value.float() for key, value in tensors(source).items()})
    assert found.keys() == expected.keys() and done.tensors == len(found)
    assert done.nbytes == sum(int(tensor.n_bytes) for tensor in found.values())
    short = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    for key, value in expected.items():
        assert found[key].tensor_type.name == (short if value.ndim == 2 else "F32"), key
        np.testing.assert_array_equal(gguf.quants.dequantize(found[key].data, found[key].tensor_type), value, key)
    from_gguf(tmp_path / "m.gguf", tmp_path / "back", dtype=str(dtype).removeprefix("torch."))
    assert_same_bits(tensors(tmp_path / "back"), tensors(source))
    # Without a tokenizer, a file has no place for the ids of special tokens.
    set_config(source, bos_token_id=None, eos_token_id=None)
    assert config_of(tmp_path / "back") == config_of(source)


def test_metadata(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", head_dim=16, tie_word_embeddings=True)
    to_gguf(source, tmp_path / "small model.gguf", dtype="bfloat16")
    values, found = content(tmp_path / "small model.gguf")
    assert {key: value for key, value in values.items() if key.startswith(("general.", "llama."))} == {
        "general.architecture": "llama", "general.type": "model", "general.name": "small model",
        "general.file_type": gguf.LlamaFileType.MOSTLY_BF16, "general.quantization_version": 2,
        "llama.vocab_size": 131, "llama.context_length": 64, "llama.embedding_length": 32, "llama.block_count": 3,
        "llama.feed_forward_length": 48, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16, "llama.attention.value_length": 16, "llama.rope.dimension_count": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "llama.rope.freq_base": 10_000.0,
    }  # fmt: skip
    assert values["tokenizer.ggml.model"] == "none" and "output.weight" not in found


def test_a_native_directory_gives_the_same_file(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", torch.bfloat16)
    from_hf(source, tmp_path / "native")
    for name in ("hf", "native"):
        (tmp_path / f"{name}_out").mkdir()
        to_gguf(tmp_path / name, tmp_path / f"{name}_out" / "m.gguf")
    assert (tmp_path / "hf_out/m.gguf").read_bytes() == (tmp_path / "native_out/m.gguf").read_bytes()
    with pytest.raises(InputError, match="checkpoint"):
        to_gguf(tmp_path / "native", tmp_path / "other.gguf", step=7)


def test_q8_0_is_within_half_a_step_of_each_block(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    to_gguf(source, tmp_path / "m.gguf", dtype="q8_0")
    values, found = content(tmp_path / "m.gguf")
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    for name, value in as_gguf(tensors(source)).items():
        stored = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
        whole = value.shape[-1] % 32 == 0  # blocks have 32 values; the MLP is 48 wide
        kind = "F32" if value.ndim == 1 else "Q8_0" if whole else "F16"
        assert found[name].tensor_type.name == kind, name
        if kind == "Q8_0":
            blocks = np.abs(value).reshape(-1, 32).max(1, keepdims=True)
            # Half a step of 1/127, and the step itself rounded to float16.
            error = np.abs(stored - value).reshape(-1, 32)
            assert (error <= blocks * (0.5 / 127 + 2**-11) * (1 + 1e-6)).all(), name
        elif kind == "F16":
            np.testing.assert_array_equal(stored, value.astype(np.float16), name)
    from_gguf(tmp_path / "m.gguf", tmp_path / "back")
    assert config_of(tmp_path / "back").intermediate_size == 48


def test_values_too_large_for_float16(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    large = tensors(source)
    large["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(large, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight holds 100000, .*: choose --dtype bfloat16 or float3"):
        to_gguf(source, tmp_path / "m.gguf", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("limit", [2**10, 2**14])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    source = make(tmp_path / "hf")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(InputError, match=r"file too large on device while writing .*m\.gguf; nothing was kept"):
            to_gguf(source, tmp_path / "m.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_an_interrupted_write_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "hf")
    to_gguf(source, tmp_path / "m.gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    stored = gguf_writer._stored

    def interrupted(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
        if name == "blk.1.attn_k.weight":
            raise KeyboardInterrupt
        return stored(array, dtype, name)

    monkeypatch.setattr(gguf_writer, "_stored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_gguf(source, tmp_path / "m.gguf", overwrite=True, dtype="bfloat16")
    assert (tmp_path / "m.gguf").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.gguf"]


def test_only_our_own_files_are_replaced(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    target = tmp_path / "new" / "m.gguf"
    to_gguf(source, target)
    with pytest.raises(InputError, match=r"m\.gguf exists; pass --overwrite to replace it, or name another file"):
        to_gguf(source, target)
    to_gguf(source, target, overwrite=True, dtype="float16")
    values, found = content(target)
    ours = values[MARK]
    # llama-quantize keeps the keys of the file that it reads.
    write(target, {MARK: ours}, {name: tensor.data.astype(np.float32) for name, tensor in found.items()})
    for bad, reason in (
        (None, "its tensors are not as eabf-jax wrote them"),
        (lambda: write(target, {}, {}), f"no key {MARK} marks it"),
        (lambda: target.write_text("GGUF notes"), "it is not a GGUF file that eabf-jax wrote"),
    ):
        if bad is not None:
            bad()
        there = target.read_bytes()
        with pytest.raises(InputError, match=f"m.gguf exists, and {reason}.*: name another file, or remove it by hand"):
            to_gguf(source, target, overwrite=True)
        assert target.read_bytes() == there


def test_bad_arguments(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    with pytest.raises(InputError, match="dtype is 'q4_0', expected one of float32, bfloat16, float16, q8_0"):
        to_gguf(source, tmp_path / "m.gguf", dtype="q4_0")
    with pytest.raises(InputError, match=r"m\.gguf lies in the source .*hf: name another directory"):
        to_gguf(source, source / "m.gguf")
    with pytest.raises(InputError, match="hf: not a native model directory or a run, so it has no step 3"):
        to_gguf(source, tmp_path / "m.gguf", step=3)
    double = make(tmp_path / "double", torch.float64)
    with pytest.raises(InputError, match="double: weights are float64, which is not kept; choose --dtype float32, b"):
        to_gguf(double, tmp_path / "m.gguf")
    to_gguf(double, tmp_path / "double.gguf", dtype="float32")
    with pytest.raises(InputError, match="is a whole model and takes no base"):
        to_gguf(source, tmp_path / "m.gguf", base=source)
    set_config(source, eabf_scheme={"type": "eabf", "pretrained_window": 64})
    with pytest.raises(InputError, match=r"'eabf' multiplies the attention logits, .*: export .* convert/to_hf\.py"):
        to_gguf(source, tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["double", "double.gguf", "hf"]
