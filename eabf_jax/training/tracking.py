"""Progress and metrics of a run: a progress bar, JSON lines and TensorBoard."""

import json
import math
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import TextColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from eabf_jax.console import progress_bar
from eabf_jax.destination import whole
from eabf_jax.errors import InputError
from eabf_jax.interop.native import METRICS_FILE, TENSORBOARD
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.lora import Lora, adapters
from eabf_jax.model.parameters import parameter_count
from eabf_jax.reading import parse_json, read_text, reading


def flops_per_token(config: LlamaConfig, length: int, lora: Lora | None = None) -> float:
    """Returns the model FLOPs of forward and backward pass per trained token, without recomputation.

    Args:
      length: tokens per row; attention is causal.
      lora: the adapters, if they are trained in place of the model's kernels.

    Returns:
      6 x (parameters in matrix products) + 6 x layers x (query heads x head_dim) x length. With adapters, frozen
      parameters count 4 x, because they have no gradients. For a layer with a sliding window, the length is twice the
      mean number of tokens that a query sees.
    """
    embedding = config.vocab_size * config.hidden_size
    looked_up = 0 if config.tie_word_embeddings else embedding
    windows = (config.window_of(layer) for layer in range(config.num_hidden_layers))
    lengths = (length if window is None or window >= length else window * (2 - window / length) for window in windows)
    attention = config.num_attention_heads * config.head_dim * sum(lengths)
    whole = parameter_count(config) - looked_up
    if lora is None:
        return 6.0 * whole + 6.0 * attention
    trained = embedding if lora.train_embeddings and config.tie_word_embeddings else 0
    beside = sum(math.prod(adapter.shape) for adapter in adapters(config, lora))
    return 4.0 * (whole - trained) + 6.0 * (trained + beside) + 6.0 * attention


class Tracker:
    """Writes one record per step to `metrics.jsonl`, to `tensorboard/`, and to the terminal."""

    def __init__(self, run: Path, *, steps: int, start: int, quiet: bool = False):
        """Opens the files; drops records after `start`, left by a run that was killed after its last checkpoint.

        Args:
          start: steps already taken.
          quiet: writes and shows nothing; True in every process except the first.
        """
        self._steps, self._start, self._quiet = steps, start, quiet
        self._began = time.monotonic()
        self._console = Console(stderr=True, quiet=quiet)
        self._progress = progress_bar(
            rest=TextColumn("{task.fields[note]}"), console=self._console, disable=not self._console.is_terminal
        )
        self._task = self._progress.add_task("training", total=steps, completed=start, note="compiling the step ...")
        if quiet:
            return
        path = run / METRICS_FILE
        lines = read_text(path).splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= start]
        with whole(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")
        folder = run / TENSORBOARD
        folder.mkdir(exist_ok=True)
        # Writes from this thread: on a full disk, SummaryWriter's own thread dies silently and the run hangs.
        self._events = EventsWriter(str(folder / "events"), f".{start}")
        restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=start + 1, session_log=restart))

    def __enter__(self) -> Self:
        self._progress.start()
        self._say("compiling the step ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._quiet:
            return
        try:
            self._file.close()
            self._events.close()
        except OSError:
            if error is None:  # otherwise the first failure is reported
                raise

    def compiled(self) -> None:
        """Marks the step as compiled and starts the clock for the remaining time."""
        self._began = time.monotonic()
        self._progress.update(self._task, note="first step ...")

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Reports one step.

        Args:
          step: optimizer steps taken so far.
          metrics: numbers by name, None if unknown; `loss` and `tokens_per_second` are needed.
        """
        left = (time.monotonic() - self._began) / (step - self._start) * (self._steps - step)
        note = f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s"
        if metrics.get("mfu") is not None:
            note += f"  MFU {metrics['mfu']:.1%}"
        note += f"  {timedelta(seconds=round(left))} left"
        self._progress.update(self._task, completed=step, note=note)
        self._say(f"step {step}/{self._steps}  {note}")
        if self._quiet:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        known = {name: value for name, value in metrics.items() if value is not None}
        values = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in known.items()]
        summary = summary_pb2.Summary(value=values)
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
        self._events.flush()

    def _say(self, line: str) -> None:
        """Prints a line if there is no terminal for the progress bar."""
        if not self._console.is_terminal:
            self._console.print(line, soft_wrap=True, highlight=False)


def _step_of(line: str) -> float:
    """Returns the step of a record; infinity for a truncated line, as a killed run leaves it."""
    try:
        with reading(METRICS_FILE, "not the metrics of a step"):
            return int(parse_json(line, METRICS_FILE)["step"])
    except InputError:
        return math.inf
