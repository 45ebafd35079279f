"""One optimizer step: microbatches, float32 gradient accumulation, clipping, update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from eabf_jax.model.attention import BACKENDS, select
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama
from eabf_jax.parallel.rules import activation_constraint, parameter_shardings, sharded_attention, spec
from eabf_jax.training.loss import target_mask, token_losses
from eabf_jax.training.recipe import ComputeConfig


class TrainState(NamedTuple):
    """What an optimizer step reads and replaces: arrays, or their shapes or shardings in the same places."""

    step: Any  # int32 scalar: optimizer steps taken
    params: dict[str, Any]  # float32
    optimizer: Any  # optax state, float32


class StepMetrics(NamedTuple):
    """What an optimizer step reports."""

    loss: Float[Array, ""]  # nats per trained token, over the global batch
    gradient_norm: Float[Array, ""]  # before clipping
    parameter_norm: Float[Array, ""]  # after the update
    tokens: Int[Array, ""]  # tokens that the loss was averaged over


TrainStep = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, StepMetrics]]


def build_model(config: LlamaConfig, compute: ComputeConfig, mesh: Mesh) -> Llama:
    """The model as the step runs it on the mesh, with shapes in place of parameters.

    Args:
      config: the model's shape.
      compute: dtype, attention backend and remat policy.
      mesh: the device mesh.

    Returns:
      A `Llama` to be used through `with_parameters`; its parameters are float32 shapes.
    """
    platform = mesh.devices.flat[0].platform
    backend = BACKENDS[select(compute.attention, jnp.dtype(compute.dtype), config.head_dim, platform)]
    return Llama.abstract(
        config,
        dtype=jnp.dtype(compute.dtype),
        param_dtype=jnp.float32,
        attention=sharded_attention(mesh, backend, config.num_key_value_heads),
        remat=compute.remat,
        constrain=activation_constraint(mesh),
    )


def make_train_step(
    model: Llama, optimizer: optax.GradientTransformation, compute: ComputeConfig, *, every_token: bool
) -> TrainStep:
    """Builds the function of one optimizer step, to be jitted.

    Args:
      model: from `build_model`.
      optimizer: from `make_optimizer`.
      compute: the loss chunk is read.
      every_token: the loss is over every token, and rows hold several documents; otherwise it is over the tokens in
        `loss_mask`, and each row holds one document (padding after it).

    Returns:
      Function of the state and a batch of arrays `tokens`, `loss_mask`, `positions`, `segment_ids`, each
      [microbatches, rows, length].
    """

    def microbatch_loss(params: dict[str, Any], batch: Mapping[str, Array]) -> Array:
        losses = token_losses(
            model.with_parameters(params),
            batch["tokens"],
            batch["positions"],
            # Padding comes after every real token of a single document: causality alone keeps it out, and the
            # kernels are faster without a mask.
            batch["segment_ids"] if every_token else None,
            chunk=compute.loss_chunk,
        )
        return jnp.where(_mask(batch, every_token), losses, 0.0).sum()

    def train_step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, StepMetrics]:
        count = jax.vmap(lambda rows: _mask(rows, every_token).sum())(dict(batch)).sum()

        def accumulate(carry: tuple[Array, Any], rows: Mapping[str, Array]) -> tuple[tuple[Array, Any], None]:
            total, gradients = carry
            loss, gradient = jax.value_and_grad(microbatch_loss)(state.params, rows)
            return (total + loss, jax.tree.map(jnp.add, gradients, gradient)), None

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), state.params)
        (total, gradients), _ = jax.lax.scan(accumulate, (jnp.float32(0), zeros), dict(batch))
        # Averaged over the trained tokens of the global batch, however they fall into microbatches and devices.
        scale = 1.0 / jnp.maximum(count, 1).astype(jnp.float32)
        gradients = jax.tree.map(lambda g: g * scale, gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(total * scale, optax.tree.norm(gradients), optax.tree.norm(params), count)
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return train_step


def _mask(batch: Mapping[str, Array], every_token: bool) -> Array:
    learned = jnp.ones_like(batch["loss_mask"]) if every_token else batch["loss_mask"]
    return target_mask(learned, batch["segment_ids"])


def state_shardings(
    mesh: Mesh, abstract_params: Mapping[str, Any], optimizer: optax.GradientTransformation
) -> TrainState:
    """Shardings of a `TrainState`: the optimizer's moments lie where their parameters lie.

    Args:
      mesh: the device mesh.
      abstract_params: parameter tree of `jax.ShapeDtypeStruct`.
      optimizer: from `make_optimizer`.

    Returns:
      A TrainState of NamedSharding.
    """
    shardings = parameter_shardings(mesh, abstract_params)
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract_optimizer = jax.eval_shape(optimizer.init, abstract_params)
    structure = jax.tree.structure(abstract_params)

    def is_params(node: Any) -> bool:
        return bool(jax.tree.structure(node) == structure)  # type: ignore[operator]

    optimizer_shardings = jax.tree.map(
        lambda node: shardings if is_params(node) else replicated, abstract_optimizer, is_leaf=is_params
    )
    return TrainState(replicated, shardings, optimizer_shardings)


def microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a [microbatches, rows, length] batch array."""
    return NamedSharding(mesh, PartitionSpec(None, *spec("batch", "length")))
