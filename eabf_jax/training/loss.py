"""Next-token cross-entropy, in chunks so that the full logits never exist."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eabf_jax.model.llama import Llama, logits


def token_losses(
    model: Llama,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    chunk: int = 1024,
) -> Float[Array, "B T_minus_1"]:
    """Negative log-likelihood of every token but the first, given those before it.

    Args:
      model: the model.
      tokens: int32 [batch, length].
      positions: int32 [batch, length] or None, as for the model.
      segment_ids: int32 [batch, length] or None, as for the model.
      chunk: positions of a row whose logits exist at a time.

    Returns:
      float32 [batch, length - 1], in nats; entry t belongs to token t + 1.
    """
    hidden = model.hidden_states(tokens, positions, segment_ids)[:, :-1]
    kernel, targets = model.output_kernel(), tokens[:, 1:]
    length = targets.shape[1]
    chunk = min(chunk, length)
    pad = -length % chunk

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    # Recomputed in the backward pass: keeping the logits of every chunk would be keeping them all.
    @jax.checkpoint
    def losses(kernel: Array, hidden: Array, targets: Array) -> Array:
        scores = logits(hidden, kernel)
        chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(scores, axis=-1) - chosen

    _, out = jax.lax.scan(lambda _, x: (None, losses(kernel, *x)), None, (chunks(hidden), chunks(targets)))
    return out.swapaxes(0, 1).reshape(tokens.shape[0], -1)[:, :length]


def target_mask(loss_mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T_minus_1"]:
    """Which entries of `token_losses` count.

    Args:
      loss_mask: bool [batch, length]: tokens to be learned.
      segment_ids: int32 [batch, length]; 0 is padding.

    Returns:
      bool [batch, length - 1]: the token is to be learned, and its predecessor is of the same segment.
    """
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return loss_mask[:, 1:].astype(bool) & same
