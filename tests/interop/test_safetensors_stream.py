"""Safetensors files compared with the safetensors library, and damaged files."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_directories import as_bytes, assert_refused, assert_same_bits, edit_tensors, make, shard, tensors
from safetensors.torch import load_file, save_file

from eabf_jax.interop.huggingface import from_hf, to_hf
from eabf_jax.interop.safetensors_stream import PlannedTensor, read_header, write_sharded

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = [(3, 5), (7,), (), (0, 4), (2, 3, 4)]


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    """Checks every dtype, odd sizes, a scalar and an empty tensor bit for bit in both directions."""
    torch.manual_seed(0)
    values = {f"{dtype}-{shape}": torch.randn(shape).to(dtype) for dtype in DTYPES for shape in SHAPES}
    save_file(values, tmp_path / "theirs.safetensors")
    found = read_header(tmp_path / "theirs.safetensors")
    arrays = {name: found[name].read() for name in values}
    for name, value in values.items():
        assert arrays[name].shape == value.shape and arrays[name].tobytes() == as_bytes(value), name
    planned = [PlannedTensor(name, array.dtype, array.shape) for name, array in arrays.items()]
    for limit in (10**6, 200):
        folder = tmp_path / str(limit)
        folder.mkdir()
        write_sharded(folder, planned, iter(arrays.values()), limit)
        assert_same_bits(tensors(folder), values)
        shards = [load_file(path) for path in folder.glob("*.safetensors")]
        assert (len(shards) == 1) == (limit == 10**6)
        assert all(len(held) == 1 or sum(value.nbytes for value in held.values()) <= limit for held in shards)


def test_special_values_survive(tmp_path: Path) -> None:
    source = make(tmp_path / "source", torch.bfloat16)
    values = tensors(source)
    values["model.norm.weight"][:5] = torch.tensor(
        [-0.0, torch.inf, -torch.inf, torch.nan, 1e-40], dtype=torch.bfloat16
    )
    save_file(values, source / "model.safetensors")
    from_hf(source, tmp_path / "native")
    to_hf(tmp_path / "native", tmp_path / "again")
    assert_same_bits(values, tensors(tmp_path / "again"))


def cut(directory: Path) -> None:
    os.truncate(shard(directory), shard(directory).stat().st_size - 10)


def cut_to(length: int) -> Callable[[Path], None]:
    return lambda directory: os.truncate(shard(directory), length)


def append(directory: Path) -> None:
    with shard(directory).open("ab") as file:
        file.write(b"more")


def break_header(directory: Path) -> None:
    data = bytearray(shard(directory).read_bytes())
    data[8:10] = b"[}"
    shard(directory).write_bytes(data)


def short_offsets(directory: Path) -> None:
    data = shard(directory).read_bytes()
    shard(directory).write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"F16"', 1))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "integer tensor": (
        edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        r"tensor model.norm.weight is int8, expected one of F64, F32",
    ),
    "truncated shard": (cut, r"00002-of-\d+.safetensors: truncated: \d+ bytes, its header describes \d+"),
    "truncated header": (cut_to(20), r"not a whole safetensors file: it has 20 bytes"),
    "empty shard": (cut_to(0), r"not a whole safetensors file: it has 0 bytes"),
    "longer shard": (append, r"too long: \d+ bytes"),
    "broken header": (break_header, r"the safetensors header is not valid"),
    "wrong offsets": (short_offsets, r"its header gives it \d+"),
    "missing shard": (lambda d: shard(d).unlink(), r"00002-of-\d+.safetensors: no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_and_leave_nothing(good: Path, tmp_path: Path, case: str) -> None:
    assert_refused(good, tmp_path, *BAD[case])
