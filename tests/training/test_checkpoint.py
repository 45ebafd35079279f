"""Checkpoints are restored as they were saved, and failures give a one-line error."""

import errno
import os
import random
import threading

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import refuse

from eabf_jax.errors import InputError
from eabf_jax.interop import native
from eabf_jax.interop.loading import load_parameters
from eabf_jax.training.checkpoint import Checkpoints, latest_step, sound_step
from eabf_jax.training.step import Saved


def sharded(tree, devices):
    """Splits arrays by their first axis over some devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, split), tree)


def test_what_is_saved_comes_back_on_another_mesh_and_the_newest_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    wanted = {
        step: Saved(
            {"a": rng.normal(size=(8, 3)).astype(np.float32)},
            {"mu": {"a": rng.normal(size=(8, 3)).astype(ml_dtypes.bfloat16)}, "count": rng.integers(0, 9, 8)},
        )
        for step in (1, 2, 3)
    }
    assert latest_step(tmp_path / "run") == 0
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step, saved in wanted.items():
            checkpoints.save(step, sharded(saved, 4), {"next": step})
    (tmp_path / "run" / "checkpoints" / "7.orbax-checkpoint-tmp-1").mkdir()  # an interrupted save
    assert latest_step(tmp_path / "run") == 3
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), sharded(wanted[1], 2)
    )
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
        for step in (2, 3):
            found, data = checkpoints.restore(step, shapes)
            jax.tree.map(np.testing.assert_array_equal, found, wanted[step])
            assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, shapes)
            assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, shapes)
            assert data == {"next": step}
        with pytest.raises(InputError, match=r"checkpoint 1 in .* cannot be read"):
            checkpoints.restore(1, shapes)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"2", "3"}


def test_every_flipped_bit_of_a_checkpoint_is_found_or_harmless(tmp_path, capfd):
    run, rng, draw = tmp_path / "run", np.random.default_rng(0), random.Random(0)
    saved = Saved(
        {"layers": {"a": rng.normal(size=(4, 300)).astype(np.float32)}},
        {"mu": {"a": rng.normal(size=(8, 3)).astype(ml_dtypes.bfloat16)}, "zeros": np.zeros((8, 500), np.float32)},
    )
    placed = sharded(saved, 4)
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(1, placed, {"next_index": 1})
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), placed)
    files = [path for path in sorted((run / "checkpoints" / "1").rglob("*")) if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        for _ in range(8):
            flipped = bytearray(content)
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            refused = ""
            try:
                step = sound_step(run, 9)
            except InputError as error:
                refused = str(error)
            if refused:
                assert refused.startswith(f"{path}: damaged: ")
                continue
            # Only what no array depends on has no checksum: Orbax's notes on the step, and white space.
            assert path.name in ("_CHECKPOINT_METADATA", "checksums.json", "commit_success.txt")
            with Checkpoints(run, keep=1) as checkpoints:
                found, data = checkpoints.restore(step, shapes)
            jax.tree.map(np.testing.assert_array_equal, found, saved)
            assert data == {"next_index": 1}
        path.write_bytes(content)
    assert sound_step(run, 9) == 1


def test_one_layer_of_a_checkpoint_can_be_read_alone(tmp_path):
    params = {"layers": {"a": np.arange(240.0, dtype=np.float32).reshape(6, 8, 5)}}
    split = jax.sharding.PartitionSpec(None, "fsdp")
    at = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()[:4]), ("fsdp",)), split)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, Saved(jax.device_put(params, at), {}), {})
    path = native.checkpoint_path(tmp_path)
    found = native.read_leaf(path, ("layers", "a"), None, slice(2, 3))
    np.testing.assert_array_equal(found, params["layers"]["a"][2:3])


def test_no_space_for_a_checkpoint_is_one_line(run_config, tmp_path, monkeypatch):
    handler = ocp.StandardCheckpointHandler
    original = handler.async_save

    async def full_disk(self, directory, *arguments, **options):
        if directory.name.startswith("optimizer") and "/3." in str(directory):
            raise OSError(errno.ENOSPC, "it is full")
        return await original(self, directory, *arguments, **options)

    monkeypatch.setattr(handler, "async_save", full_disk)
    refuse(run_config(tmp_path / "run"), "no space left: the checkpoint cannot be written .*it is full")
    assert load_parameters(tmp_path / "run")  # checkpoint 2 is whole


def test_a_folder_that_may_not_be_written_is_one_line_and_the_process_can_end(run_config, tmp_path, monkeypatch):
    make = os.mkdir

    def refuse_checkpoints(path, *arguments, **options):
        if "/checkpoints/" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", refuse_checkpoints)
    refuse(run_config(tmp_path / "run"), "the checkpoint cannot be written .*Permission denied: '.*/checkpoints/")
    waiting = [thread for thread in threading.enumerate() if "orbax" in type(thread).__module__ and not thread.daemon]
    assert not waiting


def test_a_write_that_the_system_refuses_is_one_line(config_file, fork, train_py, tmp_path):
    """A limit on the file size makes the system refuse files of more than 16 KiB while Orbax writes."""
    config = config_file(tmp_path / "config.yaml", tmp_path / "run")
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))\n"
    process = fork(limited + train_py, "--config_path", config)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    *steps, last = err.splitlines()
    assert last.startswith("error: file too large: the checkpoint cannot be written (")
    assert all(line.startswith(("compiling", "step ")) for line in steps)
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
