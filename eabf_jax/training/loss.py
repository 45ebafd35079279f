"""Next-token cross-entropy: its plain definition, and the targets of a batch.

Training does not call `token_losses`: `backward.Pieces.head` computes the same loss together with its derivatives, by
hand. tests/training/test_backward.py compares that with `jax.grad` of `token_losses`, and test_loss.py compares
`token_losses` with PyTorch's cross-entropy. Evaluation needs no gradients, and has a scorer of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eabf_jax.model.llama import Llama, logits


def token_losses(
    model: Llama,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    chunk: int = 1024,
    start: int = 0,
) -> Float[Array, "B scored"]:
    """Computes the negative log-likelihood of every token except the first; the full logits are never in memory.

    Args:
      tokens: int32 [batch, length].
      positions: int32 [batch, length] or None, as for the model.
      segment_ids: int32 [batch, length] or None, as for the model.
      chunk: positions of a row whose logits are in memory at a time.
      start: tokens up to and including this index are context only and are not scored.

    Returns:
      float32 [batch, length - 1 - start], in nats; entry t belongs to token start + t + 1.
    """
    hidden = model.hidden_states(tokens, positions, segment_ids)[:, start:-1]
    kernel, targets = model.output_kernel(), tokens[:, start + 1 :]
    length = targets.shape[1]
    chunk = min(chunk, length)
    pad = -length % chunk

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    # Recomputed in the backward pass; otherwise the logits of all chunks would be kept.
    @jax.checkpoint
    def losses(kernel: Array, hidden: Array, targets: Array) -> Array:
        scores = logits(hidden, kernel)
        chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(scores, axis=-1) - chosen

    _, out = jax.lax.scan(lambda _, x: (None, losses(kernel, *x)), None, (chunks(hidden), chunks(targets)))
    return out.swapaxes(0, 1).reshape(tokens.shape[0], -1)[:, :length]


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
