"""One process at a time in a run's directory."""

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
    """Holds a run's directory, which is made where it is not there, until the block ends.

    The operating system ends the lock of a process that has ended, however it did. On a file system that other hosts
    share, it holds between them as far as that file system has locks.

    Args:
      run: the run's directory.

    Raises:
      InputError: another process holds it.
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
        with suppress(OSError):  # it is not empty, as a rule
            run.rmdir()


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        holder = _holder(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except OSError as error:
            # Anything else: the file system has no locks. What a process of this host wrote tells enough, then.
            held = error.errno in (errno.EAGAIN, errno.EACCES) or _lives(holder)
        if held:
            os.close(descriptor)
            raise InputError(
                f"{path.parent} is in use: process {holder.get('process', '?')} on {holder.get('host', '?')} has been "
                f"training there since {holder.get('since', '?')}; wait for it, stop it, or name another directory"
            )
        # Its holder may have removed the file between our opening and our locking it.
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)


def _holder(descriptor: int) -> dict[str, Any]:
    """What the process that holds the lock wrote, as far as it has."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process is one of this host, and has not ended."""
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("process"), int):
        return False
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
