"""Rotary schemes in Hugging Face's config.json; `named.py` has the spelling of each."""

import math
from collections.abc import Mapping
from typing import Any

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.fields import typed
from eabf_jax.rope import logit_scale as logit_rules
from eabf_jax.rope.frequencies import LLAMA2_BASE
from eabf_jax.rope.registry import entries, hf_readers
from eabf_jax.rope.schemes import Scheme, compose, scheme

HF_SPELLINGS = ("rope_scaling", "rope_parameters")
OWN_KEY = "eabf_scheme"

# The architecture of transformers that is LLaMA with the multiplier `llama4_temperature`, and its keys in the section.
TEMPERATURE_MODEL = "ministral3"
# Architectures for which transformers takes only some kinds of scaling.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {"phi3": ("default", "longrope")}
TEMPERATURE_KEY = "llama_4_scaling_beta"
WINDOW_KEY = "original_max_position_embeddings"
# The same multiplier outside the section: the only place where vLLM 0.33 looks for it. transformers ignores it.
VLLM_TEMPERATURE_KEY = "llama_4_scaling"


def from_hf(config: Mapping[str, Any]) -> Scheme:
    """Reads the rotary scheme of a Hugging Face config.json.

    Our own key `eabf_scheme` is read first, then either spelling: `rope_theta` beside `rope_scaling` (whose kind is
    under `rope_type` or `type`), or `rope_parameters` with `rope_theta` inside. As in transformers, `rope_scaling` goes
    first where both have content, a missing base is 10,000, and keys that the kind does not use are ignored. YaRN with
    an attention factor of 1.0 is `ntk_by_parts`; `su` is `longrope`, and `ministral3` has a multiplier.

    Args:
      config: the whole config.json; `dynamic` needs its `max_position_embeddings`, and `yarn`, `longrope` and `llama3`
        fall back on it if there is no `original_max_position_embeddings`.

    Raises:
      InputError: a kind of scaling or a setting that no scheme here can represent, or a missing or invalid value.
    Source: transformers, `modeling_rope_utils.py`.
    """
    own = config.get(OWN_KEY)
    if own is not None:
        return Scheme.from_dict(own)
    section = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(section, Mapping):
        raise InputError(f"config.json: rope_scaling must be an object or null, found {section!r}")
    _refuse_unrepresentable(config, section)
    kind = section.get("rope_type") or section.get("type") or "default"
    if kind == "su" or (kind == "yarn" and config.get("model_type") == "phi3"):  # names in Phi-3's first releases
        kind = "longrope"
    readers = hf_readers()
    if not isinstance(kind, str) or kind not in readers:
        raise InputError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(readers)}")
    bases = (section.get("rope_theta"), config.get("rope_theta"), LLAMA2_BASE)
    hf = entries()[readers[kind]].hf
    assert hf is not None and hf.read is not None  # `hf_readers` lists no others
    base = next(base for base in bases if base is not None)
    # `compose` finds the name of the result: YaRN with attention factor 1.0 becomes ntk_by_parts.
    return compose(scheme(readers[kind], base=base, **hf.read(config, section)), _read_multiplier(config, section))


