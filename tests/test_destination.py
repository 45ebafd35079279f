"""What is replaced, what is kept, and what a failure at each step leaves behind."""

import errno
import functools
import json
import os
from pathlib import Path

import pytest

from eabf_jax import destination
from eabf_jax.destination import Mark, check_destination, check_file, no_space, put_in_place, replacing, whole
from eabf_jax.errors import InputError
from eabf_jax.interop.directory import EXPORT, new_directory, write_json

THING = Mark("a thing", "thing.json", ("size",))


def write(folder, text="old", **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "thing.json").write_text(json.dumps({"size": text}))
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def size(folder):
    return json.loads((folder / "thing.json").read_text())["size"]


def replace(target, **options):
    with new_directory(target, THING, overwrite=True, **options) as partial:
        write(partial, "new")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"letter.txt": "dear"}, "no thing.json marks it as a thing"),
        ({"thing.json": '{"other": 1}'}, "no thing.json marks it as a thing"),
        ({"thing.json": "[]"}, "no thing.json marks it as a thing"),
        ({"thing.json": '{"size": '}, "no thing.json marks it as a thing"),
    ],
    ids=str,
)
def test_only_what_carries_the_mark_is_replaced(tmp_path, content, reason):
    home = tmp_path / "home"
    home.mkdir()
    for name, text in content.items():
        (home / name).write_text(text)
    with pytest.raises(InputError, match=f"home is not empty, and {reason}: name another directory"):
        replace(home)
    assert {path.name: path.read_text() for path in home.iterdir()} == content
    assert list(tmp_path.iterdir()) == [home]


@pytest.mark.parametrize("place", ["/", "~"])
def test_root_and_home_are_never_replaced(place):
    with pytest.raises(InputError, match=r"no thing\.json marks it as a thing|is a mount point"):
        check_destination(Path(place).expanduser(), THING, overwrite=True)


@pytest.mark.parametrize("check", [check_destination, functools.partial(check_file, fault=lambda path: None)])
def test_a_name_that_is_not_utf_8_is_refused(tmp_path, check):
    with pytest.raises(InputError, match="x\udcff: the name is not valid UTF-8: name another path"):
        check(tmp_path / os.fsdecode(b"x\xff"))


def test_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    write(tmp_path / "x")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "x")
    with pytest.raises(InputError, match="x is a mount point, which cannot be replaced: name a directory in it"):
        replace(tmp_path / "x")
    assert size(tmp_path / "x") == "old"
    replace(tmp_path / "x" / "inner")


