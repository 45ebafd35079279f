"""One process locks a run's directory, and only while it lives."""

import errno
import fcntl
import json
import os
import socket
import subprocess

import pytest
from runs import refuse

from eabf_jax.errors import InputError
from eabf_jax.training.lock import locked


def test_a_run_is_held_by_one_process(run_config, tmp_path):
    run = tmp_path / "run"
    with locked(run):
        message = f"{run} is in use: process {os.getpid()} on {socket.gethostname()} has been training there since 20"
        refuse(run_config(run), message)
        refuse(run_config(run, overwrite=True), message)
        assert [path.name for path in run.iterdir()] == ["train.lock"]
    assert not run.exists()


@pytest.mark.parametrize("supported", [True, False])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, monkeypatch, supported):
    """This holds with the system's locks, and on a file system without them, where only the file's content counts."""
    (tmp_path / "config.yaml").write_text("")
    dead = subprocess.Popen(["true"])
    dead.wait()
    if not supported:

        def without_locks(*_):
            raise OSError(errno.EOPNOTSUPP, "not supported")

        monkeypatch.setattr(fcntl, "flock", without_locks)
    for holder in ("", "[]", json.dumps({"host": socket.gethostname(), "process": dead.pid})):
        (tmp_path / "train.lock").write_text(holder)
        with locked(tmp_path):
            assert json.loads((tmp_path / "train.lock").read_text())["process"] == os.getpid()
            with pytest.raises(InputError, match=f"process {os.getpid()} on "), locked(tmp_path):
                pass
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
