"""One optimizer step: microbatches, float32 gradient accumulation, clipping, update.

`Program` runs the step as one jitted program that scans over stacked layers, for TPUs and CPUs. `layerwise.Layerwise`
runs the same step as one program per layer, for GPUs. Both implement `Step`.
"""

import itertools
import time
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama
from eabf_jax.model.lora import Lora, split_trained
from eabf_jax.parallel.rules import llama_on, parameter_shardings, spec, with_shardings
from eabf_jax.training.backward import Microbatch, Pieces, Tree, head_parameters, merge, remat_by_layer, zeros
from eabf_jax.training.master import join, split_tree
from eabf_jax.training.optimizer import updated
from eabf_jax.training.recipe import ComputeConfig


class TrainState(NamedTuple):
    """The state that an optimizer step reads and replaces; leaves are arrays, shapes or shardings.

    `params` and `rest` together are the float32 master parameters (see `master`); `mu` and `nu` are AdamW's moments.
    All four have the same tree structure.
    """

    step: Any  # int32 scalar: optimizer steps taken
    params: Tree  # in the compute dtype
    rest: Tree
    mu: Tree  # float32
    nu: Tree  # float32
    frozen: Tree  # parameters that are not trained, in the compute dtype


class StepMetrics(NamedTuple):
    """The metrics of one optimizer step."""

    loss: Float[Array, ""]  # nats per trained token, over the global batch
    gradient_norm: Float[Array, ""]  # before clipping
    parameter_norm: Float[Array, ""]  # after the update
    tokens: Int[Array, ""]  # trained tokens, over which the loss is averaged


class Saved(NamedTuple):
    """The part of a state that a checkpoint holds, for every `Step`: layers stacked, parameters in float32."""

    params: Tree  # the trained parameters
    optimizer: Tree  # {"mu": ..., "nu": ...}


class Step(Protocol):
    """An optimizer step, ready to be compiled and called."""

    @property
    def abstract(self) -> Saved:
        """Shapes and shardings of the arrays in a checkpoint."""

    @property
    def frozen(self) -> Tree:
        """Shapes and shardings of the frozen parameters: layers stacked, in the compute dtype."""

    def compile(self) -> float:
        """Compiles the step; returns the seconds it took."""

    def begin(self, params: Tree, frozen: Tree | None = None) -> TrainState:
        """Creates a state from float32 parameters with stacked layers and the frozen ones; consumes its arguments."""

    def restored(self, step: int, saved: Saved, frozen: Tree | None = None) -> TrainState:
        """Creates a state from a checkpoint and the frozen parameters; consumes its arguments."""

    def saved(self, state: TrainState, *, moments: bool = True) -> Saved:
        """Returns the part of a state that a checkpoint holds; without the moments, `optimizer` is empty."""

    def __call__(self, state: TrainState, batch: Microbatch) -> tuple[TrainState, StepMetrics]:
        """Runs one step over arrays [microbatches, rows, length]; consumes the state."""


def build_model(config: LlamaConfig, compute: ComputeConfig, mesh: Mesh, lora: Lora | None = None) -> Llama:
    """Builds the model for a step on the mesh, with float32 shapes in place of parameters.

    Args:
      compute: dtype and attention backend.
      lora: the adapters to train; None trains every parameter.
    """
    return llama_on(
        mesh,
        config,
        dtype=compute.dtype,
        param_dtype=jnp.float32,
        attention=compute.attention,
        whole=compute.gather == "step",
        lora=lora,
    )


