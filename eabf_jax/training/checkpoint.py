"""Orbax checkpoints of a run: parameters, optimizer state and data position."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from eabf_jax.destination import no_space
from eabf_jax.errors import InputError
from eabf_jax.interop.native import CHECKPOINTS, chunks, quiet_orbax
from eabf_jax.training.step import Saved


def latest_step(run: Path) -> int:
    """Returns the step of a run's newest complete checkpoint; 0 if there is none, or no such directory."""
    folder = run / CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else ()
    return max((int(entry.name) for entry in found if entry.name.isdigit()), default=0)


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
        self._manager = ocp.CheckpointManager(
            (run / CHECKPOINTS).absolute(),
            item_names=("params", "optimizer", "data"),
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
          InputError: no space is left, or a quota or file size limit is reached.
        """
        items: dict[str, Any] = {"params": ocp.args.StandardSave(saved.params, chunks(saved.params))}
        if saved.optimizer:
            items |= {"optimizer": ocp.args.StandardSave(saved.optimizer), "data": ocp.args.JsonSave(data)}
        try:
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
    """Returns the error for a failed write: one line if the disk is full or limited, else the failure itself."""
    full = no_space(failure)
    return InputError(f"{full[0]}: the checkpoint cannot be written ({_first_line(full[1])})") if full else failure
