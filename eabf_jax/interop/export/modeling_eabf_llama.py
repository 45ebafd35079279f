"""LLaMA with rotary schemes that transformers has no name for: entropy-aware logits, dynamic YaRN, compositions.

This file lies beside the weights and needs torch and transformers (4.46 or later) only; load with
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`. The scheme is `eabf_scheme` in config.json.

The model is transformers' own LLaMA. Two things are hooked into its attention, so that every attention implementation
and every cache work: the entropy-aware multiplier is applied to the query's projection (which commutes with the
rotation), and for schemes whose frequencies follow the current length, keys are cached unrotated and the whole cache is
rotated at every step with the frequencies of the length reached. In those schemes the hidden states of earlier tokens
stay as they were computed, at the length of that time; only a forward pass without a cache would compute them anew.
"""

import inspect
import math
from functools import partial

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, rotate_half

KNOWN_RELEASES = "4.46 to 5.24"

# What attention calls its cache: from 5.24 on, since 4.56, and before.
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value")


class EabfLlamaConfig(LlamaConfig):
    """A LlamaConfig with `eabf_scheme`: the rotary scheme as {"type": name, parameter: value, ...}."""

    model_type = "eabf_llama"


# Rules of frequencies: head_dim, then `lengths` (float64 [batch, 1] on the CPU, tokens in each row) if they follow it,
# then the parameters by keyword. Each returns float64 inverse frequencies [batch or 1, head_dim // 2] and the factor on
# cos and sin, a float or float64 [batch, 1].


