"""Rotary schemes in the keys and tensors of GGUF files."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from eabf_jax import rope
from eabf_jax.errors import InputError, one_line
from eabf_jax.interop.gguf_architectures import (
    FACTORS,
    LOG_MULTIPLIER,
    LONG_FACTORS,
    RAMP,
    REMEDY,
    ROTARY_FACTORS,
    SHORT_FACTORS,
    TEMPERATURE,
    GgufArchitecture,
)
from eabf_jax.interop.gguf_file import COUNT, NUMBER, TEXT, GgufFile, Kind, dequantised, shortest, shown
from eabf_jax.reading import parse_json
from eabf_jax.rope import Scheme, compose, scheme
from eabf_jax.rope import logit_scale as logit_rules

# Window and bands of every Llama 3 release with rotary factors; GGUF stores only the factors.
LLAMA3_WINDOW, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0

# The keys of the rotary scheme in every architecture: the kind of each, and llama.cpp's default.
ROPE: Mapping[str, tuple[Kind, Any]] = {
    "rope.freq_base": (NUMBER, 10_000.0),
    "rope.scale_linear": (NUMBER, 0.0),
    "rope.scaling.type": (TEXT, "linear"),
    "rope.scaling.factor": (NUMBER, None),
    "rope.scaling.attn_factor": (NUMBER, 1.0),
    "rope.scaling.original_context_length": (COUNT, None),
    "rope.scaling.yarn_beta_fast": (NUMBER, 32.0),
    "rope.scaling.yarn_beta_slow": (NUMBER, 1.0),
    "rope.scaling.yarn_attn_factor": (NUMBER, None),
}
_SCALING = "rope.scaling."
_NOT_NEGATIVE = Kind("a number, at least 0", lambda value: NUMBER.fits(value) and value >= 0)

# YaRN's ramp in architectures for which llama.cpp does not read it from the file.
YARN_RAMP: Mapping[str, float] = {"beta_fast": 32.0, "beta_slow": 1.0}

# The scheme in our own terms, which `to_gguf` adds for the way back. Other programs do not read it.
OWN_ROPE = "eabf_jax.rope"

SCALING_TYPES = ("none", "linear", "yarn")
LONGROPE = "longrope"


def near(value: Any, expected: float) -> bool:
    """Returns whether a metadata value is a number that GGUF's float32 cannot tell from another one."""
    return NUMBER.fits(value) and math.isclose(value, expected, rel_tol=1e-6)


