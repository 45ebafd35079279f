"""AdamW with the paper's schedule, on float32 master parameters."""

from typing import Any

import jax
import optax
from jaxtyping import Array

from eabf_jax.model.parameters import VECTORS
from eabf_jax.training.recipe import RecipeConfig


def learning_rate_schedule(recipe: RecipeConfig, steps: int) -> optax.Schedule:
    """Returns linear warm-up to the peak, followed by cosine decay to zero or a constant.

    Returns:
      A function from the 0-based step to the learning rate; with cosine decay, the rate is 0 after the last step.
    """
    after = (
        optax.cosine_decay_schedule(recipe.learning_rate, max(steps - recipe.warmup_steps, 1))
        if recipe.schedule == "cosine"
        else optax.constant_schedule(recipe.learning_rate)
    )
    if not recipe.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup_steps)
    return optax.join_schedules((warmup, after), (recipe.warmup_steps,))


def decayed(params: Any) -> Any:
    """Returns a tree with True for the parameters under weight decay: all except norm scales and biases."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in VECTORS, params)


def make_optimizer(recipe: RecipeConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW as an optax transformation; it expects gradients that are already clipped by their global norm.

    Args:
      steps: optimizer steps of the run, for the schedule.
    """
    return optax.adamw(
        learning_rate_schedule(recipe, steps),
        b1=recipe.beta1,
        b2=recipe.beta2,
        eps=recipe.epsilon,
        weight_decay=recipe.weight_decay,
        mask=decayed,
    )


def updated(
    optimizer: optax.GradientTransformation, step: Array, masters: Any, mu: Any, nu: Any, gradients: Any
) -> tuple[Any, Any, Any]:
    """Updates a tree of parameters, or any part of it.

    Optax counts steps in each part's state; here the caller keeps one count for all parts.

    Args:
      step: int32 scalar, number of steps already taken.
      masters: float32 parameters.
      gradients: float32, clipped.

    Returns:
      New parameters, first moments and second moments.
    """
    state = optax.tree.set(optimizer.init(masters), count=step, mu=mu, nu=nu)
    updates, state = optimizer.update(gradients, state, masters)
    return optax.apply_updates(masters, updates), optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
