"""Log-probabilities of tokens given those before them, for perplexity, retrieval and the harness."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from eabf_jax.errors import InputError
from eabf_jax.hardware import device_at_hand
from eabf_jax.inference import placement
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama, logits
from eabf_jax.model.parameters import parameter_count
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.parallel.rules import batch_ways, llama_on, mesh_of, moved, parameter_shardings, with_shardings

# Fraction of a device's memory that a whole model may take; activations and logits need the rest.
_WHOLE_MODEL = 0.6


def evaluation_mesh(
    config: LlamaConfig, dtype: str, tensor: int = 1, devices: list[jax.Device] | None = None, memory: float = 0
) -> Mesh:
    """Chooses how devices share an evaluation: each reads rows of its own, and they split the model if it is large.

    Args:
      dtype: dtype of the parameters.
      tensor: devices that share the model's heads.
      devices: None means all.
      memory: bytes on each device; 0 means those of this machine's devices.

    Raises:
      InputError: `tensor` does not divide the devices, or the model.
    """
    count = len(devices or jax.devices())
    if count % tensor:
        raise InputError(f"tensor is {tensor}, which does not divide the {count} devices available")
    share = parameter_count(config) * jnp.dtype(dtype).itemsize / tensor
    split = share > _WHOLE_MODEL * (memory or device_at_hand().memory)
    data, fsdp = (1, -1) if split else (-1, 1)
    mesh = make_mesh(MeshConfig(data, fsdp, tensor), devices)
    placement.check(mesh, config)
    return mesh


def on_mesh(model: Llama) -> tuple[Mesh, Llama]:
    """Returns the mesh that a model computes on, and the model; one on a single device is copied to each device.

    Raises:
      InputError: a mesh that splits rows.
    """
    mesh = mesh_of(model)
    if mesh is None:
        mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
        model = moved(model, mesh)
    placement.check(mesh, model.config)
    return mesh, model


def filled(rows: Int[np.ndarray, "B T"], size: int) -> Int[np.ndarray, "size T"]:
    """Fills a batch up to a size with its own first row, so that one program serves batches of any number of rows."""
    return np.concatenate([rows, np.repeat(rows[:1], size - len(rows), axis=0)])


class Span(NamedTuple):
    """Consecutive tokens to score."""

    tokens: Sequence[int] | np.ndarray  # all that the model reads, at least one token
    begin: int  # index of the token before the first target
    targets: Sequence[int] | np.ndarray  # tokens to score; all but the last are also in `tokens`, from `begin` + 1 on


class Scorer:
    """A model on a mesh that scores spans."""

    def __init__(self, model: Llama):
        """Keeps the model's parameters where they are.

        Args:
          model: computes on the mesh that it was loaded on; a model on one device is copied to each device.

        Raises:
          InputError: a mesh that splits rows.
        """
        self._mesh, model = on_mesh(model)
        graph, self._params = nnx.split(model)
        self._program = _program(graph)

    def __call__(
        self, spans: Sequence[Span], batch_size: int = 1
    ) -> Iterator[tuple[int, Float[np.ndarray, "T"], Bool[np.ndarray, "T"]]]:
        """Scores spans in batches of similar lengths, the longest first.

        Args:
          spans: of any lengths.
          batch_size: spans that each device reads at a time; devices that share a model count as one.

        Yields:
          Index of a span, log-probabilities of its targets (float32, nats), and whether each is the likeliest token.
        """
        order = sorted(range(len(spans)), key=lambda index: (-len(spans[index].tokens), -len(spans[index].targets)))
        size = batch_size * batch_ways(self._mesh)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            # The longest rows, which cost most, are padded only to a multiple of 128.
            width = min(padded_length(len(spans[batch[0]].tokens)), -(-len(spans[order[0]].tokens) // 128) * 128)
            # The number of targets is a power of two or the width, for few shapes; the extra logits cost little.
            most = min(1 << max(6, (max(len(spans[index].targets) for index in batch) - 1).bit_length()), width)
            tokens, targets = np.zeros((size, width), np.int32), np.zeros((size, most), np.int32)
            lengths, begins = np.ones(size, np.int32), np.zeros(size, np.int32)
            for row, (read, begin, scored) in enumerate(spans[index] for index in batch):
                tokens[row, : len(read)], targets[row, : len(scored)] = read, scored
                lengths[row], begins[row] = len(read), begin
            rows = jax.device_put((tokens, lengths, begins, targets), placement.row_sharding(self._mesh))
            log_probs, is_greedy = map(np.asarray, self._program(self._params, *rows))
            for row, index in enumerate(batch):
                count = len(spans[index].targets)
                yield index, log_probs[row, :count], is_greedy[row, :count]


@functools.lru_cache(maxsize=8)
def _program(graph: Any) -> Callable[..., tuple[Array, Array]]:
    """Returns `token_scores` of parameters and rows, jitted; cached, so that models of one shape share a program."""
    # Parameters are arguments: a closure would make them constants of the program.
    return jax.jit(lambda params, *rows: token_scores(nnx.merge(graph, params), *rows))


def lower_scoring(config: LlamaConfig, dtype: Any, mesh: Mesh, window: int) -> jax.stages.Lowered:
    """Lowers the scoring of every token of a window from shapes alone, with one row per part of the batch.

    Args:
      dtype: dtype of parameters and computation.
      window: tokens per row.
    """
    model = llama_on(mesh, config, dtype=dtype, param_dtype=dtype)
    params = model.parameters()
    graph, state = nnx.split(model.with_parameters(with_shardings(params, parameter_shardings(mesh, params))))
    batch = batch_ways(mesh)
    rows = placement.row_sharding(mesh)
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in ((batch, window), (batch,)))
    return _program(graph).lower(state, tokens, lengths, lengths, tokens)  # type: ignore[attr-defined]


def token_scores(
    model: Llama,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    begins: Int[Array, "B"],
    targets: Int[Array, "B S"],
    *,
    chunk: int = 1024,
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Scores the tokens after each row's `begins`.

    Args:
      tokens: int32 [batch, length], each row padded at its end.
      lengths: int32 [batch], tokens of each row without padding.
      begins: int32 [batch], index of the token before the first target.
      targets: int32 [batch, scored]; results for a row's padding have no meaning.
      chunk: maximum targets per row whose logits are in memory at a time.

    Returns:
      Log-probabilities of the targets, float32 [batch, scored], in nats; and whether each is the likeliest token.
    """
    rows, scored = targets.shape
    # Padding repeats the last position, so that schemes that follow the length see the row's own.
    positions = jnp.minimum(jnp.arange(tokens.shape[1], dtype=jnp.int32), lengths[:, None] - 1)
    hidden = model.hidden_states(tokens, positions)
    # Gathered before the chunks, as in training; otherwise each chunk would gather its logits.
    kernel = model.constrain(model.output_kernel().astype(hidden.dtype), None, "vocab")
    pieces = -(-scored // chunk)
    targets = jnp.pad(targets, ((0, 0), (0, -scored % pieces)))
    index = jnp.minimum(begins[:, None] + jnp.arange(targets.shape[1]), tokens.shape[1] - 1)

    def score(part: tuple[Array, Array]) -> tuple[Array, Array]:
        index, targets = part
        scores = logits(jnp.take_along_axis(hidden, index[..., None], axis=1), kernel)
        chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(scores, axis=-1), scores.argmax(axis=-1) == targets

    parts = jax.tree.map(lambda x: x.reshape(rows, pieces, -1).swapaxes(0, 1), (index, targets))
    log_probs, is_greedy = (x.swapaxes(0, 1).reshape(rows, -1)[:, :scored] for x in jax.lax.map(score, parts))
    return log_probs, is_greedy


def padded_length(length: int) -> int:
    """Rounds a length up by less than a quarter, or less than 16; there are four lengths per power of two."""
    step = max(16, (1 << (length - 1).bit_length()) // 8)
    return -(-length // step) * step
