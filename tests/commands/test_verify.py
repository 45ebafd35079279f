"""`eabf verify` of runs, checkpoints and models that are whole, damaged, or of earlier releases."""

import shutil

import numpy as np
import pytest

from eabf_jax.cli import main
from eabf_jax.interop.directory import EXPORT, new_directory
from eabf_jax.interop.native import save_params


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    draw = np.random.default_rng(0)
    for step in (3, 7):
        save_params(directory, {"layers": {"a": draw.normal(size=(2, 64)).astype(np.float32)}}, step)
    return directory


@pytest.fixture
def model(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def verify(capfd):
    def call(path):
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(path)])
        out, err = capfd.readouterr()
        return ended.value.code, out.splitlines(), err.splitlines()

    return call


def data_file(model, step):
    return max((model / "checkpoints" / str(step)).rglob("d/*"), key=lambda path: path.stat().st_size)


def test_whole_files_are_counted(model, verify):
    parts = [path for path in model.rglob("params/**/*") if path.is_file()]
    parts = [path for path in parts if path.name not in ("checksums.json", "commit_success.txt")]
    code, (line,), err = verify(model)
    assert code == 0 and not err
    assert line.startswith(f"{model}: no damage; {len(parts)} files (")
    for part in ("checkpoints/7", "checkpoints/7/params"):
        assert verify(model / part)[1][0].startswith(f"{model / part}: no damage; {len(parts) // 2} files (")


def test_each_damaged_file_is_a_line(model, verify):
    flipped, missing = data_file(model, 3), data_file(model, 7)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    missing.unlink()
    code, out, (first, second, last) = verify(model)
    assert code == 2 and not out
    assert first.startswith(f"{flipped}: damaged: ") and second == f"{missing}: missing"
    assert last.startswith(f"error: {model}: 2 damaged or missing; ")


def test_a_folder_without_params_is_no_checkpoint(model, verify):
    (model / "checkpoints" / "12").mkdir()
    code, _, err = verify(model)
    assert code == 2 and err[0] == f"{model}/checkpoints/12/params: missing"


def test_what_was_set_aside_is_left_out(model, verify):
    data_file(model, 7).unlink()
    (model / "checkpoints" / "7").rename(model / "checkpoints" / "7.damaged")
    assert verify(model)[0] == 0
    assert verify(model / "checkpoints" / "7.damaged")[0] == 2


def test_checkpoints_without_checksums_are_named(model, verify):
    (model / "checkpoints" / "3" / "params" / "checksums.json").unlink()
    code, _, (line,) = verify(model)
    assert code == 0 and line.startswith(f"{model}/checkpoints/3/params: not compared")
    (model / "checkpoints" / "7" / "params" / "checksums.json").unlink()
    code, _, err = verify(model)
    assert code == 2 and "nothing to compare" in err[-1]


def test_an_exported_directory_has_checksums(tmp_path, verify):
    with new_directory(tmp_path / "exported", EXPORT) as partial:
        (partial / "model.safetensors").write_bytes(bytes(1000))
        (partial / "config.json").write_text("{}")
    code, (line,), _ = verify(tmp_path / "exported")
    assert code == 0 and "; 2 files (" in line
    (tmp_path / "exported" / "model.safetensors").write_bytes(bytes(999) + b"\1")
    code, _, err = verify(tmp_path / "exported")
    assert code == 2 and err[0].startswith(f"{tmp_path / 'exported' / 'model.safetensors'}: damaged: ")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_other_paths_are_refused(tmp_path, verify, make):
    make(tmp_path / "other")
    code, out, (line,) = verify(tmp_path / "other")
    assert code == 2 and not out and line.startswith(f"error: {tmp_path / 'other'}: no")
