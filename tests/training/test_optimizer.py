import math

import jax
import numpy as np
import optax
import pytest
import torch

from eabf_jax.training.optimizer import decayed, make_optimizer, updated
from eabf_jax.training.recipe import RecipeConfig
from eabf_jax.training.step import clip_factor


def test_weight_decay_spares_norms_and_biases(params):
    by_name = dict(jax.tree_util.tree_leaves_with_path(decayed(params)))
    spared = {"/".join(key.key for key in path) for path, decay in by_name.items() if not decay}
    assert spared == {"layers/input_layernorm/scale", "layers/post_attention_layernorm/scale", "norm/scale"}
    assert decayed({"q_proj": {"kernel": 0, "bias": 0}}) == {"q_proj": {"kernel": True, "bias": False}}


@pytest.mark.parametrize("warmup", [0, 3])
def test_updates_are_torchs(warmup):
    """Compares AdamW with two groups, clipping by global norm, warm-up and cosine decay with torch."""
    steps, peak = 9, 1e-2
    rng = np.random.default_rng(1)
    start = {
        "kernel": rng.normal(size=(7, 5)).astype(np.float32),
        "scale": rng.normal(size=5).astype(np.float32),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    # Norms are 0.06 to 600, so some steps are clipped at 1.
    gradients = [
        {
            name: (rng.normal(size=leaf.shape) * 10.0 ** rng.integers(-2, 3)).astype(np.float32)
            for name, leaf in start.items()
        }
        for _ in range(steps)
    ]
    gradients[4] = {name: np.zeros_like(leaf) for name, leaf in start.items()}

    recipe = RecipeConfig(learning_rate=peak, warmup_steps=warmup)
    optimizer = make_optimizer(recipe, steps)
    zeros = {name: np.zeros_like(leaf) for name, leaf in start.items()}
    params, mu, nu = start, zeros, zeros

    @jax.jit
    def update(step, params, mu, nu, gradient):
        scale = clip_factor(optax.tree.norm(gradient), recipe.clip_norm)
        return updated(optimizer, step, params, mu, nu, jax.tree.map(lambda g: g * scale, gradient))

    tensors = {name: torch.nn.Parameter(torch.from_numpy(leaf.copy())) for name, leaf in start.items()}
    groups = [
        {"params": [tensors["kernel"]], "weight_decay": 0.1},
        {"params": [tensors["scale"], tensors["bias"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        reference,
        lambda step: (
            step / warmup
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / (steps - warmup))))
        ),
    )
    for step, gradient in enumerate(gradients):
        params, mu, nu = update(np.int32(step), params, mu, nu, gradient)
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(gradient[name].copy())
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), 1.0)
        reference.step()
        schedule.step()
        for name, tensor in tensors.items():
            # A parameter of order one is rounded by 6e-8 per step. torch divides by norm + 1e-6, and the ratio of the
            # moments takes a dozen roundings: 2e-6 of each step, which is at most the peak rate.
            np.testing.assert_allclose(
                params[name],
                tensor.detach(),
                rtol=1e-6,
                atol=(step + 1) * (2e-6 * peak + 1e-7),
                err_msg=f"{name} {step}",
            )
    assert max(np.abs(params[name] - start[name]).max() for name in start) > peak  # the parameters changed
