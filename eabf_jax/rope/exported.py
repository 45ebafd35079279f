"""The data of a scheme that the modeling file of an exported model needs: `eabf_rotary` in its config.json.

The modeling file has formulas for rules that hold at any length: frequencies that follow the length, and the
multipliers `entropy_aware` and `layer_temperature`. All other rules become numbers, so that any registered scheme can
be exported.
"""

import base64
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eabf_jax.errors import InputError
from eabf_jax.rope import frequencies as frequency_rules
from eabf_jax.rope import logit_scale as logit_rules
from eabf_jax.rope.schemes import Rule, Scheme

DATA_KEY = "eabf_rotary"

# Rules that the modeling file computes itself, under these names and with the same parameters.
FORMULAS: Mapping[Callable[..., Any], str] = {
    rule: rule.__name__
    for rule in (
        *(frequency_rules.dynamic_ntk, frequency_rules.dynamic_yarn),
        *(logit_rules.none, logit_rules.entropy_aware, logit_rules.layer_temperature),
    )
}

# Relative tolerance of the comparison, because the device that recomputes the tables may round differently.
_SAME = 1e-5


def exported_data(s: Scheme, head_dim: int, num_layers: int, window: int) -> dict[str, Any]:
    """Describes a scheme to the exported modeling file.

    Args:
      window: length of the tables in tokens; the modeling file refuses longer texts.

    Returns:
      `scheme`, the scheme as a dictionary, which the file compares with `eabf_scheme`; `frequencies` and `logit_scale`,
      each with its `kind`, and a formula's parameters or numbers.
    """
    return {
        "scheme": s.to_dict(),
        "frequencies": _formula(s.frequencies) or _frequencies(s, head_dim, window),
        "logit_scale": _formula(s.logit_multiplier) or _multipliers(s, num_layers, window),
    }


def check_exported(found: Any, s: Scheme, head_dim: int, num_layers: int, window: int) -> None:
    """Refuses exported data that differ from the scheme's, because transformers would compute other logits.

    Args:
      found: `eabf_rotary` of a config.json.
      s: the scheme that the same file names.
      head_dim, num_layers, window: as for `exported_data`.

    Raises:
      InputError: they differ.
    """
    for part, expected in exported_data(s, head_dim, num_layers, window).items():
        if not isinstance(found, Mapping) or not _same(found.get(part), expected):
            raise InputError(
                f"config.json: {part!r} in {DATA_KEY} is not what the scheme {s.name!r} computes: the file was edited "
                "or the scheme has changed since the export; export the model again"
            )


def _formula(rule: Rule) -> dict[str, Any] | None:
    return {"kind": FORMULAS[rule.function], **dict(rule.parameters)} if rule.function in FORMULAS else None


def _frequencies(s: Scheme, head_dim: int, window: int) -> dict[str, Any]:
    if not s.depends_on_length:
        values = np.asarray(s.inverse_frequencies(head_dim)).tolist()
        return {"kind": "fixed", "inverse_frequencies": values, "rotation_scale": float(s.rotation_scale())}

    def row(length: jax.Array) -> jax.Array:
        scale = jnp.asarray(s.rotation_scale(length), jnp.float32)
        return jnp.append(s.inverse_frequencies(head_dim, length), scale)

    return {"kind": "by_length", "end": window, "table": _packed(jax.vmap(row)(jnp.arange(1, window + 1)))}


def _multipliers(s: Scheme, num_layers: int, window: int) -> dict[str, Any]:
    positions = jnp.arange(window)
    rows = jax.lax.map(lambda layer: s.logit_scale(positions, layer), jnp.arange(num_layers))
    rows, row_of_layer = np.unique(np.asarray(rows), axis=0, return_inverse=True)
    return {
        "kind": "by_position",
        "end": window,
        "row_of_layer": row_of_layer.reshape(-1).tolist(),
        "table": _packed(rows),
    }


def _packed(values: Any) -> str:
    return base64.b64encode(zlib.compress(np.asarray(values, "<f4").tobytes())).decode()


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Mapping):
        return (
            isinstance(found, Mapping)
            and found.keys() == expected.keys()
            and all(_same(_unpacked(key, found[key]), _unpacked(key, value)) for key, value in expected.items())
        )
    try:
        first, second = (np.asarray(value, np.float64) for value in (found, expected))
    except (TypeError, ValueError):
        return isinstance(found, str) and isinstance(expected, str) and found == expected
    return first.shape == second.shape and np.allclose(first, second, rtol=_SAME, atol=0)


def _unpacked(key: str, value: Any) -> Any:
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(value)), "<f4") if key == "table" else value
    except (TypeError, ValueError, zlib.error):
        return value
