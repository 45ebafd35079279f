"""A lock that admits one process at a time to a run's directory."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eabf_jax.errors import InputError

LOCK_FILE = "train.lock"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Locks a run's directory until the block ends; creates the directory if it does not exist.

    The operating system releases the lock when the process ends for any reason. On a file system shared with other
    hosts, the lock covers those hosts only if that file system supports locks.

    Raises:
      InputError: another process holds the lock.
    """
    run.mkdir(parents=True, exist_ok=True)
    path = run / LOCK_FILE
    descriptor = _acquire(path)
    try:
        holder = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # usually the directory is not empty
            run.rmdir()


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        holder = _holder(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except OSError as error:
            # Any other error: the file system has no locks. Then the file of a live process on this host counts as one.
            held = error.errno in (errno.EAGAIN, errno.EACCES) or _lives(holder)
        if held:
            os.close(descriptor)
            raise InputError(
                f"{path.parent} is in use: process {holder.get('process', '?')} on {holder.get('host', '?')} has been "
                f"training there since {holder.get('since', '?')}; wait for it, stop it, or name another directory"
            )
        # Another process may have removed the file after it was opened here and before it was locked.
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)


def _holder(descriptor: int) -> dict[str, Any]:
    """Reads the record of the process that holds the lock; empty if it is missing or incomplete."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _lives(holder: dict[str, Any]) -> bool:
    """Returns whether the holder is a running process on this host."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("process"), int):
        return False
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process exists and belongs to another user
        return True
    return True
