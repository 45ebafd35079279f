"""Models of the LLaMA family with rotary schemes that transformers lacks, such as entropy-aware logits.

This file lies beside the weights and needs only torch and transformers (4.46 or later). Load the model with
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`. config.json has the scheme by name, as
`eabf_scheme`, and as data, as `eabf_rotary`. This file uses the data: the frequencies and the multiplier of the
attention logits, each given as numbers or as one of the formulas below. `eabf_features` has what the model's
architecture (Qwen, Mistral, ...) has beyond LLaMA.

The model is transformers' LLaMA except for those features, and for attention's forward pass, which multiplies the query
just before it is compared with the keys. If the frequencies follow the current length, the cache holds unrotated keys,
and every step rotates all of them with the frequencies of that length. The hidden states of earlier tokens stay as they
were computed, at an earlier length; only a forward pass without a cache recomputes them.
"""

import base64
import inspect
import math
import zlib
from collections import namedtuple
from functools import lru_cache, partial

import numpy as np
import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    repeat_kv,
    rotate_half,
)

KNOWN_RELEASES = "4.46 to 5.24"

# Names of attention's cache argument: from 5.24 on, from 4.56 on, and before.
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value")
# The other arguments of attention in any known release.
ARGUMENTS = {
    *("self", "hidden_states", "position_embeddings", "attention_mask", "position_ids", "cache_position"),
    *("output_attentions", "use_cache", "kwargs"),
}
# Releases from 4.48 on have a registry of attention functions, and their attention does not return the cache.
HAS_REGISTRY = hasattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS")
# Older releases (5.0 does, 5.12 does not) pass a cache the places and rotations of new keys in this argument.
CACHE_TAKES_KWARGS = "cache_kwargs" in inspect.signature(Cache.update).parameters
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


class EabfLlamaConfig(LlamaConfig):
    """A LlamaConfig with the rotary scheme by name (`eabf_scheme`) and as data (`eabf_rotary`), and `eabf_features`."""

    model_type = "eabf_llama"


