"""Checks on training runs."""

import pytest

from eabf_jax.errors import InputError
from eabf_jax.training.trainer import train


def refuse(config, message):
    """Asserts that `train` refuses a configuration with a one-line error."""
    with pytest.raises(InputError, match=message) as error:
        train(config)
    assert "\n" not in str(error.value)
