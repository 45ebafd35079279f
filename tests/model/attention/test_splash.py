"""The TPU kernel against attention in float64 NumPy."""

import numpy as np
import pytest
from float64_attention import assert_near, exact, random_qkv, random_segments, with_gradients
from jax.experimental.pallas import tpu as pltpu

from eabf_jax.model.attention import BACKENDS, with_window


@pytest.mark.parametrize(("packed", "window"), [(False, None), (True, None), (True, 40), (False, 130)])
def test_splash_is_exact_in_the_interpreter(packed: bool, window: int | None) -> None:
    """Pallas' interpreter runs the TPU kernel on grouped heads, with head size and length padded to 128."""
    qkv = random_qkv(150, 4, 2, 64, batch=1)
    segments = random_segments(150, batch=1) if packed else None
    d_out = np.random.default_rng(1).normal(size=qkv[0].shape).astype(np.float32)
    backend = BACKENDS["splash"] if window is None else with_window(BACKENDS["splash"], window)
    with pltpu.force_tpu_interpret_mode():
        values = with_gradients(backend, qkv, segments, d_out)
    assert_near(values, exact(*qkv, segments, d_out, window), 1e-5)
