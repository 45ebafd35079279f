"""Orbax checkpoints of a run: parameters, optimizer state and data position."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from eabf_jax.checksums import check
from eabf_jax.destination import no_space
from eabf_jax.errors import InputError
from eabf_jax.interop.native import CHECKPOINTS, Checksummed, chunks, quiet_orbax, steps
from eabf_jax.parallel.processes import gathered
from eabf_jax.training.step import Saved

# A checkpoint to resume from has all of them.
_ITEMS = ("params", "optimizer", "data")


def latest_step(run: Path) -> int:
    """Returns the step of a run's newest complete checkpoint; 0 if there is none, or no such directory."""
    return max(steps(run / CHECKPOINTS), default=0)


def sound_step(run: Path, last: int) -> int:
    """Finds a run's newest checkpoint without damage, and prints what is damaged in newer ones; all processes call it.

    Process 0 lists the checkpoints, because a shared directory can lag in other processes; each process compares its
    share of the files with their checksums.

    Args:
      last: the run's last step, whose checkpoint has only parameters.

    Returns:
      The checkpoint's step; 0 if the run has no checkpoint yet.
    Raises:
      InputError: the run has checkpoints, and all are damaged.
    """
    below, own = 2**31 - 1, f"{run / CHECKPOINTS}: damaged, as another process says"
    while step := gathered(max((at for at in steps(run / CHECKPOINTS) if at < below), default=0))[0]:
        found = _faults(run / CHECKPOINTS / str(step), _ITEMS if step < last else _ITEMS[:1])
        if not any(gathered(len(found))):
            return step
        below = step
        if found:
            own = found[0] + (f" (and {len(found) - 1} more files)" if found[1:] else "")
            print(f"checkpoint {step} is damaged: {own}; looking for the one before", file=sys.stderr)
    if below == 2**31 - 1:
        return 0
    raise InputError(
        f"{own}; there is no checkpoint before it to resume from: pass --overwrite true to start over (and "
        "--checkpoint.keep 2 to keep one more)"
    )


def _faults(folder: Path, items: Sequence[str]) -> list[str]:
    """Returns a line for each file of this process's share that is missing or damaged in a checkpoint."""
    found: list[str] = []
    for item in items:
        if not (folder / item).is_dir():
            found.append(f"{folder / item}: missing")
        elif checked := check(folder / item, jax.process_index(), jax.process_count()):
            found.extend(checked.faults)
    return found


def set_aside(run: Path, after: int) -> None:
    """Renames the folders of later steps to `<step>.damaged`, and says so; the run can then save these steps anew."""
    folder = run / CHECKPOINTS
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_dir() and entry.name.isdecimal() and int(entry.name) > after:
            aside = entry.with_name(f"{entry.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            entry.rename(aside)
            print(f"{entry}: no whole checkpoint; set aside as {aside.name}", file=sys.stderr)


class _Arrays(Checksummed, ocp.StandardCheckpointHandler):
    pass


class _Json(Checksummed, ocp.JsonCheckpointHandler):
    pass


class Checkpoints:
    """The `checkpoints/` folder of a run, with one folder per step that contains `params`, `optimizer` and `data`.

    The last checkpoint of a finished run contains only `params`.

    A step's folder gets its final name only when it is complete, so a killed run never leaves a partial checkpoint to
    resume from. Saving copies to host memory and writes in the background.
    """

    def __init__(self, run: Path, keep: int):
        """Opens the folder, where the `keep` newest checkpoints are kept."""
        self._failed = False
        self._quiet = quiet_orbax()
        self._quiet.__enter__()
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ("params", "optimizer"):
            arrays = _Arrays()
            registry.add(item, ocp.args.StandardSave, arrays)
            registry.add(item, ocp.args.StandardRestore, arrays)
        position = _Json()
        registry.add("data", ocp.args.JsonSave, position)
        registry.add("data", ocp.args.JsonRestore, position)
        self._manager = ocp.CheckpointManager(
            (run / CHECKPOINTS).absolute(),
            handler_registry=registry,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._manager.close()
        except Exception as failure:
            self._failed = True
            # If the training loop raised an error, that one is reported rather than the background write's.
            if error is None:
                raise _explained(failure) from failure
        finally:
            if not self._failed:  # tasks left over from a failed write log errors until the process ends
                self._quiet.__exit__(None, None, None)

    def latest_step(self) -> int | None:
        """Returns the newest complete checkpoint's step; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, saved: Saved, data: dict[str, Any]) -> None:
        """Saves in the background; waits first for a save that is still running.

        Args:
          step: optimizer steps taken.
          saved: the state after that step; a checkpoint with an empty `optimizer` cannot be resumed from.
          data: the loader's position, as JSON values.

        Raises:
          InputError: the system refuses the write: no space is left, a quota is reached, no permission.
        """
        items: dict[str, Any] = {"params": ocp.args.StandardSave(saved.params, chunks(saved.params))}
        if saved.optimizer:
            items |= {"optimizer": ocp.args.StandardSave(saved.optimizer), "data": ocp.args.JsonSave(data)}
        try:
            if jax.process_index() == 0:
                # If Orbax itself fails to make a folder, its threads wait for the folder and the process does not end.
                with tempfile.TemporaryDirectory(prefix=".writable-", dir=self._manager.directory):
                    pass
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as failure:
            self._failed = True
            raise _explained(failure) from failure

    def restore(self, step: int, abstract: Saved) -> tuple[Saved, dict[str, Any]]:
        """Reads a checkpoint directly into its shardings on the mesh.

        Args:
          abstract: the checkpoint's structure, with `jax.ShapeDtypeStruct` leaves that have shardings.

        Returns:
          The saved state, and the loader's position.
        Raises:
          InputError: the checkpoint cannot be read.
        """
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(abstract.optimizer),
            data=ocp.args.JsonRestore(),
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as failure:
            raise InputError(
                f"checkpoint {step} in {self._manager.directory} cannot be read ({_first_line(failure)}): "
                "remove it to resume from the one before"
            ) from failure
        return Saved(restored["params"], restored["optimizer"]), restored["data"]

    def reached_preemption(self, step: int) -> bool:
        """Returns True if the pod's scheduler has announced a preemption; all hosts agree on the answer."""
        return self._manager.reached_preemption(step)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _explained(failure: Exception) -> Exception:
    """Returns the error for a failed write: one line if the system refuses it, else the failure itself."""
    if full := no_space(failure):
        return InputError(f"{full[0]}: the checkpoint cannot be written ({_first_line(full[1])})")
    return InputError(f"the checkpoint cannot be written ({failure})") if isinstance(failure, OSError) else failure
