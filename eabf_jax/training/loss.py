"""Next-token cross-entropy: its plain definition, and the targets of a batch.

Training does not call `token_losses`: `backward.Pieces.head` computes the same loss together with its derivatives, by
hand. tests/training/test_backward.py compares that with `jax.grad` of `token_losses`, and test_loss.py compares
`token_losses` with PyTorch's cross-entropy. Evaluation needs no gradients, and has a scorer of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eabf_jax.model.llama import Llama


def token_losses(
    model: Llama,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T-1"]:
    """Computes the negative log-likelihood of every token except the first.

    Args:
      tokens: int32 [batch, length].
      positions: int32 [batch, length] or None, as for the model.
      segment_ids: int32 [batch, length] or None, as for the model.

    Returns:
      float32 [batch, length - 1], in nats; entry t belongs to token t + 1.
    """
    logits = model(tokens, positions, segment_ids)[:, :-1]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]


def next_tokens(
    tokens: Int[np.ndarray, "B T"],
    loss_mask: Bool[np.ndarray, "B T"],
    segment_ids: Int[np.ndarray, "B T"],
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Returns each token's next token, and a mask of the targets that count.

    Args:
      tokens: int32 [batch, length].
      loss_mask: bool [batch, length]; True for tokens to be learned.
      segment_ids: int32 [batch, length]; 0 is padding.

    Returns:
      Targets int32 [batch, length], and bool [batch, length]: True where the target is to be learned and in the same
      segment. The last column has no target.
    """
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    last = ((0, 0), (0, 1))
    return np.pad(tokens[:, 1:], last), np.pad(loss_mask[:, 1:].astype(bool) & same, last)
