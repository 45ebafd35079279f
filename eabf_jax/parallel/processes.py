"""Many processes as one run: how they find each other, and how they agree."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from eabf_jax.errors import InputError

# JAX reads the first of these itself; with the others, a machine needs no scheduler that JAX knows.
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Seconds for which a process that failed waits for the others to end as well.
_GRACE = 20.0


@contextmanager
def connected() -> Iterator[None]:
    """Makes this process one of a run's many; to be entered before JAX is first used.

    TPU pods, SLURM, Open MPI and Kubernetes tell JAX who the others are. Elsewhere three environment variables do:
    `JAX_COORDINATOR_ADDRESS` (HOST:PORT of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    Raises:
      InputError: the variables are incomplete or no numbers; nothing tells who the others are; not all came.
    """
    _connect()
    try:
        yield
    except BaseException:
        # JAX would keep this process for five minutes, for others that themselves wait for it.
        end = threading.Timer(_GRACE, os._exit, (2,))
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
            f"distributed is true, but nothing tells who the other processes are: set {_ADDRESS} (HOST:PORT of process "
            f"0), {_COUNT} and {_INDEX}; TPU pods, SLURM, Open MPI and Kubernetes need none of them"
        ) from error


def gathered(value: int) -> list[int]:
    """The value of every process, in their order; all have to call it."""
    if jax.process_count() == 1:
        return [value]
    return [int(one) for one in np.ravel(multihost_utils.process_allgather(np.int32(value)))]


@contextmanager
def all_or_none() -> Iterator[None]:
    """What every process does for itself, without waiting for another: where one fails, none goes on.

    Raises:
      InputError: another process failed, and says why.
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