def _theta(head_dim, base):
    return torch.tensor([[base ** (-2.0 * j / head_dim) for j in range(head_dim // 2)]], dtype=torch.float64)


def _default(head_dim, *, base):
    return _theta(head_dim, base), 1.0


def _pi(head_dim, *, base, factor):
    return _theta(head_dim, base) / factor, 1.0


def _ntk(head_dim, *, base, factor):
    return _theta(head_dim, base * factor ** (head_dim / (head_dim - 2))), 1.0


def _dynamic_ntk(head_dim, lengths, *, base, factor, pretrained_window):
    growth = 1.0 + factor * (lengths - pretrained_window).clamp(min=0.0) / pretrained_window
    exponents = torch.arange(head_dim // 2, dtype=torch.float64) * (-2.0 / (head_dim - 2))
    return _theta(head_dim, base) * growth**exponents, 1.0


def _llama3(head_dim, *, base, factor, low_freq_factor, high_freq_factor, pretrained_window):
    theta = _theta(head_dim, base)
    turns = pretrained_window * theta / (2.0 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0)
    return theta * kept + theta / factor * (1.0 - kept), 1.0


def _ntk_by_parts(head_dim, *, base, factor, pretrained_window, beta_fast, beta_slow, truncate=True):
    def index_turning(turns):
        return head_dim * math.log(pretrained_window / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))

    low, high = index_turning(beta_fast), index_turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)
    share = ramp.clamp(0.0, 1.0)
    theta = _theta(head_dim, base)
    return theta * (1.0 - share) + theta / factor * share, 1.0


def _yarn(head_dim, *, factor, attention_factor=None, **parameters):
    scale = 0.1 * math.log(max(factor, 1.0)) + 1.0 if attention_factor is None else attention_factor
    return _ntk_by_parts(head_dim, factor=factor, **parameters)[0], scale


def _dynamic_yarn(head_dim, lengths, *, factor, pretrained_window, **parameters):
    stretch = (lengths / pretrained_window).clamp(min=1.0)
    frequencies, _ = _ntk_by_parts(head_dim, factor=stretch, pretrained_window=pretrained_window, **parameters)
    return frequencies, 0.1 * torch.log(stretch) + 1.0


# Rules of the logits' multiplier: int positions [batch, length] from 0, the layer's index, then the parameters by
# keyword. Each returns float32 [batch, length], or None where the multiplier is 1 everywhere.


def _none(position_ids, layer):
    return None


def _entropy_aware(position_ids, layer, *, pretrained_window, unscaled_layers=2):
    if layer < unscaled_layers:
        return None
    # ln i / ln c = 1 + ln(1 + (i - c) / c) / ln c for the 1-based position i; exactly 1 inside the window.
    excess = (position_ids.float() - (pretrained_window - 1)).clamp(min=0.0)
    return 1.0 + torch.log1p(excess / pretrained_window) / math.log(pretrained_window)


_BY_PARTS = ("base", "factor", "pretrained_window", "beta_fast", "beta_slow", "truncate")

# What this file can compute: for each type its rule and its parameters. Anything else in config.json is an error.
FREQUENCIES = {
    "default": (_default, ("base",)),
    "abf": (_default, ("base",)),
    "pi": (_pi, ("base", "factor")),
    "ntk": (_ntk, ("base", "factor")),
    "dynamic_ntk": (_dynamic_ntk, ("base", "factor", "pretrained_window")),
    "ntk_by_parts": (_ntk_by_parts, _BY_PARTS),
    "yarn": (_yarn, (*_BY_PARTS, "attention_factor")),
    "dynamic_yarn": (_dynamic_yarn, _BY_PARTS),
    "llama3": (_llama3, ("base", "factor", "low_freq_factor", "high_freq_factor", "pretrained_window")),
}
LOGIT_SCALES = {
    "none": (_none, ()),
    "entropy_aware": (_entropy_aware, ("pretrained_window", "unscaled_layers")),
    "eabf": (_entropy_aware, ("pretrained_window", "unscaled_layers")),
}


def rules(scheme):
    """Finds the rules of a scheme.

    Args:
      scheme: {"type": name, parameter: value, ...}.

    Returns:
      The rule of the frequencies and the rule of the logits' multiplier, their parameters bound.

    Raises:
      ValueError: a type or a parameter that this file does not know.
    """
    values = dict(scheme)
    kind = values.pop("type", None)
    if kind == "eabf":
        frequencies = {"type": "default", "base": values.pop("base")}
        return _bound(FREQUENCIES, "type", frequencies), _bound(LOGIT_SCALES, "logit_scale", {"type": kind, **values})
    if kind != "compose":
        return _bound(FREQUENCIES, "type", scheme), _none
    frequencies, logit_scale = values.pop("frequencies"), values.pop("logit_scale", None) or {"type": "none"}
    if values:
        raise ValueError(f"config.json: eabf_scheme 'compose' has no parameter {', '.join(values)}")
    return rules(frequencies)[0], _bound(LOGIT_SCALES, "logit_scale", logit_scale)


def _bound(table, what, values):
    parameters = dict(values)
    kind = parameters.pop("type", None)
    if kind not in table:
        raise ValueError(
            f"config.json: eabf_scheme has the {what} {kind!r}; this modeling_eabf_llama.py knows {', '.join(table)}"
        )
    rule, known = table[kind]
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise ValueError(f"config.json: eabf_scheme {kind!r} has no parameter {', '.join(unknown)}")
    return partial(rule, **parameters)


class EabfRotaryEmbedding(nn.Module):
    """Cosines and sines of a scheme; the tuple also carries the positions on to the attention hooks.

    Holds no buffers: transformers builds models without memory first, where a buffer's values would be lost.
    """

    def __init__(self, config):
        super().__init__()
        self.frequencies, self.logit_scale = rules(config.eabf_scheme)
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.follows_length = "lengths" in inspect.signature(self.frequencies).parameters

    def tables(self, positions, lengths, dtype):
        """Cosines and sines [batch, length, head_dim] of int positions [batch, length]."""
        given = (lengths.to("cpu", torch.float64),) if self.follows_length else ()
        frequencies, scale = self.frequencies(self.head_dim, *given)
        frequencies = frequencies.to(positions.device, torch.float32)
        scale = torch.as_tensor(scale, dtype=torch.float32).reshape(-1, 1).to(positions.device)
        angles = positions[..., None].float() * frequencies[:, None, :]
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scale[:, None]).to(dtype), (angles.sin() * scale[:, None]).to(dtype)

    @torch.no_grad()
    def forward(self, x, position_ids):
        if not self.follows_length:
            return *self.tables(position_ids, None, x.dtype), position_ids, None
        _refuse_packed(position_ids)
        lengths = position_ids.max(dim=1, keepdim=True).values + 1
        return *self.tables(position_ids, lengths, x.dtype), position_ids, lengths


def _refuse_packed(position_ids):
    """Raises where a row holds several texts, each of which would need frequencies of its own."""
    starts = (position_ids[:, :-1] == 0) & (position_ids[:, 1:] == 1)
    if starts.shape[1] and starts.sum(dim=1).max() > 1:
        raise ValueError("the frequencies follow the length of the text: give each text a row of its own, not packed")


class _RotatingCache:
    """Stands in for a cache during one attention call: it stores unrotated keys and hands out rotated ones."""

    def __init__(self, cache, rotary, position_ids, lengths):
        self.cache, self.rotary, self.position_ids, self.lengths = cache, rotary, position_ids, lengths
        self.updated = False

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.updated = True
        # A copy: a static cache counts in place, in the tensor that it gives.
        past = torch.as_tensor(self.cache.get_seq_length(layer_idx)).clone()
        keys, values = self.cache.update(keys, values, layer_idx, *args, **kwargs)
        # Earlier tokens are the ones just before the first new one; where that is padding, the mask hides it. A static
        # cache has room at its end, hidden by the mask too.
        index = torch.arange(keys.shape[2], device=keys.device) - past.to(keys.device)
        last = self.position_ids.shape[1] - 1
        new = (index >= 0) & (index <= last)
        positions = torch.where(new, self.position_ids[:, index.clamp(0, last)], self.position_ids[:, :1] + index)
        cos, sin = self.rotary.tables(positions, self.lengths, keys.dtype)
        return _rotate(keys, cos[:, None], sin[:, None]), values


def _rotate(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def _require(holds, expected):
    """Raises unless transformers does what these hooks rely on; going on would give other logits."""
    if not holds:
        raise RuntimeError(
            f"modeling_eabf_llama.py does not fit transformers {transformers.__version__}: expected {expected}. "
            f"Releases {KNOWN_RELEASES} are known to work."
        )


class _Call:
    """What the projections' hooks do in one attention call, and which of them have still to do it."""

    def __init__(self, multiplier, rotation, head_dim, rotates_keys):
        self.multiplier, self.rotation, self.head_dim = multiplier, rotation, head_dim
        self.rotates_keys = rotates_keys
        self.query_is_due = multiplier is not None or rotation is not None
        self.key_is_due = rotates_keys
        self.cache = None

    def rotate(self, x):
        cos, sin = self.rotation
        heads = x.view(*x.shape[:-1], -1, self.head_dim)
        return _rotate(heads, cos[:, :, None], sin[:, :, None]).view(x.shape)


def _before_attention(rotary, argument_names, module, args, kwargs):
    """Prepares one attention call: what its projections will do, and what transformers' code will see."""
    kwargs = {**dict(zip(argument_names, args)), **kwargs}  # noqa: B905 - `strict` needs Python 3.10
    embeddings = kwargs.get("position_embeddings")
    _require(
        isinstance(embeddings, tuple) and len(embeddings) == 4,
        "attention to be given position_embeddings, the tuple that model.rotary_emb returns",
    )
    cos, sin, position_ids, lengths = embeddings
    multiplier = rotary.logit_scale(position_ids, module.layer_idx)
    call = _Call(multiplier, None, module.head_dim, False)
    if rotary.follows_length:
        given = [name for name in CACHE_ARGUMENTS if kwargs.get(name) is not None]
        _require(
            len(given) == 1 or not (given or kwargs.get("use_cache")),
            f"a cache in one of attention's arguments {', '.join(CACHE_ARGUMENTS)}, found {given or 'none'}",
        )
        call = _Call(multiplier, (cos, sin), module.head_dim, not given)
        if given:
            cache = kwargs[given[0]]
            _require(isinstance(cache, Cache), f"a transformers Cache, found {type(cache).__name__}")
            call.cache = kwargs[given[0]] = _RotatingCache(cache, rotary, position_ids, lengths)
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    kwargs["position_embeddings"] = (cos, sin)
    # Quantisation and adapters put other modules in the projections' places after this model was built.
    _hook(module)
    module.q_proj.eabf_call = module.k_proj.eabf_call = call
    return (), kwargs


def _after_attention(module, args, output):
    """Checks that every part of the scheme was applied, and gives the real cache back (before transformers 4.48)."""
    call = module.q_proj.eabf_call
    module.q_proj.eabf_call = module.k_proj.eabf_call = None
    _require(not call.query_is_due, "attention to call its q_proj")
    _require(not call.key_is_due, "attention to call its k_proj")
    _require(call.cache is None or call.cache.updated, "attention to call the update of the cache that it is given")
    if isinstance(output, tuple) and isinstance(output[-1], _RotatingCache):
        return (*output[:-1], output[-1].cache)
    return output


def _after_query(projection, args, query):
    call = projection.eabf_call
    if call is None:
        return query
    call.query_is_due = False
    if call.rotation is not None:
        query = call.rotate(query)
    if call.multiplier is not None:
        # The positions may have one row for the whole batch.
        query = (query * call.multiplier[..., None].to(query.device)).to(query.dtype)
    return query


def _after_key(projection, args, key):
    call = projection.eabf_call
    if call is None or not call.rotates_keys:
        return key
    call.key_is_due = False
    return call.rotate(key)


def _hook(attention):
    """Puts the hooks on the projections, unless these very modules have them."""
    for name, hook in (("q_proj", _after_query), ("k_proj", _after_key)):
        projection = getattr(attention, name, None)
        _require(isinstance(projection, nn.Module), f"attention with a projection {name}")
        if "eabf_call" not in projection.__dict__:
            projection.eabf_call = None
            projection.register_forward_hook(hook)


def _equip(model):
    """Gives a LlamaModel its rotary scheme."""
    _require(hasattr(model, "rotary_emb"), "a LlamaModel with a rotary_emb")
    model.rotary_emb = EabfRotaryEmbedding(model.config)
    for layer in model.layers:
        attention = layer.self_attn
        names = list(inspect.signature(attention.forward).parameters)
        if model.rotary_emb.follows_length:
            _require(
                any(name in names for name in CACHE_ARGUMENTS),
                f"attention with an argument {' or '.join(CACHE_ARGUMENTS)}, found {', '.join(names)}",
            )
        _hook(attention)
        attention.register_forward_pre_hook(partial(_before_attention, model.rotary_emb, names), with_kwargs=True)
        attention.register_forward_hook(_after_attention)


class EabfLlamaModel(LlamaModel):
    """The decoder without its output projection."""

    config_class = EabfLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        _equip(self)


class EabfLlamaForCausalLM(LlamaForCausalLM):
    """The language model."""

    config_class = EabfLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        _equip(self.model)
