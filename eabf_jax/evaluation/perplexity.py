"""Loss by position: how well a model uses what lies 256, 1,024 or 16,384 tokens back."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from eabf_jax.errors import InputError
from eabf_jax.model.llama import Llama
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.parallel.rules import batch_sharding, sharded_attention
from eabf_jax.training.loss import token_losses

Progress = Callable[[int], None]


@dataclass(frozen=True)
class BandLoss:
    """Mean loss of the tokens at positions start <= position < end."""

    start: int
    end: int
    mean: float  # nats per token, over documents of equal weight
    half_width: float  # of the 95 % confidence interval over documents


def position_losses(
    model: Llama,
    documents: Int[np.ndarray, "documents T"],
    *,
    batch_size: int = 1,
    chunk: int = 1024,
    progress: Progress = lambda done: None,
) -> Float[np.ndarray, "documents T_minus_1"]:
    """Loss of every token of every document, each document read in one pass.

    Args:
      model: the model.
      documents: int32 [documents, length], all of the same length.
      batch_size: documents that each device reads in one forward pass.
      chunk: positions whose logits exist at a time.
      progress: called with the number of documents done.

    Returns:
      float32 [documents, length - 1], nats; entry t belongs to the token at position t + 1.
    """
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    template = Llama.abstract(
        model.config,
        dtype=model.dtype,
        param_dtype=model.dtype,
        attention=sharded_attention(mesh, model.attention, model.config.num_key_value_heads),
    )
    # The parameters travel as arguments: closed over, they would be compiled into the program.
    params = jax.device_put(model.parameters(), NamedSharding(mesh, PartitionSpec()))
    losses = jax.jit(lambda params, tokens: token_losses(template.with_parameters(params), tokens, chunk=chunk))
    rows, per_pass = [], batch_size * mesh.size
    for start in range(0, len(documents), per_pass):
        batch = documents[start : start + per_pass]
        missing = per_pass - len(batch)  # the last batch is filled up, so that nothing is compiled twice
        tokens = jax.device_put(np.pad(batch, ((0, missing), (0, 0))), batch_sharding(mesh))
        rows.append(np.asarray(losses(params, tokens))[: len(batch)])
        progress(start + len(batch))
    return np.concatenate(rows)


def band_losses(losses: Float[np.ndarray, "documents T_minus_1"], edges: Sequence[int]) -> list[BandLoss]:
    """Averages losses over bands of positions.

    Args:
      losses: from `position_losses`.
      edges: increasing positions, 0-based; band i is edges[i] <= position < edges[i + 1].

    Returns:
      One BandLoss a band; position 0, which nothing precedes, has no loss and is left out.
    Raises:
      InputError: edges that do not increase or reach past the documents.
    """
    length = losses.shape[1] + 1
    if len(edges) < 2 or any(a >= b for a, b in itertools.pairwise(edges)) or edges[0] < 0:
        raise InputError(f"position bands {','.join(map(str, edges))} do not increase from 0 or more")
    if edges[-1] > length:
        raise InputError(f"position band ends at {edges[-1]}, the documents at {length} tokens")
    bands = []
    for start, end in itertools.pairwise(edges):
        per_document = losses[:, max(start - 1, 0) : end - 1].astype(np.float64).mean(axis=1)
        spread = per_document.std(ddof=1) / math.sqrt(len(per_document)) if len(per_document) > 1 else math.nan
        bands.append(BandLoss(start, end, float(per_document.mean()), float(1.96 * spread)))
    return bands