class Program:
    """The step as one jitted program."""

    def __init__(
        self,
        model: Llama,
        optimizer: optax.GradientTransformation,
        compute: ComputeConfig,
        mesh: Mesh,
        *,
        clip_norm: float,
        batch: Microbatch,
    ):
        """Settles shapes and shardings.

        Args:
          compute: dtype, remat policy and loss chunk.
          clip_norm: largest norm of the gradient; larger gradients are scaled down to it.
          batch: shapes and shardings of the step's input arrays, each [microbatches, rows, length].

        Raises:
          InputError: unknown remat policy; a dimension that the mesh does not divide.
        """
        self._optimizer, self._clip_norm, self._batch = optimizer, clip_norm, batch
        self._dtype = jnp.dtype(compute.dtype)
        self._policies = remat_by_layer(compute.remat, model.config.num_hidden_layers)
        self._pieces = Pieces(model, compute.loss_chunk, mesh)
        params = model.parameters()
        masters, frozen = split_trained(with_shardings(params, parameter_shardings(mesh, params)), model.lora)
        self.frozen = narrowed(frozen, self._dtype)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, masters)
        replicated = NamedSharding(mesh, PartitionSpec())
        params, rest = jax.eval_shape(lambda tree: split_tree(tree, self._dtype), masters)
        rest_shardings = jax.tree.map(lambda leaf, at: at if leaf.size else replicated, rest, shardings)
        self._state = TrainState(
            jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
            with_shardings(params, shardings),
            with_shardings(rest, rest_shardings),
            masters,
            masters,
            self.frozen,
        )
        self.abstract = Saved(masters, {"mu": masters, "nu": masters})
        outputs = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        self._step = jax.jit(self._run, donate_argnums=0, out_shardings=(outputs, None))
        self._compiled: Any = None

    def lower(self) -> jax.stages.Lowered:
        """Traces and lowers the step from shapes alone."""
        return self._step.lower(self._state, self._batch)

    def compile(self) -> float:
        """See `Step`."""
        began = time.perf_counter()
        self._compiled = self.lower().compile()
        return time.perf_counter() - began

    def begin(self, params: Tree, frozen: Tree | None = None) -> TrainState:
        """See `Step`."""
        moments = jax.jit(
            lambda: (zeros(self._state.mu), zeros(self._state.nu)), out_shardings=self._placed("mu", "nu")
        )
        return self.restored(0, Saved(params, dict(zip(("mu", "nu"), moments(), strict=True))), frozen)

    def restored(self, step: int, saved: Saved, frozen: Tree | None = None) -> TrainState:
        """See `Step`."""
        halves = jax.jit(
            lambda tree: split_tree(tree, self._dtype), out_shardings=self._placed("params", "rest"), donate_argnums=0
        )
        counter = jax.device_put(jnp.int32(step), self._state.step.sharding)
        params, rest = halves(saved.params)
        return TrainState(counter, params, rest, saved.optimizer["mu"], saved.optimizer["nu"], frozen or {})

    def saved(self, state: TrainState, *, moments: bool = True) -> Saved:
        """See `Step`."""
        whole = jax.jit(lambda *halves: jax.tree.map(join, *halves), out_shardings=self._placed("mu")[0])
        return Saved(whole(state.params, state.rest), {"mu": state.mu, "nu": state.nu} if moments else {})

    def _placed(self, *names: str) -> tuple[Any, ...]:
        return tuple(jax.tree.map(lambda leaf: leaf.sharding, getattr(self._state, name)) for name in names)

    def __call__(self, state: TrainState, batch: Microbatch) -> tuple[TrainState, StepMetrics]:
        """See `Step`."""
        return (self._compiled or self._step)(state, batch)

    def _run(self, state: TrainState, batch: Microbatch) -> tuple[TrainState, StepMetrics]:
        def accumulate(carry: tuple[Array, Tree], rows: Microbatch) -> tuple[tuple[Array, Tree], None]:
            total, gradients = carry
            loss, gradients = self._microbatch(state, rows, gradients)
            return (total + loss, gradients), None

        start = (jnp.float32(0), zeros(state.params))
        (total, gradients), _ = jax.lax.scan(accumulate, start, batch)
        count = batch.mask.sum()
        # Averaged over the trained tokens of the global batch, however microbatches and devices split them.
        scale = 1.0 / jnp.maximum(count, 1).astype(jnp.float32)
        norm = optax.tree.norm(gradients) * scale
        scale *= clip_factor(norm, self._clip_norm)
        params, rest, mu, nu, squares = update(self._optimizer, *state[:5], gradients, scale)
        metrics = StepMetrics(total / jnp.maximum(count, 1), norm, jnp.sqrt(squares), count)
        return TrainState(state.step + 1, params, rest, mu, nu, state.frozen), metrics

    def _microbatch(self, state: TrainState, rows: Microbatch, gradients: Tree) -> tuple[Array, Tree]:
        """Returns the summed loss of one microbatch, and `gradients` plus this microbatch's gradients."""
        pieces, params, frozen = self._pieces, state.params, state.frozen
        merged = merge(params, frozen)
        row = pieces.row(rows)
        x = pieces.embed(merged["embed_tokens"], rows.tokens)

        def layer(index: Array) -> tuple[Tree, Tree, Array]:
            one = (jax.tree.map(lambda leaf: leaf[index], tree.get("layers", {})) for tree in (params, frozen))
            return (*one, index)

        # One scan per run of consecutive layers with the same policy.
        groups = itertools.groupby(range(len(self._policies)), key=self._policies.__getitem__)
        runs = [(policy, jnp.array([*indices], jnp.int32)) for policy, indices in groups]
        kept = []  # by run, the layers' inputs and residuals
        for policy, indices in runs:

            def forward(x: Array, index: Array, policy: str = policy) -> tuple[Array, tuple[Array, list[Array]]]:
                y, residuals = pieces.forward(policy, *layer(index), x, row)
                return y, (x, residuals)

            x, of_run = jax.lax.scan(forward, x, indices)
            kept.append(of_run)
        tied = "lm_head" not in merged
        loss, head, d_x = pieces.head(
            head_parameters(params, tied), head_parameters(frozen, tied), x, rows, head_parameters(gradients, tied)
        )
        gradients = {**gradients, **head}
        layers = gradients.get("layers", {})
        for (policy, indices), of_run in zip(reversed(runs), reversed(kept), strict=True):

            def backward(
                carry: tuple[Array, Tree], inputs: tuple[Array, tuple[Array, list[Array]]], policy: str = policy
            ) -> tuple[tuple[Array, Tree], None]:
                (d_y, sums), (index, (x, residuals)) = carry, inputs
                d_layer, d_x = pieces.backward(policy, *layer(index), x, row, residuals, d_y)
                # Added to the sums in place, so that no second copy of all layers' gradients exists.
                sums = jax.tree.map(lambda a, g: a.at[index].add(g.astype(jnp.float32)), sums, d_layer)
                return (d_x, sums), None

            (d_x, layers), _ = jax.lax.scan(backward, (d_x, layers), (indices, of_run), reverse=True)
        embedding = pieces.embed_backward(gradients.get("embed_tokens", {}), rows.tokens, d_x)
        found = {"embed_tokens": embedding, "layers": layers}
        return loss, {**gradients, **{name: tree for name, tree in found.items() if name in gradients}}


