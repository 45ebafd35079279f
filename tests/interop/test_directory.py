"""The destination of a model: what is there before, after a failure, and after an interruption."""

import errno
from pathlib import Path

import pytest

from eabf_jax.errors import InputError
from eabf_jax.interop import native
from eabf_jax.interop.directory import new_file
from eabf_jax.interop.huggingface import from_hf, to_hf


def test_destination_must_be_free(good: Path, tmp_path: Path) -> None:
    target = tmp_path / "native"
    target.mkdir()
    (target / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"is not empty, and no model\.json marks it as a native model directory"):
            from_hf(good, target, overwrite=overwrite)
    assert [path.name for path in target.iterdir()] == ["precious"]
    (target / "precious").unlink()
    from_hf(good, target)
    with pytest.raises(InputError, match="is not empty; pass --overwrite"):
        from_hf(good, target)
    (target / "tokenizer.json").write_text("{}")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"eabf-jax did not write notes\.txt in it: name another directory, or remove"):
        from_hf(good, target, overwrite=True)
    (target / "notes.txt").unlink()
    from_hf(good, target, overwrite=True)
    assert native.is_native(target) and not (target / "tokenizer.json").exists()
    with pytest.raises(InputError, match="is the source"):
        to_hf(target, target, overwrite=True)
    with pytest.raises(InputError, match="holds the source"):
        to_hf(target, tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        to_hf(target, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    to_hf(target, tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "native"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: No space left on device [x]")],
)
def test_full_disk(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(native, "write_model_json", full)  # the last thing written
    with pytest.raises(InputError, match="no space left on device while writing"):
        from_hf(good, tmp_path / "native")
    assert list(tmp_path.iterdir()) == []


def test_interruption_leaves_nothing(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "write_model_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        from_hf(good, tmp_path / "native")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "it is full"), InputError, r"no space left on device while writing .*m\.gguf; nothing"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_file_appears_only_when_it_is_whole(
    tmp_path: Path, error: BaseException, expected: type[BaseException], message: str
) -> None:
    target = tmp_path / "out" / "m.gguf"

    def interrupted() -> None:
        with new_file(target, lambda path: None) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(expected, match=message):
        interrupted()
    assert list(target.parent.iterdir()) == []
    with new_file(target, lambda path: None) as partial:
        partial.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole" and list(target.parent.iterdir()) == [target]
    # Two at a time do not write to the same file; the last one stays.
    with new_file(target, lambda path: None, overwrite=True) as partial:
        partial.write_text("first")
        with new_file(target, lambda path: None, overwrite=True) as other:
            other.write_text("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first" and list(target.parent.iterdir()) == [target]
    # What appears meanwhile is not replaced.
    target.unlink()
    with pytest.raises(InputError, match="exists, and it is a letter"), new_file(target, lambda path: "it is a letter"):
        target.write_text("dear")
    assert target.read_text() == "dear"
