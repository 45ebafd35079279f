"""AdamW with the paper's schedule, on float32 master parameters."""

from typing import Any

import jax
import optax

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
    """Clips by global norm, then AdamW.

    Args:
      recipe: the hyperparameters.
      steps: optimizer steps of the run, for the schedule.

    Returns:
      The optax transformation.
    """
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(
            learning_rate_schedule(recipe, steps),
            b1=recipe.beta1,
            b2=recipe.beta2,
            eps=recipe.epsilon,
            weight_decay=recipe.weight_decay,
            mask=decayed,
        ),
    )
