"""Inverse frequencies of every rotary scheme, one pure function per rule.

A rule takes the head size, then `length` if its frequencies follow the current length, then its own parameters by
keyword, which are the scheme's parameters in a config file. It returns the inverse frequencies in radians per token,
float32 [head_dim // 2], and the rotation scale: the factor on cos and sin, 1.0 except for YaRN and LongRoPE. Values
known before tracing are computed in float64 and rounded once to float32. Every rule raises InputError for an odd head
size, or one below 2 (4 for the NTK-aware rules).

Arguments and notation, the same in every rule:
  head_dim: d, the size of an attention head, or of the part of it that is rotated; even.
  length: L, the current length in tokens, may be a traced integer; None, like any length up to c, changes nothing.
  base: b; 10,000 in LLaMA-2, larger in adjusted-base-frequency (ABF) models.
  factor: s, the target window over the pretrained window.
  pretrained_window: c, in tokens.
  j = 0 ... d/2 - 1 is the index of a frequency, and theta_j = b^(-2j/d).
"""

import math
from typing import TypeGuard

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Float64, Int

from eabf_jax.errors import InputError

Length = int | np.integer | Int[Array, ""] | None
Frequencies = Float32[Array, " head_dim//2"]

LLAMA2_BASE = 10_000.0


def default(head_dim: int, *, base: float = LLAMA2_BASE) -> tuple[Frequencies, float]:
    """Computes the frequencies of plain rotary embedding, theta_j.

    Source: Su et al. 2021 (RoFormer), section 3.4.2; base 500,000: Xiong et al. 2023, section 2.
    """
    return _rounded(_theta(head_dim, base)), 1.0


def pi(head_dim: int, *, base: float = LLAMA2_BASE, factor: float) -> tuple[Frequencies, float]:
    """Computes the frequencies of Position Interpolation, theta_j / s.

    Source: Chen et al. 2023; transformers rope type `linear`.
    """
    return _rounded(_theta(head_dim, base) / factor), 1.0


def ntk(head_dim: int, *, base: float = LLAMA2_BASE, factor: float) -> tuple[Frequencies, float]:
    """Computes the frequencies of static NTK-aware scaling, theta_j with base b * s^(d / (d - 2)).

    Source: Peng et al. 2023 (YaRN), section 3.1.
    """
    return _rounded(_theta(head_dim, ntk_base(head_dim, base, factor))), 1.0


def ntk_base(head_dim: int, base: float, factor: float) -> float:
    """Returns the base b * s^(d / (d - 2)), with which plain rotary embedding equals NTK-aware scaling.

    Source: Peng et al. 2023 (YaRN), section 3.1.
    """
    _check_head_dim(head_dim, at_least=4)
    return base * factor ** (head_dim / (head_dim - 2))


