"""Checkpoints of a run, in Orbax: parameters, optimizer, data position."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from eabf_jax.destination import no_space
from eabf_jax.errors import InputError
from eabf_jax.interop.native import CHECKPOINTS, quiet_orbax
from eabf_jax.training.step import Saved


def latest_step(run: Path) -> int:
    """The newest whole checkpoint of a run.

    Args:
      run: the run's directory, which need not exist.

    Returns:
      Its step; 0 where there is none.
    """
    folder = run / CHECKPOINTS
    found = folder.iterdir() if folder.is_dir() else ()
    return max((int(entry.name) for entry in found if entry.name.isdigit()), default=0)


class Checkpoints:
    """The `checkpoints/` folder of a run: each step a folder with `params`, `optimizer` and `data`.

    A finished run's last one has `params` alone.

    A step's folder appears under its name only once it is whole, so a killed run never leaves a half-written one to
    be resumed from. Saving copies to host memory and writes in the background.
    """

    def __init__(self, run: Path, keep: int):
        """Opens the folder.

        Args:
          run: the run's directory.
          keep: newest checkpoints kept.
        """
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
            # An error of the loop itself is the one to report; one of the background write stands alone.
            if error is None:
                raise _explained(failure) from failure
        finally:
            if not self._failed:
                self._quiet.__exit__(None, None, None)

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step."""
        return self._manager.latest_step()

    def save(self, step: int, saved: Saved, data: dict[str, Any]) -> None:
        """Saves in the background; a save still under way is waited for first.

        Args:
          step: optimizer steps taken.
          saved: what is to be kept of the state after that step; with an empty `optimizer` it cannot be resumed from.
          data: the loader's position, JSON.

        Raises:
          InputError: no space left.
        """
        items: dict[str, Any] = {"params": ocp.args.StandardSave(saved.params)}
        if saved.optimizer:
            items |= {"optimizer": ocp.args.StandardSave(saved.optimizer), "data": ocp.args.JsonSave(data)}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as failure:
            self._failed = True
            raise _explained(failure) from failure

    def restore(self, step: int, abstract: Saved) -> tuple[Saved, dict[str, Any]]:
        """Reads a checkpoint straight to its places on the mesh.

        Args:
          step: the checkpoint's step.
          abstract: the same of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          What was saved, and the loader's position.
        Raises:
          InputError: the checkpoint cannot be read.
        """
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    optimizer=ocp.args.StandardRestore(abstract.optimizer),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except Exception as failure:
            raise InputError(
                f"checkpoint {step} in {self._manager.directory} cannot be read ({_first_line(failure)}): "
                "remove it to go on from the one before"
            ) from failure
        return Saved(restored["params"], restored["optimizer"]), restored["data"]

    def reached_preemption(self, step: int) -> bool:
        """True where the scheduler of a pod has announced that the machine goes away (agreed among all hosts)."""
        return self._manager.reached_preemption(step)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _explained(failure: Exception) -> Exception:
    """The error for a failed write: one line where it is the disk's fault, itself otherwise."""
    full = no_space(failure)
    return InputError(f"{full[0]}: the checkpoint cannot be written ({_first_line(full[1])})") if full else failure