def to_hf(
    s: Scheme, head_dim: int | None = None, spelling: str = "rope_scaling", model_type: str = "llama"
) -> dict[str, Any]:
    """Writes a rotary scheme as keys of a Hugging Face config.json.

    What transformers can express becomes its own keys: `default` and `abf` a base, `pi` linear, `dynamic_ntk` dynamic,
    `ntk_by_parts` yarn with attention factor 1.0, `yarn`, `longrope`, `llama3`, and `ntk` (given `head_dim`) a changed
    base. With the model type `ministral3`, schemes with its multiplier do, such as `eabf_stair`. Everything else keeps
    its base and adds `eabf_scheme`: transformers then needs our exported model code (`needs_remote_code`), and that
    code needs the data of `exported.py` beside these keys.

    Where transformers derives the scheme from `max_position_embeddings`, that key is returned too and must go into the
    file. `dynamic` takes the pretrained window from it, in every release. For yarn it is the extended window: releases
    4.51 to 4.55 take the factor as its ratio to `original_max_position_embeddings` (later ones take `factor`). Up to
    4.50, `original_max_position_embeddings` is not read and the ramp is laid over the extended window: a yarn export
    needs transformers 4.51 or later, and so does a longrope export, whose frequencies older releases keep at every
    length. `truncate` false is written for the releases that read it; older ones round.

    Args:
      head_dim: size of an attention head; only `ntk` depends on it.
      spelling: "rope_scaling" (read by every transformers release) or "rope_parameters" (5.x only).
      model_type: the architecture that the file will name.

    Returns:
      Keys and values that replace all rotary keys in config.json.

    Raises:
      InputError: unknown spelling, or a head_dim that does not suit the scheme.
    """
    if spelling not in HF_SPELLINGS:
        raise unknown_name("spelling of the rotary scheme", spelling, HF_SPELLINGS)
    parameters = dict(s.frequencies.parameters)
    base = parameters.get("base", LLAMA2_BASE)
    section: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    outer = {OWN_KEY: s.to_dict()}
    hf = next((e.hf for e in entries().values() if e.hf and e.frequencies is s.frequencies.function), None)
    if hf and hf.rope_type not in ROPE_TYPES.get(model_type, (hf.rope_type,)):
        hf = None
    spelled = hf.write(parameters, head_dim) if hf else None
    multiplier = _written_multiplier(s, spelled[0], model_type) if spelled else None
    if hf and spelled and multiplier is not None:
        section |= {"rope_type": hf.rope_type} | spelled[0] | multiplier
        outer = spelled[1]
        if multiplier:
            served = {WINDOW_KEY: multiplier[WINDOW_KEY], "beta": multiplier[TEMPERATURE_KEY]}
            outer = {**outer, VLLM_TEMPERATURE_KEY: served}
    if spelling == "rope_parameters":
        return {"rope_parameters": section} | outer
    base = section.pop("rope_theta")
    return {"rope_theta": base, "rope_scaling": None if section == {"rope_type": "default"} else section} | outer


def needs_remote_code(keys: Mapping[str, Any]) -> bool:
    """Returns whether a config, or a result of `to_hf`, names a scheme for which transformers needs our code."""
    return keys.get(OWN_KEY) is not None


def _refuse_unrepresentable(config: Mapping[str, Any], section: Mapping[str, Any]) -> None:
    partial = section.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and typed(float, partial, "config.json: key", "partial_rotary_factor") != 1:
        raise InputError(f"config.json: partial_rotary_factor must be 1 (the whole head is rotated), found {partial!r}")
    for name, value in section.items():
        if isinstance(value, Mapping):
            raise InputError(f"config.json: one rotary scheme for all layers is supported, found one for {name!r}")


def _read_multiplier(config: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the multiplier of a config for `compose`, or None for an architecture without one."""
    if config.get("model_type") != TEMPERATURE_MODEL:
        return None
    for key in (TEMPERATURE_KEY, WINDOW_KEY):
        if section.get(key) is None:
            raise InputError(f"config.json: {key!r} is missing in rope_parameters; {TEMPERATURE_MODEL} needs it")
    window = typed(int, section[WINDOW_KEY], "config.json: key", WINDOW_KEY)
    beta = section[TEMPERATURE_KEY]
    given = {} if window > 1 and beta == 1.0 / math.log(window) else {"beta": beta}
    return {"type": "llama4_temperature", "pretrained_window": window, **given}


def _written_multiplier(s: Scheme, section: Mapping[str, Any], model_type: str) -> dict[str, Any] | None:
    """Returns the keys of a scheme's multiplier beside those of its frequencies, or None if there are no such keys."""
    parameters = dict(s.logit_multiplier.parameters)
    if model_type != TEMPERATURE_MODEL:
        return {} if s.logit_multiplier.function is logit_rules.none else None
    if s.logit_multiplier.function is not logit_rules.llama4_temperature or parameters["one_based"]:
        return None
    window, beta = parameters["pretrained_window"], parameters["beta"]
    if section.get(WINDOW_KEY, window) != window:
        return None
    return {TEMPERATURE_KEY: 1.0 / math.log(window) if beta is None else beta, WINDOW_KEY: window}
