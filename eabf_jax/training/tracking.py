"""What a run reports: a progress bar for people, JSON lines and TensorBoard for programs."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from eabf_jax.model.config import LlamaConfig

# Dense bfloat16 peak of one device in FLOP/s, by a part of `jax.Device.device_kind`; from the vendors' data sheets.
PEAK_FLOPS = {
    "H100": 989.4e12,
    "H200": 989.4e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device.

    Args:
      device_kind: `jax.Device.device_kind`.

    Returns:
      FLOP/s, or None for a device that is not in `PEAK_FLOPS`.
    """
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def parameter_count(config: LlamaConfig) -> int:
    """Number of parameters of a model, biases included."""
    query, key_value = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    hidden, wide = config.hidden_size, config.intermediate_size
    layer = 2 * hidden * (query + key_value) + 3 * hidden * wide + 2 * hidden
    layer += config.attention_bias * (query + 2 * key_value + hidden) + config.mlp_bias * (2 * wide + hidden)
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + embeddings + hidden


def flops_per_token(config: LlamaConfig, length: int) -> float:
    """Model FLOPs of forward and backward for one trained token; recomputation is not counted.

    Args:
      config: the model's shape.
      length: tokens a row; causal attention.

    Returns:
      6 x (parameters in matrix products) + 6 x layers x (query heads x head_dim) x length.
    """
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6.0 * (parameter_count(config) - looked_up) + 6.0 * attention


class Tracker:
    """Writes one record a step to `metrics.jsonl`, to `tensorboard/`, and to the terminal."""

    def __init__(self, run: Path, *, steps: int, start: int, quiet: bool = False):
        """Opens the files; records after `start` (of a run that was killed after its last checkpoint) are dropped.

        Args:
          run: the run's directory.
          steps: optimizer steps of the whole run.
          start: steps already taken.
          quiet: True on all but the first process of a pod: nothing is written or shown.
        """
        self._quiet = quiet
        self._console = Console(stderr=True, quiet=quiet)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("", total=steps, completed=start, note="compiling the step ...")
        if quiet:
            return
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= start]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
        if not self._quiet:
            self._file.close()
            self._tensorboard.close()

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Reports one step.

        Args:
          step: optimizer steps taken so far.
          metrics: JSON values by name; `loss` and `tokens_per_second` are shown to people.
        """
        note = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        if metrics.get("mfu") is not None:
            note += f"  MFU {metrics['mfu']:.1%}"
        self._progress.update(self._task, completed=step, note=note)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{int(self._progress.tasks[0].total or 0)}  {note}")
        if self._quiet:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if value is not None:
                self._tensorboard.add_scalar(name, value, step)


def _step_of(line: str) -> float:
    """The step of a record; infinite for a line that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
