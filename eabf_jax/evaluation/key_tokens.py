"""Loss on key tokens: those that a model predicts much better from the whole text than from the end of it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from eabf_jax.errors import InputError
from eabf_jax.evaluation.intervals import Mean, student
from eabf_jax.evaluation.perplexity import BandLoss, check_edges

# The paper's thresholds, nats.
ALPHA = 2.0  # how much likelier the long context makes a key token
BETA = -2.0  # least log-probability of a key token after the long context


@dataclass(frozen=True)
class KeyTokenLoss(BandLoss):
    """Mean loss of the key tokens in a band, over the documents that have any; NaN if none has."""

    perplexity: float  # e to the mean loss
    low: float  # e to the bounds of the loss's interval
    high: float
    tokens: int  # key tokens in all documents
    documents: int  # documents that have any


def check_short_context(context: int, stride: int, length: int) -> None:
    """Refuses a short context that is not shorter than documents of this length.

    Raises:
      InputError: the first window of context + stride tokens holds the whole document.
    """
    if context + stride >= length:
        raise InputError(
            f"--short-context {context} with --short-stride {stride}: windows of {context + stride} tokens are not "
            f"shorter than the documents' {length}; a smaller context or longer documents are needed"
        )


def key_tokens(
    long: Float[np.ndarray, "documents T_minus_1"],
    short: Float[np.ndarray, "documents T_minus_1"],
    window: int,
    alpha: float = ALPHA,
    beta: float = BETA,
) -> Bool[np.ndarray, "documents T_minus_1"]:
    """Finds the key tokens, from one model's losses with long and with short context.

    Args:
      long: nats, each document read in one pass, as `position_losses` returns them.
      short: nats, as `sliding_losses` returns them.
      window: that of `short`, tokens. Tokens at lower positions have the same context in both, and are not key.
      alpha: least difference of the log-probabilities, nats.
      beta: least log-probability after the long context, nats.

    Returns:
      bool [documents, length - 1]; entry t belongs to the token at position t + 1.
    Source: Fang et al., "What is Wrong with Perplexity for Long-context Language Modeling?", arXiv 2410.23771.
    """
    found = (short.astype(np.float64) - long > alpha) & (-long > beta)
    found[:, : window - 1] = False
    return found


def key_token_means(
    losses: Float[np.ndarray, "documents T_minus_1"],
    keys: Bool[np.ndarray, "documents T_minus_1"],
    edges: Sequence[int],
) -> dict[tuple[int, int], Float[np.ndarray, "documents"]]:
    """Returns each document's mean loss on its key tokens in each band, and in all bands if there are several.

    Args:
      losses: nats, of any model; entry t belongs to the token at position t + 1.
      keys: as `key_tokens` returns them.
      edges: increasing positions, 0-based; band i is edges[i] <= position < edges[i + 1].

    Returns:
      float64 [documents] by (start, end), NaN for a document without key tokens there.
    Raises:
      InputError: as `band_losses`.
    """
    check_edges(edges, losses.shape[1] + 1)
    means = {}
    for start, end in _spans(edges):
        chosen, part = keys[:, max(start - 1, 0) : end - 1], losses[:, max(start - 1, 0) : end - 1].astype(np.float64)
        counts = chosen.sum(axis=1)
        means[start, end] = np.where(counts, (part * chosen).sum(axis=1) / np.maximum(counts, 1), np.nan)
    return means


def key_token_losses(
    losses: Float[np.ndarray, "documents T_minus_1"],
    keys: Bool[np.ndarray, "documents T_minus_1"],
    edges: Sequence[int],
) -> list[KeyTokenLoss]:
    """Averages the means of `key_token_means` over the documents that have key tokens in a band.

    Args:
      losses, keys, edges: as for `key_token_means`.

    Returns:
      One KeyTokenLoss per band, and one for all of them if there are several.
    Raises:
      InputError: as `band_losses`.
    """
    found = []
    for (start, end), means in key_token_means(losses, keys, edges).items():
        mean, half_width = student_of_some(means)
        found.append(
            KeyTokenLoss(
                start,
                end,
                mean,
                half_width,
                perplexity=math.exp(mean),
                low=math.exp(mean - half_width),
                high=math.exp(mean + half_width),
                tokens=int(keys[:, max(start - 1, 0) : end - 1].sum()),
                documents=int(np.isfinite(means).sum()),
            )
        )
    return found


def student_of_some(values: Float[np.ndarray, "documents"]) -> Mean:
    """Computes `student` without the documents whose value is NaN; NaN if none is left."""
    values = values[~np.isnan(values)]
    return student(values) if len(values) else Mean(math.nan, math.nan)


def _spans(edges: Sequence[int]) -> list[tuple[int, int]]:
    bands = list(itertools.pairwise(edges))
    return bands if len(bands) == 1 else [*bands, (edges[0], edges[-1])]