# What `eabf_features` may have, and the values of LLaMA. `family` is the model_type that the model came as.
FEATURES = {
    "family": "llama",
    "attention_output_bias": None,  # as attention_bias
    "qk_norm": None,  # "head", or "full" for all heads together
    "post_norm": False,
    "partial_rotary_factor": 1.0,
    "unrotated_layers": (),
    "sliding_window": None,
    "full_attention_layers": (),
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,  # head_dim ** -0.5
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def features(config):
    """Returns the features of a model, by the names in FEATURES.

    Raises:
      ValueError: a feature that this file does not know.
    """
    given = getattr(config, "eabf_features", None) or {}
    unknown = given.keys() - FEATURES.keys()
    if unknown:
        raise ValueError(f"config.json: eabf_features has {_list(unknown)}, which this modeling file does not know")
    return {**FEATURES, **given}


def _head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _table(text, columns):
    """Decodes a table in config.json: float32 [rows, columns], on the CPU."""
    return _decoded(text).reshape(-1, columns)


@lru_cache(maxsize=8)
def _decoded(text):
    return torch.from_numpy(np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4").astype(np.float32))


def _check_end(longest, end, what):
    if longest > end:
        raise ValueError(f"{longest} tokens: the table of {what} ends at {end}; export it with a longer window")


# Kinds of frequencies: functions of head_dim and of `lengths` (float64 [batch, 1] on the CPU, the tokens in each row;
# None for `fixed`), with parameters as keywords. Each returns inverse frequencies [batch or 1, head_dim // 2] and the
# factor on cos and sin, a float or [batch, 1].


def _fixed(head_dim, lengths, *, inverse_frequencies, rotation_scale):
    return torch.tensor([inverse_frequencies], dtype=torch.float32), rotation_scale


def _by_length(head_dim, lengths, *, end, table):
    _check_end(int(lengths.max()), end, "frequencies")
    rows = _table(table, head_dim // 2 + 1)[lengths[:, 0].long() - 1]
    return rows[:, :-1], rows[:, -1:]


def _theta(head_dim, base):
    return torch.tensor([[base ** (-2.0 * j / head_dim) for j in range(head_dim // 2)]], dtype=torch.float64)


def _dynamic_ntk(head_dim, lengths, *, base, factor, pretrained_window):
    growth = 1.0 + factor * (lengths - pretrained_window).clamp(min=0.0) / pretrained_window
    exponents = torch.arange(head_dim // 2, dtype=torch.float64) * (-2.0 / (head_dim - 2))
    return _theta(head_dim, base) * growth**exponents, 1.0


def _dynamic_yarn(head_dim, lengths, *, base, factor, pretrained_window, beta_fast, beta_slow, truncate):
    def index_turning(turns):
        return head_dim * math.log(pretrained_window / (turns * 2.0 * math.pi)) / (2.0 * math.log(base))

    low, high = index_turning(beta_fast), index_turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)
    share = ramp.clamp(0.0, 1.0)
    theta = _theta(head_dim, base)
    stretch = (lengths / pretrained_window).clamp(min=1.0)
    return theta * (1.0 - share) + theta / stretch * share, 0.1 * torch.log(stretch) + 1.0


# Kinds of multipliers: functions of positions (int [batch, length], from 0) and of the number of layers, with
# parameters as keywords. Each returns float32 [batch, length] for every layer, or None if the multiplier is always 1.


def _none(positions, layers):
    return (None,) * layers


def _log_beyond(positions, window):
    # ln(i / c) = ln(1 + (i - c) / c) for the 1-based position i; exactly 0 inside the window c.
    return torch.log1p((positions.float() - (window - 1)).clamp(min=0.0) / window)


def _entropy_aware(positions, layers, *, pretrained_window, unscaled_layers):
    multiplier = 1.0 + _log_beyond(positions, pretrained_window) / math.log(pretrained_window)
    return tuple(None if layer < unscaled_layers else multiplier for layer in range(layers))


def _layer_temperature(positions, layers, *, pretrained_window, betas):
    beyond = _log_beyond(positions, pretrained_window)
    return tuple(1.0 + beyond * betas[layer] for layer in range(layers))


def _by_position(positions, layers, *, end, row_of_layer, table):
    index = positions.cpu()
    _check_end(int(index.max()) + 1, end, "multipliers")
    rows = [row[index].to(positions.device) for row in _table(table, end)]
    return tuple(rows[row_of_layer[layer]] for layer in range(layers))


# The supported kinds: function and parameters of each. Anything else in config.json is an error.
FREQUENCIES = {
    "fixed": (_fixed, ("inverse_frequencies", "rotation_scale")),
    "by_length": (_by_length, ("end", "table")),
    "dynamic_ntk": (_dynamic_ntk, ("base", "factor", "pretrained_window")),
    "dynamic_yarn": (
        _dynamic_yarn,
        ("base", "factor", "pretrained_window", "beta_fast", "beta_slow", "truncate"),
    ),
}
LOGIT_SCALES = {
    "none": (_none, ()),
    "entropy_aware": (_entropy_aware, ("pretrained_window", "unscaled_layers")),
    "layer_temperature": (_layer_temperature, ("pretrained_window", "betas")),
    "by_position": (_by_position, ("end", "row_of_layer", "table")),
}


def rules(config):
    """Finds the rules of a model's scheme.

    Args:
      config: with `eabf_scheme` and `eabf_rotary`.

    Returns:
      The rule of the frequencies and the rule of the logits' multiplier, with bound parameters.

    Raises:
      ValueError: a kind or parameter is unknown, or the data is that of another scheme.
    """
    data = getattr(config, "eabf_rotary", None) or {}
    scheme = getattr(config, "eabf_scheme", None)
    if not data or data.get("scheme") != scheme:
        raise ValueError(
            f"config.json: eabf_rotary has the data of the scheme {data.get('scheme')}, but eabf_scheme is {scheme}; "
            "export the model again instead of editing them"
        )
    unknown = [part for part in data if part not in ("scheme", "frequencies", "logit_scale")]
    if unknown:
        raise ValueError(f"config.json: eabf_rotary has {', '.join(unknown)}, which this modeling file does not know")
    return _bound(FREQUENCIES, "frequencies", data), _bound(LOGIT_SCALES, "logit_scale", data)


def _bound(table, part, data):
    parameters = dict(data.get(part) or {})
    kind = parameters.pop("kind", None)
    if kind not in table:
        raise ValueError(
            f"config.json: eabf_rotary has the {part} {kind!r}; this modeling_eabf_llama.py knows {', '.join(table)}"
        )
    rule, known = table[kind]
    if parameters.keys() != set(known):
        raise ValueError(
            f"config.json: eabf_rotary {kind!r} has the parameters {', '.join(sorted(parameters)) or 'none'}; this "
            f"modeling_eabf_llama.py needs {', '.join(sorted(known)) or 'none'}"
        )
    return partial(rule, **parameters)


# The input of attention: cosines and sines [batch, length, head_dim]; positions, int [batch, length]; for each layer
# the multipliers, float32 [batch, length], or None. If the frequencies follow the length, also the lengths, int
# [batch, 1], and the function that returns cosines and sines for the keys in a cache.
Rotation = namedtuple("Rotation", "cos sin positions multipliers lengths tables", defaults=(None, None))


class EabfRotaryEmbedding(nn.Module):
    """Cosines, sines and multipliers of a scheme; `head_dim` is the rotated part of a head.

    Has no buffers, because transformers first builds models without memory, which would lose a buffer's values.
    """

    def __init__(self, config):
        super().__init__()
        self.frequencies, self.logit_scale = rules(config)
        self.head_dim = int(_head_dim(config) * features(config)["partial_rotary_factor"])
        self.layers = config.num_hidden_layers
        self.follows_length = self.frequencies.func is not _fixed

    def tables(self, positions, lengths, dtype):
        """Computes cosines and sines [batch, length, head_dim] of int positions [batch, length]."""
        on_cpu = None if lengths is None else lengths.to("cpu", torch.float64)
        frequencies, scale = self.frequencies(self.head_dim, on_cpu)
        frequencies = frequencies.to(positions.device, torch.float32)
        scale = torch.as_tensor(scale, dtype=torch.float32).reshape(-1, 1).to(positions.device)
        angles = positions[..., None].float() * frequencies[:, None, :]
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scale[:, None]).to(dtype), (angles.sin() * scale[:, None]).to(dtype)

    @torch.no_grad()
    def forward(self, x, position_ids):
        multipliers = self.logit_scale(position_ids, self.layers)
        if not self.follows_length:
            return Rotation(*self.tables(position_ids, None, x.dtype), position_ids, multipliers)
        _refuse_packed(position_ids)
        lengths = position_ids.max(dim=1, keepdim=True).values + 1
        cos, sin = self.tables(position_ids, lengths, x.dtype)
        return Rotation(cos, sin, position_ids, multipliers, lengths, self.tables)


def _refuse_packed(position_ids):
    """Raises if a row holds several texts, because each text would need its own frequencies."""
    starts = (position_ids[:, :-1] == 0) & (position_ids[:, 1:] == 1)
    if starts.shape[1] and starts.sum(dim=1).max() > 1:
        raise ValueError("the frequencies follow the length of the text: give each text its own row, without packing")


def _rotate(x, cos, sin):
    if cos.shape[-1] < x.shape[-1]:
        rotated, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
        return torch.cat((_rotate(rotated, cos, sin), rest), dim=-1)
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def _require(holds, expected):
    """Raises unless transformers meets an expectation of this file; otherwise the logits would be wrong."""
    if not holds:
        raise RuntimeError(
            f"modeling_eabf_llama.py does not fit transformers {transformers.__version__}: expected {expected}. "
            f"Releases {KNOWN_RELEASES} are known to work."
        )


def _taken_cache(kwargs):
    """Removes the cache from attention's arguments, under any of its names, and returns it."""
    found = [cache for cache in (kwargs.pop(name, None) for name in CACHE_ARGUMENTS) if cache is not None]
    _require(
        len(found) == 1 or not (found or kwargs.get("use_cache")),
        f"one cache in attention's arguments {', '.join(CACHE_ARGUMENTS)}, found {len(found)}",
    )
    for cache in found:
        _require(isinstance(cache, Cache), f"a transformers Cache, found {type(cache).__name__}")
    return found[0] if found else None


def _positions_of_keys(positions, past, count):
    """Returns the positions [batch, count] of a cache's keys: `past` earlier ones, then those of `positions`."""
    # Earlier positions count back from the first new one. The mask hides padding, and the empty end of a static cache.
    index = torch.arange(count, device=positions.device) - past.to(positions.device)
    last = positions.shape[1] - 1
    new = (index >= 0) & (index <= last)
    return torch.where(new, positions[:, index.clamp(0, last)], positions[:, :1] + index)


def _within_window(mask, positions, positions_of_keys, window, dtype):
    """Returns the mask for a sliding window: a query sees the last `window` tokens, its own included.

    Args:
      mask: attention's mask, boolean or added to the logits; None if it is only causal.
      positions: int [batch, queries].
      positions_of_keys: int [batch, keys].
    """
    distance = positions[:, None, :, None] - positions_of_keys[:, None, None, :]
    visible = distance < window
    if mask is None:
        visible = visible & (distance >= 0)
    elif mask.dtype == torch.bool:
        return mask[..., : visible.shape[-1]] & visible
    added = torch.zeros((), dtype=dtype, device=visible.device) if mask is None else mask[..., : visible.shape[-1]]
    return torch.where(visible, added, torch.finfo(dtype).min)


def _attend(attention, query, key, value, mask, arguments):
    """Calls the model's attention function as transformers does."""
    name = attention.config._attn_implementation
    dropout = attention.attention_dropout if attention.training else 0.0
    # Up to 4.52, requested attention weights come from eager attention, and the mask is made for it.
    if name == "sdpa" and arguments.get("output_attentions") and mask is not None:
        name = "eager"
    if not HAS_REGISTRY:
        return _attend_before_registry(attention, query, key, value, mask, dropout, name)
    registry, function = modeling_llama.ALL_ATTENTION_FUNCTIONS, modeling_llama.eager_attention_forward
    if hasattr(registry, "get_interface"):
        function = registry.get_interface(name, function)
    elif name != "eager":
        function = registry[name]
    return function(attention, query, key, value, mask, dropout=dropout, scaling=attention.scaling, **arguments)


def _attend_before_registry(attention, query, key, value, mask, dropout, name):
    """Computes eager or SDPA attention for transformers 4.46 and 4.47."""
    if name not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation {name!r} needs transformers 4.48 or later here; eager and sdpa run in every release"
        )
    key, value = (repeat_kv(x, attention.num_key_value_groups) for x in (key, value))
    mask = None if mask is None else mask[:, :, :, : key.shape[2]]
    if name == "sdpa":
        # transformers may omit a mask that would only be causal.
        causal = mask is None and query.shape[2] > 1
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, causal, scale=attention.scaling
        )
        return output.transpose(1, 2), None
    scores = query @ key.transpose(2, 3) * attention.scaling
    weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=attention.training)
    return (weights @ value).transpose(1, 2), weights


class EabfLlamaAttention(LlamaAttention):
    """transformers' attention, with the multiplier on the query that is compared with the keys, and the features."""

    def equip(self, config, layer):
        """Adds what the features need to attention as transformers built it; `layer` is its decoder layer."""
        known, size = features(config), _head_dim(config)
        bias = known["attention_output_bias"]
        if bias is not None and bias != (self.o_proj.bias is not None):
            self.o_proj = nn.Linear(self.o_proj.in_features, self.o_proj.out_features, bias=bias)
        self.norm_all, widths = known["qk_norm"] == "full", (size, size)
        if self.norm_all:
            widths = self.q_proj.out_features, self.k_proj.out_features
        norms = [LlamaRMSNorm(width, eps=config.rms_norm_eps) if known["qk_norm"] else None for width in widths]
        self.q_norm, self.k_norm = norms
        scale = known["attention_multiplier"]
        self.scaling = size**-0.5 if scale is None else scale
        self.branch = _branch(known, layer.post_attention_layernorm)
        self.rotates = self.layer_idx not in known["unrotated_layers"]
        self.window = None if self.layer_idx in known["full_attention_layers"] else known["sliding_window"]

    def heads(self, x, norm=None):
        """[batch, length, width] -> [batch, heads, length, head_dim], with the norm of queries or keys."""
        x = norm(x) if norm is not None and self.norm_all else x
        x = x.view(*x.shape[:-1], -1, self.head_dim)
        x = norm(x) if norm is not None and not self.norm_all else x
        return x.transpose(1, 2)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        _require(
            isinstance(position_embeddings, Rotation),
            "attention to get position_embeddings, as model.rotary_emb returns them",
        )
        cos, sin, positions, multipliers, lengths, tables = position_embeddings
        cache = _taken_cache(kwargs)
        cache_position = kwargs.pop("cache_position", None)
        query = self.heads(self.q_proj(hidden_states), self.q_norm)
        key, value = self.heads(self.k_proj(hidden_states), self.k_norm), self.heads(self.v_proj(hidden_states))
        if self.rotates:
            query = _rotate(query, cos, sin)
        if self.rotates and lengths is None:
            key = _rotate(key, cos, sin)
        positions_of_keys = positions
        if cache is not None:
            if lengths is not None or self.window is not None:
                # A copy, because a static cache updates the returned tensor in place.
                past = torch.as_tensor(cache.get_seq_length(self.layer_idx)).clone()
            if CACHE_TAKES_KWARGS:
                # With cos and sin, a cache that moves keys to new positions rotates them.
                rotation = {"cos": cos, "sin": sin} if lengths is None else {}
                arguments = {"cache_kwargs": {"cache_position": cache_position, **rotation}}
            else:
                arguments = {"kwargs": kwargs}
            key, value = cache.update(key, value, self.layer_idx, **arguments)
            if lengths is not None or self.window is not None:
                positions_of_keys = _positions_of_keys(positions, past, key.shape[2])
        if self.rotates and lengths is not None:
            key = _rotate(key, *tables(positions_of_keys, lengths, key.dtype))
        multiplier = multipliers[self.layer_idx]
        if multiplier is not None:
            # Last, so that nothing done to the query undoes it. Positions may have one row for the whole batch.
            query = (query * multiplier[:, None, :, None].to(query.device)).to(query.dtype)
        if self.window is not None:
            if self.config._attn_implementation not in ("eager", "sdpa"):
                raise ValueError("the sliding window needs attn_implementation eager or sdpa")
            attention_mask = _within_window(attention_mask, positions, positions_of_keys, self.window, query.dtype)
        output, weights = _attend(self, query, key, value, attention_mask, kwargs)
        output = self.branch(self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()))
        return (output, weights) if HAS_REGISTRY else (output, weights, cache)


class EabfLlamaMLP(LlamaMLP):
    """transformers' MLP, with what the features do to its output."""

    def forward(self, x):
        return self.branch(super().forward(x))


class BranchNorm(LlamaRMSNorm):
    """A norm at the end of a residual branch, which does nothing where LLaMA's decoder layer calls it."""

    def forward(self, hidden_states, at_the_end=False):
        return super().forward(hidden_states) if at_the_end else hidden_states


class ScaledEmbedding(nn.Embedding):
    """Token vectors times a factor."""

    def forward(self, input):
        return super().forward(input) * self.factor


class ScaledLinear(nn.Linear):
    """An output projection whose logits are divided by a number."""

    def forward(self, input):
        return super().forward(input) / self.divisor


def _branch(known, norm):
    """Returns the function at the end of a residual branch; it is not a module, so `norm` stays the layer's."""
    factor, norm = known["residual_multiplier"], norm if known["post_norm"] else None

    def end(output):
        output = output if norm is None else norm(output, at_the_end=True)
        return output if factor == 1.0 else output * factor

    return end


def _equip(model):
    """Gives a LlamaModel its rotary scheme and the features of its architecture."""
    _require(hasattr(model, "rotary_emb"), "a LlamaModel with a rotary_emb")
    model.rotary_emb = EabfRotaryEmbedding(model.config)
    built = features(model.config)
    if built["embedding_multiplier"] != 1.0:
        model.embed_tokens.__class__, model.embed_tokens.factor = ScaledEmbedding, built["embedding_multiplier"]
    for layer in model.layers:
        attention = layer.self_attn
        # The replaced attention must be the one that the replacement was written for.
        projections = {name for name, _ in attention.named_children()} - {"rotary_emb"}
        _require(projections == PROJECTIONS, f"attention made of {_list(PROJECTIONS)}, found {_list(projections)}")
        arguments = set(inspect.signature(type(attention).forward).parameters)
        known = arguments & {*CACHE_ARGUMENTS}
        _require(known, f"attention with an argument {' or '.join(CACHE_ARGUMENTS)}, found {_list(arguments)}")
        strange = arguments - known - ARGUMENTS
        _require(not strange, f"attention with the arguments {_list(ARGUMENTS)}, found {_list(strange)} too")
        attention.__class__ = EabfLlamaAttention
        if built["post_norm"]:
            layer.input_layernorm = nn.Identity()
            layer.post_attention_layernorm.__class__ = BranchNorm
            width = model.config.hidden_size
            layer.post_feedforward_layernorm = BranchNorm(width, eps=model.config.rms_norm_eps)
        attention.equip(model.config, layer)
        layer.mlp.__class__ = EabfLlamaMLP
        layer.mlp.branch = _branch(built, getattr(layer, "post_feedforward_layernorm", None))


def _list(names):
    return ", ".join(sorted(names)) or "none"


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
        divisor = features(config)["logits_scaling"]
        if divisor != 1.0:
            self.lm_head.__class__, self.lm_head.divisor = ScaledLinear, divisor
