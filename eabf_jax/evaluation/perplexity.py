"""How well a model uses distant context: loss by position in one pass, and perplexity of sliding windows."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from eabf_jax.errors import InputError
from eabf_jax.evaluation.intervals import student
from eabf_jax.evaluation.scorer import Scorer, Span
from eabf_jax.model.llama import Llama


@dataclass(frozen=True)
class BandLoss:
    """Mean loss of the tokens at positions start <= position < end."""

    start: int
    end: int
    mean: float  # nats per token, over documents of equal weight
    half_width: float  # of the 95 % confidence interval over documents; NaN for one document


@dataclass(frozen=True)
class WindowPerplexity:
    """Perplexity of documents read through a window that slides over them."""

    window: int
    stride: int
    mean: float  # loss, nats per token
    half_width: float  # of the loss's 95 % confidence interval over documents; NaN for one document
    perplexity: float  # e to the mean loss
    low: float  # e to the bounds of the loss's interval
    high: float


def position_losses(
    model: Llama,
    documents: Int[np.ndarray, "documents T"],
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Float[np.ndarray, "documents T_minus_1"]:
    """Computes the loss of every token of every document, each document read in one pass.

    Args:
      documents: int32 [documents, length], all of the same length.
      batch_size: documents that each device reads in one forward pass.
      progress: called with the number of documents done.

    Returns:
      float32 [documents, length - 1], nats; entry t belongs to the token at position t + 1.
    """
    length = documents.shape[1]
    return _losses(model, documents, length, [length], batch_size, progress)


def window_ends(length: int, window: int, stride: int) -> list[int]:
    """Returns the end of each window: `window` tokens, then `stride` more each; the last step may be shorter.

    Args:
      length: tokens of the document, at least `window`.
    """
    return [*range(window, length, stride), length]


def sliding_losses(
    model: Llama,
    documents: Int[np.ndarray, "documents T"],
    window: int,
    stride: int = 256,
    *,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Float[np.ndarray, "documents T_minus_1"]:
    """Computes the loss of every token of every document, read through a window that slides over it.

    The first window is scored whole. Each further window ends `stride` tokens later, and only these new tokens are
    scored. Every token past the first window has at least window - stride tokens before it.

    Args:
      documents: int32 [documents, length], all of the same length.
      window: tokens that the model sees at a time.
      stride: tokens from one window to the next.
      batch_size: windows that each device reads in one forward pass.
      progress: called with the number of windows done.

    Returns:
      float32 [documents, length - 1], nats; entry t belongs to the token at position t + 1.
    Raises:
      InputError: a window of less than 2 tokens or longer than the documents, or a stride not shorter than the window.
    Source: the evaluation of "YaRN" (Peng et al., 2023, section 4.3.1), after Press et al., 2022.
    """
    length = documents.shape[1]
    check_window(window, stride, length)
    return _losses(model, documents, window, window_ends(length, window, stride), batch_size, progress)


def _losses(
    model: Llama,
    documents: Int[np.ndarray, "documents T"],
    window: int,
    ends: Sequence[int],
    batch_size: int,
    progress: Callable[[int], None],
) -> Float[np.ndarray, "documents T_minus_1"]:
    """Computes losses through windows with these ends; each window scores the tokens that the one before did not."""
    losses = np.empty((len(documents), documents.shape[1] - 1), np.float32)
    steps = [(row, *step) for row in range(len(documents)) for step in itertools.pairwise([1, *ends])]
    spans = [
        Span(documents[row, end - window : end], start - 1 - (end - window), documents[row, start:end])
        for row, start, end in steps
    ]
    for done, (index, log_probs, _) in enumerate(Scorer(model)(spans, batch_size), start=1):
        row, start, end = steps[index]
        losses[row, start - 1 : end - 1] = -log_probs
        progress(done)
    return losses


def check_window(window: int, stride: int, length: int) -> None:
    """Refuses a window or stride that does not fit documents of this length; raises as `sliding_losses` does."""
    if not 2 <= window <= length:
        raise InputError(f"window {window}: from 2 to the documents' {length} tokens are needed")
    if not 1 <= stride < window:
        raise InputError(f"--stride {stride}: from 1 to {window - 1} tokens are needed, less than the window {window}")


def band_losses(losses: Float[np.ndarray, "documents T_minus_1"], edges: Sequence[int]) -> list[BandLoss]:
    """Averages losses over bands of positions.

    Args:
      edges: increasing positions, 0-based; band i is edges[i] <= position < edges[i + 1].

    Returns:
      One BandLoss per band; position 0, which nothing precedes, has no loss and is left out.
    Raises:
      InputError: edges that do not increase, or that reach past the documents.
    """
    check_edges(edges, losses.shape[1] + 1)
    return [BandLoss(start, end, *student(means)) for (start, end), means in band_means(losses, edges).items()]


def check_edges(edges: Sequence[int], length: int) -> None:
    """Refuses bands that do not fit documents of this length; raises as `band_losses` does."""
    if len(edges) < 2 or any(a >= b for a, b in itertools.pairwise(edges)) or edges[0] < 0:
        raise InputError(f"position bands {','.join(map(str, edges))} do not increase from 0 or more")
    if edges[-1] > length:
        raise InputError(f"position band ends at {edges[-1]}, the documents at {length} tokens")


def band_means(
    losses: Float[np.ndarray, "documents T_minus_1"], edges: Sequence[int]
) -> dict[tuple[int, int], Float[np.ndarray, "documents"]]:
    """Returns each document's mean loss in each band, float64 [documents] by (start, end); see `band_losses`."""
    return {
        (start, end): losses[:, max(start - 1, 0) : end - 1].astype(np.float64).mean(axis=1)
        for start, end in itertools.pairwise(edges)
    }


def window_perplexity(losses: Float[np.ndarray, "documents T_minus_1"], window: int, stride: int) -> WindowPerplexity:
    """Computes the perplexity over all scored tokens, from `sliding_losses` with this window and stride."""
    # All documents have the same length, so the mean over documents is the mean over tokens.
    mean, half_width = student(losses.astype(np.float64).mean(axis=1))
    return WindowPerplexity(
        window, stride, mean, half_width, math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width)
    )
