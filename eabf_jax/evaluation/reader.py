"""A model that reads many rows, on all devices: each has the whole model and rows of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from eabf_jax.model.llama import Llama
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.parallel.rules import sharded_attention, spec

Progress = Callable[[int], None]


class Reader:
    """Lays a model out and runs functions of it and of rows."""

    def __init__(self, model: Llama):
        """Copies the parameters to every device that does not have them.

        Args:
          model: the model.
        """
        self._mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
        self._template = Llama.abstract(
            model.config,
            dtype=model.dtype,
            param_dtype=model.dtype,
            attention=sharded_attention(self._mesh, model.attention, model.config.num_key_value_heads),
        )
        # The parameters travel as arguments: closed over, they would be compiled into the program.
        self._params = jax.device_put(model.parameters(), NamedSharding(self._mesh, PartitionSpec()))

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Prepares a function for `map`; kept by the caller, it is compiled once for each shape.

        Args:
          function: of the model and arrays of rows, to arrays of rows.

        Returns:
          The function of parameters and arrays that `map` takes.
        """
        return jax.jit(lambda params, *rows: function(self._template.with_parameters(params), *rows))

    def map(
        self,
        compiled: Callable[..., Any],
        arrays: Sequence[np.ndarray],
        *,
        batch_size: int = 1,
        progress: Progress = lambda done: None,
    ) -> Any:
        """Runs a function over rows, a batch at a time.

        Args:
          compiled: from `compiled`.
          arrays: its arguments beside the model, each [rows, ...] of the same number of rows.
          batch_size: rows that each device takes at a time.
          progress: called with the number of rows done.

        Returns:
          What the function gives, as NumPy arrays [rows, ...].
        """
        count, per_pass = len(arrays[0]), batch_size * self._mesh.size
        parts = []
        for start in range(0, count, per_pass):
            batch = [x[start : start + per_pass] for x in arrays]
            kept = len(batch[0])
            # The last batch is filled up with copies of its last row, so that nothing is compiled twice.
            whole = [np.concatenate([x, np.repeat(x[-1:], per_pass - kept, axis=0)]) for x in batch]
            made = compiled(self._params, *(self._put(x) for x in whole))
            parts.append(jax.tree.map(lambda x, kept=kept: np.asarray(x)[:kept], made))
            progress(start + kept)
        return jax.tree.map(lambda *found: np.concatenate(found), *parts)

    def _put(self, x: np.ndarray) -> Array:
        return jax.device_put(x, NamedSharding(self._mesh, spec("batch", *[None] * (x.ndim - 1))))