def dynamic_ntk(
    head_dim: int, length: Length, *, base: float = LLAMA2_BASE, factor: float = 1.0, pretrained_window: int
) -> tuple[Frequencies, float]:
    """Computes the frequencies of NTK-aware scaling that follows the length: base b * (s L/c - (s - 1))^(d / (d - 2)).

    Args:
      factor: s, how fast the base grows with the length; at 1.0 the term raised to the power is L/c.

    Source: transformers rope type `dynamic`.
    """
    _check_head_dim(head_dim, at_least=4)
    theta = _theta(head_dim, base)
    # The larger base is the plain one times a power, so theta_j splits into a static part and ratio^(-2j / (d - 2)).
    exponents = -2.0 * np.arange(head_dim // 2) / (head_dim - 2)
    if _is_static(length):
        excess = max((length or 0) - pretrained_window, 0)
        return _rounded(theta * (1.0 + factor * excess / pretrained_window) ** exponents), 1.0
    # s L/c - (s - 1) = 1 + s (L - c)/c; L - c is exact, and log1p avoids float32's loss of precision near 1.
    growth = jnp.log1p(_excess(length, pretrained_window) * np.float32(factor / pretrained_window))
    return _rounded(theta) * jnp.exp(_rounded(exponents) * growth), 1.0


def yarn(
    head_dim: int,
    *,
    base: float = LLAMA2_BASE,
    factor: float,
    pretrained_window: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
) -> tuple[Frequencies, float]:
    """Computes the frequencies and the rotation scale of YaRN; with `attention_factor` 1.0, of NTK-by-parts.

    A frequency that turns at least `beta_fast` times inside the pretrained window stays theta_j, and one that turns at
    most `beta_slow` times becomes theta_j / s. A linear ramp blends the frequencies in between.

    Args:
      truncate: whether the ramp's ends are rounded outwards to integer frequency indices.
      attention_factor: factor on cos and sin; None means 0.1 ln s + 1, or 1 if s is less than 1.

    Source: Peng et al. 2023 (YaRN), sections 3.2 to 3.4; transformers rope type `yarn`.
    """
    theta = _theta(head_dim, base)
    interpolated = _interpolated_share(head_dim, base, pretrained_window, beta_fast, beta_slow, truncate)
    scale = 0.1 * math.log(max(factor, 1.0)) + 1.0 if attention_factor is None else attention_factor
    return _rounded(theta * (1.0 - interpolated) + theta / factor * interpolated), scale


def dynamic_yarn(
    head_dim: int,
    length: Length,
    *,
    base: float = LLAMA2_BASE,
    factor: float = 1.0,
    pretrained_window: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> tuple[Frequencies, float | Float32[Array, ""]]:
    """Computes YaRN with s = max(1, L/c) for the current length L.

    Args:
      factor: largest extension that the user expects, for reports and export; it does not affect the frequencies.
      beta_fast, beta_slow, truncate: as for `yarn`.

    Returns:
      The inverse frequencies, and the rotation scale: a float, or a float32 scalar if length is traced.

    Source: Peng et al. 2023 (YaRN), section 3.3 (dynamic scaling) and appendix B.
    """
    if _is_static(length):
        stretch = max((length or 0) / pretrained_window, 1.0)
        return yarn(
            head_dim,
            base=base,
            factor=stretch,
            pretrained_window=pretrained_window,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
            truncate=truncate,
        )
    # theta_j (kept + (1 - kept)/s); kept is rounded to float32 before 1 - kept, so that s = 1 gives exactly theta_j.
    interpolated = _interpolated_share(head_dim, base, pretrained_window, beta_fast, beta_slow, truncate)
    kept = (1.0 - interpolated).astype(np.float32)
    excess = _excess(length, pretrained_window)
    shrink = pretrained_window / (excess + pretrained_window)
    scale = 1.0 + 0.1 * jnp.log1p(excess / pretrained_window)
    return _rounded(_theta(head_dim, base)) * (kept + (np.float32(1.0) - kept) * shrink), scale


def llama3(
    head_dim: int,
    *,
    base: float = LLAMA2_BASE,
    factor: float,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    pretrained_window: int,
) -> tuple[Frequencies, float]:
    """Computes the frequencies of Llama 3.1; each is kept, divided by s, or blended, depending on its wavelength.

    Args:
      factor: s, by which long wavelengths are stretched.
      low_freq_factor: wavelengths above c / low_freq_factor are fully stretched.
      high_freq_factor: wavelengths below c / high_freq_factor stay unchanged.

    Source: transformers rope type `llama3`.
    """
    theta = _theta(head_dim, base)
    turns = pretrained_window * theta / (2.0 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return _rounded(theta * kept + theta / factor * (1.0 - kept)), 1.0


def longrope(
    head_dim: int,
    length: Length,
    *,
    base: float = LLAMA2_BASE,
    factor: float,
    short_factor: tuple[float, ...],
    long_factor: tuple[float, ...],
    pretrained_window: int,
    attention_factor: float | None = None,
) -> tuple[Frequencies, float]:
    """Computes the frequencies of LongRoPE, theta_j divided by the j-th number of one of two lists.

    Args:
      factor: s, only for the default of `attention_factor`.
      short_factor: d/2 numbers for lengths up to c.
      long_factor: d/2 numbers for greater lengths.
      attention_factor: factor on cos and sin; None means sqrt(1 + ln s / ln c), or 1 if s is less than 1.

    Source: Ding et al. 2024 (LongRoPE), section 3; transformers rope type `longrope`.
    """
    theta = _theta(head_dim, base)
    if not len(short_factor) == len(long_factor) == head_dim // 2:
        raise InputError(
            f"LongRoPE's lists have {len(short_factor)} and {len(long_factor)} numbers; a head with {head_dim} rotated "
            f"dimensions needs {head_dim // 2} in each"
        )
    short, long = theta / np.array(short_factor), theta / np.array(long_factor)
    if attention_factor is None:
        attention_factor = math.sqrt(1.0 + math.log(max(factor, 1.0)) / math.log(pretrained_window))
    if _is_static(length):
        return _rounded(long if (length or 0) > pretrained_window else short), attention_factor
    return jnp.where(jnp.asarray(length) > pretrained_window, _rounded(long), _rounded(short)), attention_factor


def nope(head_dim: int) -> tuple[Frequencies, float]:
    """Returns zeros, with which nothing is rotated.

    Source: Kazemnejad et al. 2023 (no positional encoding).
    """
    _check_head_dim(head_dim, at_least=2)
    return jnp.zeros(head_dim // 2, jnp.float32), 1.0


def _theta(head_dim: int, base: float) -> Float64[np.ndarray, " head_dim//2"]:
    _check_head_dim(head_dim, at_least=2)
    return base ** (-2.0 * np.arange(head_dim // 2) / head_dim)


def _interpolated_share(
    head_dim: int, base: float, pretrained_window: int, beta_fast: float, beta_slow: float, truncate: bool
) -> Float64[np.ndarray, " head_dim//2"]:
    """Returns each frequency's share of interpolation: 0 for fast ones, 1 for slow ones, a linear ramp in j between."""

    def index_turning(turns: float) -> float:
        return head_dim * math.log(pretrained_window / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))

    low, high = index_turning(beta_fast), index_turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper clamp is d - 1, not d/2 - 1, as in the paper's code and transformers.
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)


def _excess(length: Length, pretrained_window: int) -> Float32[Array, ""]:
    """Returns the number of tokens past the pretrained window, at least 0; exact in float32 up to 2^24 tokens."""
    return jnp.maximum(jnp.asarray(length).astype(jnp.float32) - np.float32(pretrained_window), 0.0)


def _is_static(length: Length) -> TypeGuard[int | np.integer | None]:
    return length is None or isinstance(length, int | np.integer)


def _rounded(values: Float64[np.ndarray, " size"]) -> Float32[Array, " size"]:
    return jnp.asarray(values.astype(np.float32))


def _check_head_dim(head_dim: int, *, at_least: int) -> None:
    if not isinstance(head_dim, int | np.integer) or head_dim % 2 or head_dim < at_least:
        raise InputError(f"head_dim {head_dim!r}: rotary embedding here needs an even head size of at least {at_least}")