def clip_factor(norm: Float[Array, ""], largest: float) -> Float[Array, ""]:
    """Returns the factor that scales gradients of this norm down to at most `largest`."""
    return jnp.where(norm > largest, largest / norm, 1.0)


def update(
    optimizer: optax.GradientTransformation,
    step: Int[Array, ""],
    params: Tree,
    rest: Tree,
    mu: Tree,
    nu: Tree,
    gradients: Tree,
    scale: Float[Array, ""],
) -> tuple[Tree, Tree, Tree, Tree, Float[Array, ""]]:
    """Applies AdamW to float32 master parameters, or to any part of their tree.

    Args:
      step, params, rest, mu, nu: as in `TrainState`.
      gradients: float32 sums over the microbatches.
      scale: factor on the sums, which averages and clips them.

    Returns:
      New params, rest, mu and nu, and the sum of squares of the new master parameters.
    """
    masters = jax.tree.map(join, params, rest)
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    masters, mu, nu = updated(optimizer, step, masters, mu, nu, gradients)
    dtype = jax.tree.leaves(params)[0].dtype
    return (*split_tree(masters, dtype), mu, nu, optax.tree.norm(masters, squared=True))


def narrowed(shapes: Tree, dtype: Any) -> Any:
    """Replaces the dtype in a tree of shapes and shardings."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), shapes)


def microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a [microbatches, rows, length] batch array."""
    return NamedSharding(mesh, PartitionSpec(None, *spec("batch", "length")))