def test_what_others_put_into_a_result_is_not_deleted(tmp_path):
    mark = THING._replace(entries=("weights-*",))
    write(tmp_path / "x", **{"weights-1": ""})
    check_destination(tmp_path / "x", mark, overwrite=True)
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty, and eabf-jax did not write notes\.txt in it: name another"):
        check_destination(tmp_path / "x", mark, overwrite=True)


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/a/b: .*/file is a file, so nothing can be created in it"):
        replace(tmp_path / "file" / "a" / "b")
    monkeypatch.setattr(destination.os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    with pytest.raises(InputError, match=f"a/b: {tmp_path} is not writable; name another directory"):
        replace(tmp_path / "a" / "b")


def test_an_earlier_result_is_replaced_whole(tmp_path):
    replace(write(tmp_path / "x", left="over"))
    assert size(tmp_path / "x") == "new"
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["thing.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with pytest.raises(InputError, match="x is not empty; pass --overwrite"), new_directory(tmp_path / "x", THING):
        pass
    with pytest.raises(InputError, match="x is not empty: name another directory"), new_directory(tmp_path / "x"):
        pass


@pytest.mark.parametrize(
    ("target", "source", "relation"),
    [
        ("x", "x", "is"),
        ("x", "x/inner", "holds"),
        ("x/inner", "x", "lies in"),
        ("x", "x/model.gguf", "holds"),
        ("x", "link", "is"),
        ("link/inner", "x", "lies in"),
        ("x/../x", "link/inner", "holds"),
    ],
)
def test_a_destination_apart_from_its_source(tmp_path, target, source, relation):
    write(tmp_path / "x" / "inner")
    write(tmp_path / "x", **{"model.gguf": ""})
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(InputError, match=f"{relation} the source .*{source}: name another"):
        replace(tmp_path / target, sources=[tmp_path / source])
    assert size(tmp_path / "x") == size(tmp_path / "x" / "inner") == "old"


def test_a_file_is_replaced_only_if_it_is_an_earlier_result(tmp_path):
    def refused(target, message, **options):
        with pytest.raises(InputError, match=message):
            check_file(target, lambda path: None if path.read_text() == "ours" else "nothing marks it", **options)

    target = tmp_path / "a" / "m.gguf"
    check_file(target, lambda path: None)
    target.parent.mkdir()
    refused(target.parent, "a is a directory: name a file, or a path that does not exist yet")
    target.write_text("letter")
    refused(target, "m.gguf exists, and nothing marks it: name another file, or remove it by hand", overwrite=True)
    target.write_text("ours")
    refused(target, "m.gguf exists; pass --overwrite to replace it, or name another file")
    check_file(target, lambda path: None, overwrite=True)
    refused(target, "m.gguf lies in the source .*a: name another directory", overwrite=True, sources=[tmp_path / "a"])
    refused(target / "b", "m.gguf is a file, so nothing can be created in it")
    (tmp_path / "link").symlink_to(target)
    refused(tmp_path / "link", "link is a symbolic link to .*: name the file itself", overwrite=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_is_not_replaced(tmp_path, there):
    if there:
        write(tmp_path / "x")
    (tmp_path / "link").symlink_to("x")
    with pytest.raises(InputError, match="link is a symbolic link to x: name the directory itself"):
        replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "x").exists() == there


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_at_any_step_keeps_the_old_result(tmp_path, monkeypatch, step, error):
    write(tmp_path / "x")
    rename, calls = Path.rename, []

    def failing(self, target):
        calls.append(self)
        if len(calls) == step + 1:
            raise error("in the middle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error):
        replace(tmp_path / "x")
    assert size(tmp_path / "x") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("step", [1, 2])
def test_what_a_killed_process_set_aside_is_put_back(tmp_path, monkeypatch, step):
    """The process is killed between the two renames, or while the old result is deleted."""
    target, partial = write(tmp_path / "x"), write(tmp_path / "partial", "new")
    if step == 1:
        target.rename(tmp_path / ".x.old-aaaa")
    else:
        monkeypatch.setattr(destination.shutil, "rmtree", lambda *_, **__: None)
        put_in_place(partial, target)
        monkeypatch.undo()
    assert len(list(tmp_path.glob(".x.old-*"))) == 1
    with pytest.raises(InputError, match="pass --overwrite"):
        check_destination(target, THING)
    assert size(target) == ("old" if step == 1 else "new")
    replace(target)
    assert size(target) == "new" and not list(tmp_path.glob(".x.*"))


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    def meanwhile():
        with new_directory(tmp_path / "x", THING, overwrite=True) as partial:
            write(partial, "new")
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "letter.txt").write_text("dear")

    with pytest.raises(InputError, match=r"is not empty, and no thing\.json"):
        meanwhile()
    assert (tmp_path / "x" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: (x / "eabf_jax.json").unlink(), "no eabf_jax.json marks it as a model that eabf-jax exported"),
        (lambda x: (x / "config.json").write_text("{ }"), "config.json in it is not as eabf-jax wrote it"),
        (lambda x: (x / "model.safetensors").unlink(), "model.safetensors in it is not as eabf-jax wrote it"),
        (lambda x: write(x / "mine"), "mine/thing.json in it is not as eabf-jax wrote it"),
    ],
    ids=["an old export", "trained further", "taken apart", "added to"],
)
def test_an_export_is_replaced_while_it_is_as_it_was_written(tmp_path, change, reason):
    def export(text):
        with new_directory(tmp_path / "x", EXPORT, overwrite=True) as partial:
            (partial / "config.json").write_text(text)
            (partial / "model.safetensors").write_text("weights")

    export("{}")
    export("{...}")
    change(tmp_path / "x")
    with pytest.raises(InputError, match=f"is not empty, and {reason}: name another directory, or remove it by hand"):
        export("{}")
    assert len(list(tmp_path.iterdir())) == 1


def test_entries_are_replaced_together_or_not_at_all(tmp_path):
    write(tmp_path / "inner")
    write(tmp_path, letter="dear", note="old")

    def interrupted():
        with replacing(tmp_path, ("inner", "note", "absent")):
            write(tmp_path / "inner", "new")
            (tmp_path / "absent").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert size(tmp_path / "inner") == (tmp_path / "note").read_text() == "old"
    with replacing(tmp_path, ("inner", "note")):
        (tmp_path / "note").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"note", "letter", "thing.json"}
    assert (tmp_path / "note").read_text() == "new"


def test_a_file_appears_whole(tmp_path):
    write_json(tmp_path / "figures.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "figures.json", {"a": object()})
    assert json.loads((tmp_path / "figures.json").read_text()) == {"a": 1}

    def interrupted(name):
        with whole(tmp_path / name) as partial:
            write(partial) if name == "folder" else partial.write_text("half")
            raise InputError("interrupted")

    (tmp_path / ".folder.partial").mkdir()  # a killed process left it
    for name in ("note.txt", "folder"):
        with pytest.raises(InputError):
            interrupted(name)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    with whole(tmp_path / "picture.png") as partial:
        assert partial.suffix == ".png"  # tells matplotlib the format
        write(partial)
    assert size(tmp_path / "picture.png") == "old"


def test_a_full_disk_is_known_by_number_or_text_however_deep():
    def raised(inner):
        try:
            try:
                raise inner
            except Exception as error:
                raise RuntimeError("the write failed") from error
        except RuntimeError as error:
            return error

    inner = OSError(errno.ENOSPC, "No space left on device", "weights")
    assert no_space(raised(inner)) == ("no space left", inner)
    inner = ValueError("RESOURCE_EXHAUSTED: write failed: Disk quota exceeded [source locations=...]")
    assert no_space(raised(inner)) == ("disk quota exceeded", inner)
    assert no_space(raised(PermissionError(errno.EACCES, "Permission denied"))) is None
