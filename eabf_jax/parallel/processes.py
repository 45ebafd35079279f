"""Multi-process runs: connecting the processes, and agreeing on values and failures."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from eabf_jax.errors import InputError, Stopped

# JAX itself reads only the first; the other two make runs possible without a scheduler that JAX detects.
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Seconds that a failed process waits for the others to end before it exits.
_GRACE = 20.0


@contextmanager
def connected() -> Iterator[None]:
    """Connects this process to the other processes of a run; enter it before JAX is first used.

    JAX detects the other processes on TPU pods, SLURM, Open MPI and Kubernetes. Elsewhere, set three environment
    variables: `JAX_COORDINATOR_ADDRESS` (HOST:PORT of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    Raises:
      InputError: the variables are missing, incomplete or malformed.
    """
    _connect()
    try:
        yield
    except BaseException as error:
        # JAX would block this process's exit for five minutes, waiting for processes that wait for this one.
        end = threading.Timer(_GRACE, os._exit, (error.status if isinstance(error, Stopped) else 2,))
        end.daemon = True
        end.start()
        raise


def _connect() -> None:
    given = {name: os.environ[name] for name in (_ADDRESS, _COUNT, _INDEX) if os.environ.get(name)}
    missing = [name for name in (_ADDRESS, _COUNT, _INDEX) if name not in given]
    if given and missing:
        raise InputError(f"{' and '.join(given)} set, but not {' and '.join(missing)}: a process needs all three")
    try:
        if given:
            count, index = (int(given[name]) for name in (_COUNT, _INDEX))
            if not 0 <= index < count:
                raise InputError(f"{_INDEX} is {index}; of {count} processes ({_COUNT}) it is one of 0 to {count - 1}")
            jax.distributed.initialize(given[_ADDRESS], count, index)
        else:
            jax.distributed.initialize()
    except InputError:
        raise
    except ValueError as error:
        if given:
            raise InputError(
                f"{', '.join(f'{name}={value}' for name, value in given.items())}: HOST:PORT and two numbers are needed"
            ) from error
        raise InputError(
            f"distributed is true, but the other processes are unknown: set {_ADDRESS} (HOST:PORT of process "
            f"0), {_COUNT} and {_INDEX}; TPU pods, SLURM, Open MPI and Kubernetes need none of them"
        ) from error


def gathered(value: int) -> list[int]:
    """Returns the values of all processes in order of process index; every process must call it."""
    if jax.process_count() == 1:
        return [value]
    return [int(one) for one in np.ravel(multihost_utils.process_allgather(np.int32(value)))]


@contextmanager
def all_or_none() -> Iterator[None]:
    """Runs a block in every process and stops all processes if it fails in any; the block must not communicate.

    Raises:
      InputError: the block failed in another process, which reports the cause.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        others = [number for number, one in enumerate(gathered(int(failed))) if one]
        if others and not failed:
            raise InputError(
                f"process {jax.process_index()} stops because {', '.join(map(str, others))} of "
                f"{jax.process_count()} cannot start, and say{'s' if len(others) == 1 else ''} why"
            )
