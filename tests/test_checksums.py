"""Each damaged byte is found and its file named; the shares of all processes are the whole."""

import random
import shutil

import pytest

from eabf_jax.checksums import CHECKSUMS, check, write_checksums


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    draw = random.Random(0)
    for name, size in {"a": 5 * 2**20, "b": 1, "empty": 0, "d/c": 700, "d/ö x": 30}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(draw.randbytes(size))
    write_checksums(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "folder")
    return tmp_path / "folder"


def test_unchanged_files_are_whole(folder):
    assert check(folder) == (5, 5 * 2**20 + 1 + 700 + 30, ())
    (folder / "not ours").write_text("a file that was added later")
    assert check(folder).faults == ()
    assert check(folder / "d") is None  # no checksums there


def test_every_flipped_bit_is_found_and_its_file_named(folder):
    draw = random.Random(1)
    for path in (path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size):
        content = path.read_bytes()
        for at in [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(6))]:
            flipped = bytearray(content)
            flipped[at] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            faults = check(folder).faults
            harmless = path.name == CHECKSUMS and not faults  # its white space carries nothing
            assert harmless or (len(faults) == 1 and faults[0].startswith(f"{path}: damaged: "))
        path.write_bytes(content)
    assert check(folder).faults == ()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"3", b"null", b'{"digest": 1}', b"[" * 10**5, b"\xff\xfe"])
def test_damaged_checksums_are_named(folder, content):
    (folder / CHECKSUMS).write_bytes(content)
    (fault,) = check(folder).faults
    assert fault.startswith(f"{folder / CHECKSUMS}: damaged")


def test_missing_and_cut_files_are_named(folder):
    (folder / "b").unlink()
    (folder / "d" / "c").write_bytes(b"cut")
    assert check(folder).faults == (
        f"{folder / 'b'}: missing",
        f"{folder / 'd' / 'c'}: damaged: it has 3 bytes, 700 were written",
    )


def test_shares_are_disjoint_and_together_all_files(folder):
    for path in (folder / "a", folder / "b", folder / "d" / "c"):
        path.write_bytes(b"xyz")
    shares = [check(folder, share, 3) for share in range(3)]
    assert sum(one.files for one in shares) == 5
    faults = [line for one in shares for line in one.faults]
    assert sorted(faults) == list(check(folder).faults) and len(set(faults)) == 3