def rotary_keys(
    s: Scheme, rotary_dim: int, architecture: GgufArchitecture
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Writes a rotary scheme as llama.cpp reads it.

    A changed base, PI, YaRN, LongRoPE and the multiplier `llama4_temperature` have keys. Other frequencies become the
    numbers by which llama.cpp divides the plain ones, and a factor on cos and sin.

    Args:
      rotary_dim: number of rotated dimensions of each head.

    Returns:
      Keys below the prefix with their values, and tensors of factors by name, float32 [rotary_dim // 2].

    Raises:
      InputError: llama.cpp does not compute the scheme for this architecture.
    Source: llama.cpp, `llama_context`, `llama_model::get_rope_factors` and ggml's `rope_yarn`.
    """

    def lacks(what: str, but: str = "") -> InputError:
        return InputError(
            f"the rotary scheme {s.name!r} {what}, which llama.cpp cannot do for the architecture "
            f"{architecture.name!r}{but}: {REMEDY}"
        )

    keys: dict[str, Any] = {}
    multiplier, bound = dict(s.logit_multiplier.parameters), dict(s.frequencies.parameters)
    window = None  # of the multiplier; it shares a key with that of YaRN and LongRoPE
    if s.logit_multiplier.function is not logit_rules.none:
        stair = s.logit_multiplier.function is logit_rules.llama4_temperature and not multiplier["one_based"]
        if not stair or TEMPERATURE not in architecture.reads:
            but = "" if stair else " (it computes eabf_stair, for models with LLaMA's features)"
            raise lacks("multiplies the attention logits", but)
        window, beta = multiplier["pretrained_window"], multiplier["beta"]
        keys[TEMPERATURE] = 1.0 / math.log(window) if beta is None else float(beta)
        keys[f"{_SCALING}original_context_length"] = window
    plain = compose(s)
    written = rope.to_hf(plain, rotary_dim, spelling="rope_parameters")
    section = {} if rope.needs_remote_code(written) else written["rope_parameters"]
    kind, base = section.get("rope_type"), written["rope_parameters"]["rope_theta"]
    if plain.depends_on_length and kind != LONGROPE:
        raise lacks("follows the length of the text")
    keys["rope.freq_base"] = float(base)
    own = float(plain.rotation_scale())
    if kind == "linear":
        return {**keys, f"{_SCALING}type": "linear", f"{_SCALING}factor": float(section["factor"])}, {}
    tensors: dict[str, np.ndarray] = {}
    one_window = window in (None, bound.get("pretrained_window"))
    if kind == LONGROPE:
        if not one_window or LONG_FACTORS not in architecture.factors:
            raise lacks("has two lists of factors" + ", and another window for its multiplier" * (not one_window))
        keys |= {f"{_SCALING}type": LONGROPE, f"{_SCALING}original_context_length": bound["pretrained_window"]}
        for name, factors in ((LONG_FACTORS, bound["long_factor"]), (SHORT_FACTORS, bound["short_factor"])):
            tensors[name] = np.array(factors, np.float32)
    elif kind == "yarn" and one_window and bound["truncate"] and _has_ramp(bound, architecture):
        keys |= {f"{_SCALING}type": "yarn", f"{_SCALING}factor": float(bound["factor"])}
        keys[f"{_SCALING}original_context_length"] = bound["pretrained_window"]
        keys |= {key: bound[name] for key, name in zip(RAMP, YARN_RAMP, strict=True) if key in architecture.reads}
        own /= _yarn_magnitude(bound["factor"])
    elif kind != "default":
        names = [name for name in architecture.factors if name == ROTARY_FACTORS] or architecture.factors
        if not names:
            raise lacks("has frequencies of its own")
        usual = scheme("default", base=base).inverse_frequencies(rotary_dim)
        with np.errstate(divide="ignore"):  # infinite factors for numbers that are not rotated
            factors = np.asarray(usual) / np.asarray(plain.inverse_frequencies(rotary_dim))
        tensors = dict.fromkeys(names, factors)
    if own != 1.0:
        keys[f"{_SCALING}attn_factor"] = own
    return keys, tensors


def _has_ramp(bound: Mapping[str, Any], architecture: GgufArchitecture) -> bool:
    """Returns whether llama.cpp would compute the ramp of YaRN with these parameters."""
    return RAMP[0] in architecture.reads or all(bound[name] == value for name, value in YARN_RAMP.items())


def _yarn_magnitude(factor: float, growth: float = 1.0) -> float:
    """Returns YaRN's usual factor on cos and sin."""
    return 0.1 * growth * math.log(max(factor, 1.0)) + 1.0


def read_rope(file: GgufFile, architecture: GgufArchitecture, rotary_dim: int, context: int) -> Scheme:
    """Reads the rotary scheme of a file.

    Args:
      rotary_dim: number of rotated dimensions of each head.
      context: the context length in tokens.

    Raises:
      InputError: the keys and tensors are of no supported scheme, or of another one than the file's note says.
    """
    told = file.value(OWN_ROPE, TEXT, None)
    if told is not None:
        return _own_rope(file, told, architecture, rotary_dim)
    prefix = architecture.prefix
    values = {key: file.value(prefix + key, kind, default) for key, (kind, default) in ROPE.items()}
    values |= {key: shortest(value) for key, value in values.items() if type(value) is float}
    base, kind, factor, own, whole = (
        values[f"rope.{key}"]
        for key in ("freq_base", "scaling.type", "scaling.factor", "scaling.attn_factor", "scaling.yarn_attn_factor")
    )
    types = (*SCALING_TYPES, *([LONGROPE] if LONG_FACTORS in architecture.factors else []))
    if kind not in types:
        raise file.error(f"rope scaling type is {kind!r}, expected one of {', '.join(types)}")
    factor = values["rope.scale_linear"] if factor is None else factor
    if kind == "none" or factor == 0.0:
        factor = 1.0
    if factor < 0.0:
        raise file.error(f"rope scaling factor is {factor}, expected a number above 0")
    yarn = kind == "yarn" and factor != 1.0
    # llama.cpp multiplies cos and sin by this and by attn_factor, and ignores yarn_attn_factor. Other programs store
    # there the product of both (Hugging Face's attention_factor), so one file can mean two models.
    growth = file.value(prefix + LOG_MULTIPLIER, _NOT_NEGATIVE, 0.0) if LOG_MULTIPLIER in architecture.reads else 0.0
    magnitude = _yarn_magnitude(factor) / _yarn_magnitude(factor, growth) if yarn else 1.0
    if whole is not None and not near(whole, magnitude):
        raise file.error(
            f"{prefix}rope.scaling.yarn_attn_factor is {whole}, expected none or {magnitude:.7g}, which follows from "
            "the factor: programs disagree on the meaning of other values; set rope.scaling.attn_factor instead"
        )
    lists = kind == LONGROPE or any(name in file.tensors for name in (LONG_FACTORS, SHORT_FACTORS))
    if not (yarn or lists) and own != 1.0:
        raise file.error(f"{prefix}rope.scaling.attn_factor is {own}, expected 1.0: only YaRN scales cos and sin")
    window = values["rope.scaling.original_context_length"] or context
    tensor = LONG_FACTORS if lists else ROTARY_FACTORS
    if tensor in file.tensors and factor != 1.0:
        raise file.error(f"rope scaling factor is {factor}, but there is {tensor} too; expected only one")
    if lists:
        found = _longrope(file, base, window, context, own)
    elif ROTARY_FACTORS in file.tensors:
        found = _llama3_rope(file, base, rotary_dim)
    elif yarn:
        found = scheme(
            "yarn",
            base=base,
            factor=factor,
            pretrained_window=window,
            beta_fast=values["rope.scaling.yarn_beta_fast"],
            beta_slow=values["rope.scaling.yarn_beta_slow"],
            attention_factor=None if own == 1.0 and not growth else own * magnitude,
        )
    else:
        found = scheme("default", base=base) if factor == 1.0 else scheme("pi", base=base, factor=factor)
    beta = shortest(file.value(prefix + TEMPERATURE, NUMBER, 0.0)) if TEMPERATURE in architecture.reads else 0.0
    if beta == 0.0:
        return found
    stair = {} if near(beta, 1.0 / math.log(max(window, 2))) else {"beta": beta}
    return compose(found, {"type": "llama4_temperature", "pretrained_window": window, **stair})


def _own_rope(file: GgufFile, told: str, architecture: GgufArchitecture, rotary_dim: int) -> Scheme:
    """Reads the scheme that `to_gguf` noted, and compares it with the keys and tensors that llama.cpp reads."""
    try:
        found = Scheme.from_dict(parse_json(told, OWN_ROPE))
        keys, tensors = rotary_keys(found, rotary_dim, architecture)
    except ValueError as error:
        raise file.error(f"{OWN_ROPE} is {shown(told)}, expected a rotary scheme: {one_line(error)}") from error
    prefix = architecture.prefix
    names = {*ROPE, *(key for key in (TEMPERATURE, LOG_MULTIPLIER) if key in architecture.reads)}
    stored = {key: file.metadata[prefix + key] for key in names if prefix + key in file.metadata}
    rounded = {key: float(np.float32(value)) if type(value) is float else value for key, value in keys.items()}
    there = {name: dequantised(file, name).reshape(-1) for name in FACTORS if name in file.tensors}
    same = there.keys() == tensors.keys() and all(np.allclose(there[name], tensors[name], rtol=1e-6) for name in there)
    if stored != rounded or not same:
        raise file.error(
            f"{OWN_ROPE} is {shown(told)}, but the keys under {prefix}rope. or {ROTARY_FACTORS} are of another scheme; "
            f"expected the same one: remove {OWN_ROPE} to read the others"
        )
    return found


def _longrope(file: GgufFile, base: float, window: int, context: int, own: float) -> Scheme:
    """Reads LongRoPE's two lists; `own` is the factor on cos and sin."""
    lists = {}
    for name, tensor in (("long_factor", LONG_FACTORS), ("short_factor", SHORT_FACTORS)):
        if tensor not in file.tensors:
            raise file.error(f"tensor {tensor} is missing; LongRoPE needs it")
        lists[name] = tuple(map(shortest, dequantised(file, tensor).reshape(-1)))
    found = scheme("longrope", base=base, factor=context / window, pretrained_window=window, **lists)
    if near(own, float(found.rotation_scale())):
        return found
    return scheme("longrope", **{**dict(found.frequencies.parameters), "attention_factor": own})


def _llama3_rope(file: GgufFile, base: float, rotary_dim: int) -> Scheme:
    """Finds the Llama 3 scheme that divides each frequency by the stored factor."""
    factors = dequantised(file, ROTARY_FACTORS).reshape(-1)
    found = scheme(
        "llama3",
        base=base,
        factor=shortest(factors.max()),
        low_freq_factor=LLAMA3_LOW,
        high_freq_factor=LLAMA3_HIGH,
        pretrained_window=LLAMA3_WINDOW,
    )
    plain = np.asarray(scheme("default", base=base).inverse_frequencies(rotary_dim))
    expected = plain / np.asarray(found.inverse_frequencies(rotary_dim))
    # Both are float32 quotients, so matching factors agree to a few units in the last place.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise file.error(f"{ROTARY_FACTORS} holds factors that are not Llama 3's; no supported scheme has them")
    return found
