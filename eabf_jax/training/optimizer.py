"""AdamW with the paper's schedule, on float32 master parameters."""

from typing import Any

import jax
import optax
from jaxtyping import Array

from eabf_jax.training.recipe import RecipeConfig


def learning_rate_schedule(recipe: RecipeConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine to zero (or constant).

    Args:
      recipe: peak, warm-up steps and kind of schedule.
      steps: optimizer steps of the run.

    Returns:
      Function from the 0-based step to the learning rate; after the last step it is 0 (cosine).
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
    """True for the parameters that weight decay applies to: all but norm scales and biases."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def make_optimizer(recipe: RecipeConfig, steps: int) -> optax.GradientTransformation:
    """AdamW; the gradients that it is given are clipped already, over all parameters together.

    Args:
      recipe: the hyperparameters.
      steps: optimizer steps of the run, for the schedule.

    Returns:
      The optax transformation.
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
    """One update of a tree of parameters, or of any part of it.

    Optax would count the steps in the state of every part; here the caller counts them once.

    Args:
      optimizer: from `make_optimizer`.
      step: int32 scalar, steps taken before.
      masters: float32 parameters.
      mu: first moments.
      nu: second moments.
      gradients: float32, clipped.

    Returns:
      New parameters, first and second moments.
    """
    state = optax.tree.set(optimizer.init(masters), count=step, mu=mu, nu=nu)
    updates, state = optimizer.update(gradients, state, masters)
    return optax.apply_updates(masters, updates), optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
