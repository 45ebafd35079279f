"""GGUF files written by the gguf package: quantised, big-endian, split, truncated, and unsupported."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import as_gguf, config_of, merged, metadata, model, write
from safetensors.torch import load_file

from eabf_jax.errors import InputError
from eabf_jax.interop.gguf import from_gguf
from eabf_jax.interop.tokenizer import load_tokenizer


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
        # Quantisation works within rows, and the permutation moves whole rows, so their order does not matter.
        if value.ndim == 2:
            value = torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), wanted), wanted))
        assert torch.equal(found[name], value.float()), name


def test_big_endian_files(tmp_path: Path) -> None:
    state, big = model(), gguf.GGUFEndian.BIG
    tensors, half = as_gguf(state), gguf.GGMLQuantizationType.F16
    tensors |= {name: array.astype(np.float16) for name, array in tensors.items() if "attn_v.weight" in name}
    values = metadata() | merged("smollm", adds_bos=False)
    from_gguf(write(tmp_path / "b.gguf", values, tensors, endianess=big), tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, value in state.items():
        assert torch.equal(found[name], value.half().float() if "v_proj.weight" in name else value), name
    assert load_tokenizer(tmp_path / "hf").encode("12") == [2, 3] and half.name == "F16"
    kinds = {"token_embd.weight": gguf.GGMLQuantizationType.Q8_0}
    path = write(tmp_path / "q.gguf", values, as_gguf(state), kinds, endianess=big)
    with pytest.raises(
        InputError, match=r"big-endian file whose tensor token_embd.weight is Q8_0; expected F32 or F16"
    ):
        from_gguf(path, tmp_path / "other")


def test_split_files(tmp_path: Path) -> None:
    state, values = model(), metadata() | merged("smollm", adds_bos=False)
    write(tmp_path / "m.gguf", values, as_gguf(state), split_max_tensors=12)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in parts] == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for part in (parts[0], parts[2]):
        from_gguf(part, tmp_path / "hf", overwrite=True)
        found = load_file(tmp_path / "hf" / "model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in state.items()) and len(found) == len(state)
    assert load_tokenizer(tmp_path / "hf").encode("12") == [2, 3]
    elsewhere = shutil.copy(parts[1], tmp_path / "second.gguf")
    with pytest.raises(InputError, match=r"one of 3 parts .* not named NAME-00001-of-00003.gguf; .*--merge"):
        from_gguf(elsewhere, tmp_path / "other")
    shutil.copy(parts[1], parts[2])
    with pytest.raises(InputError, match=r"00003-of-00003.gguf: split.no is 1 and split.count 3, expected 2 and 3"):
        from_gguf(parts[0], tmp_path / "other")
    parts[2].unlink()
    with pytest.raises(InputError, match=r"m-00003-of-00003.gguf: no such file"):
        from_gguf(parts[0], tmp_path / "other")


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", metadata(), as_gguf(model()), arch="gemma2")
    with pytest.raises(InputError, match="architecture is 'gemma2', expected one of llama, mistral3, granite, qwen2"):
        from_gguf(path, tmp_path / "hf")
    with pytest.raises(InputError, match="dtype is 'int8', expected one of float32"):
        from_gguf(path, tmp_path / "hf", dtype="int8")
    with pytest.raises(InputError, match="no such file"):
        from_gguf(tmp_path / "none.gguf", tmp_path / "hf")
    with pytest.raises(InputError, match=r"a directory; expected a \.gguf file"):
        from_gguf(tmp_path, tmp_path / "hf")
    path = write(tmp_path / "m.gguf", metadata() | merged("smollm", adds_bos=False), as_gguf(model()))
    whole = path.read_bytes()
    (tmp_path / "bad.gguf").write_bytes(b"GGML" + whole[4:])
    with pytest.raises(InputError, match="not a whole GGUF file: GGUF magic invalid"):
        from_gguf(tmp_path / "bad.gguf", tmp_path / "hf")
    types = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type")
    for length in (0, 3, 20, 1000, types + 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "bad.gguf").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a whole GGUF file"):
            from_gguf(tmp_path / "bad.gguf", tmp_path / "hf")
    # An array that claims more entries than the file can hold; the package's reader would count to that number.
    (tmp_path / "bad.gguf").write_bytes(whole[: types + 8] + b"\x7f" * 8 + whole[types + 16 : types + 99])
    with pytest.raises(InputError, match=r"not a whole GGUF file: it ends at byte [\d,]+, before"):
        from_gguf(tmp_path / "bad.gguf", tmp_path / "hf")

    def unknown(*arguments: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", unknown)
    with pytest.raises(InputError, match=r"is quantised as F32, which the gguf package does not dequantise"):
        from_gguf(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".*"))
