"""The architectures that the model covers: how a config.json of each spells the features in `LlamaConfig`.

`ARCHITECTURES` has one entry for each `model_type`. A new architecture made of known features is one more entry.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.fields import check, typed, types_of
from eabf_jax.model.config import LlamaConfig
from eabf_jax.rope import to_hf

Values = Mapping[str, Any]  # the content of a config.json
Fields = dict[str, Any]  # fields of LlamaConfig

# model_type of models that need our own modeling file.
OWN_TYPE = "eabf_llama"
# Its key for the features beyond LLaMA, under which transformers does not look for them.
OWN_KEY = "eabf_features"
# Keys of the rotary scheme, which `rope.from_hf` reads; those of partial rotation are removed for it.
PARTIAL = "partial_rotary_factor"
_ROTARY_SECTIONS = ("rope_scaling", "rope_parameters")


class Spelling(NamedTuple):
    """How some fields are spelled in config.json.

    Attributes:
      keys: the keys that `read` uses.
      read: (content, number of layers) -> fields of the model.
      write: model -> keys; raises InputError for a model that the keys cannot express.
    """

    keys: tuple[str, ...]
    read: Callable[[Values, int], Fields]
    write: Callable[[LlamaConfig], dict[str, Any]]


class Architecture(NamedTuple):
    """One architecture.

    Attributes:
      class_name: transformers' class for language models.
      defaults: transformers' values of absent keys, where they differ from LLaMA's.
      features: the fields that the architecture fixes.
      options: the fields that are keys, by key.
      spellings: the fields with a spelling of their own.
      fused: by projection in the files, the projections that it holds, one after another.
    """

    class_name: str
    defaults: Mapping[str, Any] = {}
    features: Mapping[str, Any] = {}
    options: Mapping[str, str] = {}
    spellings: tuple[Spelling, ...] = ()
    fused: Mapping[str, tuple[str, ...]] = {}

    @property
    def keys(self) -> set[str]:
        """The keys of config.json that this architecture has beyond those of all."""
        return {*self.options, *(key for spelling in self.spellings for key in spelling.keys)}

    def read(self, values: Values, layers: int) -> Fields:
        """Returns the fields of the features, from the content of a config.json.

        Raises:
          InputError: a value of the wrong type, or one that is not supported.
        """
        found = dict(self.features)
        for key, field in self.options.items():
            value = values.get(key, self.defaults.get(key))
            if value is not None:
                found[field] = value
        for spelling in self.spellings:
            found |= spelling.read(values, layers)
        return found

    def write(self, config: LlamaConfig) -> dict[str, Any]:
        """Returns the keys of the features.

        Raises:
          InputError: the architecture lacks a feature of the model.
        """
        written = {key: getattr(config, field) for key, field in self.options.items()}
        for spelling in self.spellings:
            written |= spelling.write(config)
        found = LlamaConfig(**{**_plain(config), **self.read(written, config.num_hidden_layers)})
        for name in FEATURES:
            if getattr(found, name) != getattr(config, name):
                raise InputError(
                    f"model_type {config.model_type!r} cannot express {name} {getattr(config, name)!r} of this model"
                )
        return written


def _plain(config: LlamaConfig) -> Fields:
    """Returns the fields of a model without its features."""
    return {name: getattr(config, name) for name in LlamaConfig.__dataclass_fields__ if name not in FEATURES}


# The fields that are features; the others are sizes, ids and the rotary scheme, which all architectures spell alike.
FEATURES = (
    *("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm", "post_norm", "partial_rotary_factor"),
    *("unrotated_layers", "sliding_window", "full_attention_layers"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
)


def _number(values: Values, key: str, kind: Any) -> Any:
    return typed(kind, values.get(key), "config.json: key", key)


def _period(values: Values, key: str) -> int:
    """Returns n of a key that means every n-th layer; 4 if it is absent."""
    period: int = _number({key: 4, **values}, key, int)
    if period < 1:
        raise InputError(f"config.json: {key} is {period}, expected 1 or more")
    return period


def _window(default: int | None) -> Spelling:
    """The same sliding window in every layer."""

    def write(config: LlamaConfig) -> dict[str, Any]:
        return {"sliding_window": config.sliding_window}

    def read(values: Values, layers: int) -> Fields:
        return {"sliding_window": _number({"sliding_window": default, **values}, "sliding_window", int | None)}

    return Spelling(("sliding_window",), read, write)


def _layer_windows(
    default: int | None, switch: str | None, is_sliding: Callable[[Values, int], bool] = lambda values, layer: True
) -> Spelling:
    """A sliding window in the layers of `layer_types`.

    Args:
      default: transformers' window if the key is absent.
      switch: the key that turns the window on; None if there is none.
      is_sliding: whether a layer has the window if there are no `layer_types`.
    """
    names = {True: "sliding_attention", False: "full_attention"}

    def read(values: Values, layers: int) -> Fields:
        window = _number({"sliding_window": default, **values}, "sliding_window", int | None)
        if window is None or (switch is not None and not values.get(switch)):
            window = None
        types = values.get("layer_types")
        if types is None:
            types = [names[is_sliding(values, layer)] for layer in range(layers)]
        if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= {*names.values()}:
            raise InputError(
                f"config.json: layer_types is {types!r:.80}, expected {layers} of {' and '.join(names.values())}"
            )
        full = tuple(layer for layer, kind in enumerate(types) if kind == names[False])
        if window is None or len(full) == layers:
            if len(full) < layers and values.get("layer_types") is not None:
                raise InputError("config.json: layer_types has sliding_attention, but there is no sliding_window")
            return {"sliding_window": None, "full_attention_layers": ()}
        return {"sliding_window": window, "full_attention_layers": full}

    def write(config: LlamaConfig) -> dict[str, Any]:
        types = [names[config.window_of(layer) is not None] for layer in range(config.num_hidden_layers)]
        switched = {} if switch is None else {switch: config.sliding_window is not None}
        # Without a switch, transformers needs a window even if no layer has one.
        window = config.sliding_window or (default if switch is None else None)
        return {**switched, "sliding_window": window, "layer_types": types}

    return Spelling(("sliding_window", "layer_types", *([switch] if switch else [])), read, write)


def _past_first_layers(values: Values, layer: int) -> bool:
    first: int = _number({"max_window_layers": 28, **values}, "max_window_layers", int)
    return layer >= first


_QWEN_WINDOWS = _layer_windows(4096, "use_sliding_window", _past_first_layers)


def _write_qwen_windows(config: LlamaConfig) -> dict[str, Any]:
    """Writes max_window_layers too, because vLLM refuses by it the windows that it would ignore."""
    layers = range(config.num_hidden_layers)
    first = next((layer for layer in layers if config.window_of(layer) is not None), len(layers))
    return {**_QWEN_WINDOWS.write(config), "max_window_layers": first}


_QWEN_SPELLING = Spelling((*_QWEN_WINDOWS.keys, "max_window_layers"), _QWEN_WINDOWS.read, _write_qwen_windows)


def _without_rope(values: Values, layer: int) -> bool:
    flags = values.get("no_rope_layers")
    return not flags[layer] if flags is not None else (layer + 1) % _period(values, "no_rope_layer_interval") == 0


def _read_unrotated(values: Values, layers: int) -> Fields:
    flags = values.get("no_rope_layers")
    if flags is not None and (not isinstance(flags, list) or len(flags) != layers or not set(flags) <= {0, 1}):
        raise InputError(f"config.json: no_rope_layers is {flags!r:.80}, expected {layers} of 0 and 1")
    return {"unrotated_layers": tuple(layer for layer in range(layers) if _without_rope(values, layer))}


def _within_pattern(values: Values, layer: int) -> bool:
    return (layer + 1) % _period(values, "sliding_window_pattern") != 0


_PATTERN = _layer_windows(4096, None, _within_pattern)


def _read_pattern(values: Values, layers: int) -> Fields:
    """Layers with a window, among which those without one are not rotated."""
    if _number({"sliding_window": 4096, **values}, "sliding_window", int | None) is None:
        return {**_PATTERN.read({"layer_types": ["full_attention"] * layers, **values}, layers), "unrotated_layers": ()}
    found = _PATTERN.read(values, layers)
    unrotated = found["full_attention_layers"] if found["sliding_window"] else tuple(range(layers))
    return {**found, "unrotated_layers": unrotated}


def _write_pattern(config: LlamaConfig) -> dict[str, Any]:
    written = _PATTERN.write(config)
    return written if config.sliding_window or config.unrotated_layers else {**written, "sliding_window": None}


_PATTERN_WITHOUT_ROPE = Spelling((*_PATTERN.keys, "sliding_window_pattern"), _read_pattern, _write_pattern)

_NO_ROPE = Spelling(
    ("no_rope_layers", "no_rope_layer_interval"),
    _read_unrotated,
    lambda config: {
        "no_rope_layers": [int(layer not in config.unrotated_layers) for layer in range(config.num_hidden_layers)]
    },
)


def _read_partial(values: Values, layers: int) -> Fields:
    sections = (values.get(name) for name in _ROTARY_SECTIONS)
    inner = [section[PARTIAL] for section in sections if isinstance(section, Mapping) and PARTIAL in section]
    return {PARTIAL: _number({PARTIAL: (*inner, values.get(PARTIAL, 1.0))[0]}, PARTIAL, float)}


def without_partial(values: Values) -> Values:
    """Returns the content of a config.json without the share of each head that is rotated."""
    kept = {key: value for key, value in values.items() if key != PARTIAL}
    for name in _ROTARY_SECTIONS:
        if isinstance(section := kept.get(name), Mapping):
            kept[name] = {key: value for key, value in section.items() if key != PARTIAL}
    return kept


_PARTIAL = Spelling((PARTIAL,), _read_partial, lambda config: {PARTIAL: config.partial_rotary_factor})


def beyond_llama(config: LlamaConfig) -> Fields:
    """Returns the features of a model that LLaMA lacks, by field."""
    plain = LlamaConfig(**_plain(config), attention_bias=config.attention_bias, mlp_bias=config.mlp_bias)
    return {name: getattr(config, name) for name in FEATURES if getattr(config, name) != getattr(plain, name)}


def _write_own(config: LlamaConfig) -> dict[str, Any]:
    own = beyond_llama(config)
    family = {} if config.model_type == "llama" else {"family": config.model_type}
    return {OWN_KEY: family | own} if family | own else {}


def _read_own(values: Values, layers: int) -> Fields:
    found = values.get(OWN_KEY) or {}
    types = {name: kind for name, kind in types_of(LlamaConfig).items() if name in FEATURES} | {"family": str}
    fields = check(found, types, "config.json: key", f"{OWN_KEY}.")
    family = fields.pop("family", "llama")
    architecture_of({"model_type": family})
    return {**fields, "model_type": family}


_OWN = Spelling((OWN_KEY,), _read_own, _write_own)

_BIASES = {"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131_072}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "bos_token_id": None, "eos_token_id": None}
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", options=_BIASES),
    "mistral": Architecture("MistralForCausalLM", _MISTRAL, spellings=(_window(4096),)),
    "ministral": Architecture("MinistralForCausalLM", _MISTRAL, spellings=(_layer_windows(4096, None),)),
    "ministral3": Architecture(
        "Ministral3ForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 11,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1_000_000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16_384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        spellings=(_window(None),),
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        _QWEN,
        {"attention_bias": True, "attention_output_bias": False},
        spellings=(_QWEN_SPELLING,),
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        {**_QWEN, "head_dim": 128},
        {"qk_norm": "head"},
        {"attention_bias": "attention_bias"},
        (_QWEN_SPELLING,),
    ),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "pad_token_id": 128_004,
        },
        options=_BIASES,
        spellings=(_NO_ROPE, _layer_windows(None, "use_sliding_window", _without_rope)),
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "eos_token_id": 32_000,
            "pad_token_id": 32_000,
        },
        spellings=(_window(None), _PARTIAL),
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    ),
    "granite": Architecture(
        "GraniteForCausalLM",
        dict.fromkeys(_MULTIPLIERS, 1.0),
        options={**_BIASES, **{name: name for name in _MULTIPLIERS}},
    ),
    "olmo2": Architecture(
        "Olmo2ForCausalLM",
        {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50_279, "pad_token_id": 1},
        {"post_norm": True, "qk_norm": "full"},
        {"attention_bias": "attention_bias"},
    ),
    "seed_oss": Architecture(
        "SeedOssForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524_288,
            "attention_bias": True,
            "attention_out_bias": False,
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        options={**_BIASES, "attention_out_bias": "attention_output_bias"},
    ),
    # Other names and defaults of the same.
    "internlm3": Architecture(
        "LlamaForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 2,
        },
        options={**_BIASES, "qkv_bias": "attention_bias", "bias": "mlp_bias"},
    ),
    "iquestcoder": Architecture(
        "LlamaForCausalLM",
        {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5},
        options=_BIASES,
    ),
    "cwm": Architecture(
        "CwmForCausalLM",
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1_000_000.0,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "bos_token_id": 128_000,
            "eos_token_id": (128_001, 128_008, 128_009),
        },
        options={"mlp_bias": "mlp_bias"},
        spellings=(_layer_windows(8192, None, lambda values, layer: layer % 4 != 0),),
    ),
    "exaone4": Architecture(
        "Exaone4ForCausalLM",
        {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "bos_token_id": 0},
        {"post_norm": True, "qk_norm": "head"},
        spellings=(_PATTERN_WITHOUT_ROPE,),
    ),
    OWN_TYPE: Architecture("EabfLlamaForCausalLM", options=_BIASES, spellings=(_OWN,)),
}

# Other architectures: what the model, or the reader of its files, lacks for them.
_LACKING: Mapping[str, str] = {
    "mixture of experts": """
        afmoe aria_text axk1 axk2 beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1
        dots3_note dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss
        granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_loop_text inkling2_text
        inkling_text jetmoe kolibri1 laguna llama4 llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2
        minimax_m3_vl_text mistral4 mixtral olmoe phimoe qwen2_moe qwen3_moe sarvam_mla sarvam_moe solar_open zaya
    """,
    "LayerNorm": """
        bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert codegen
        cohere cohere2 cohere_compass_text ctrl data2vec-text electra ernie falcon gpt-sw3 gpt2 gpt_bigcode gpt_neo
        gpt_neox gpt_neox_japanese gptj jais2 marian mbart megatron-bert modernbert modernbert-decoder mpt mvp nemotron
        olmo openai-gpt opt pegasus persimmon phi plbart prophetnet reformer rembert roberta roberta-prelayernorm
        roc_bert roformer stablelm starcoder2 trocr whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod
    """,
    "layers other than attention (state space, recurrence, convolution)": """
        bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3
        mamba mamba2 nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp
        qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2
    """,
    "inputs other than text": """
        blt emu3 fuyu git got_ocr2 idefics3 llava mistral3 mllama moshi moss_transcribe_diarize musicgen musicgen_melody
        paligemma phi4_multimodal qwen2_5_vl qwen2_vl
    """,
    "norms with an offset of 1 and scaled embeddings": "gemma gemma2 gemma3 gemma3_text vaultgemma",
    "norms before and after attention and MLP": """
        gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text hyperclovax
    """,
    "keys and values of another model": "gemma4_assistant gemma4_unified_assistant",
    "norms inside attention and MLP": "bitnet",
    "norms after rotation": "hunyuan_v1_dense",
    "an MLP without a gate": "apertus apertus1p5_text arcee nanochat",
    "rotary embedding of interleaved pairs": "ernie4_5 glm glm4 helium",
    "frequencies that differ by layer": "olmo3",
    "multi-head latent attention": "minicpm3 youtu",
    "attention sinks": "granite_swa",
    "attention of two softmaxes": "diffllama",
    "attention with a learned mask": "doge",
    "attention with biases by distance": "cpmant",
    "hidden states of norm 1": "dory",
    "layers that run several times": "hrm_text",
    "names of keys and tensors other than LLaMA's": "exaone",
}


def rotary_keys(config: LlamaConfig) -> dict[str, Any]:
    """Returns the keys of a model's rotary scheme in its config.json, as `rope.to_hf` does."""
    return to_hf(config.rope, head_dim=config.rotary_dim, model_type=config.model_type)


def architecture_of(values: Values) -> Architecture:
    """Returns the architecture of a config.json.

    Raises:
      InputError: an unknown architecture, or one that needs what this model does not have.
    """
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    known = [name for name in ARCHITECTURES if name != OWN_TYPE]
    for feature, kinds in _LACKING.items():
        if kind in kinds.split():
            raise InputError(
                f"config.json: model_type is {kind!r}, which has {feature}; supported are {', '.join(known)}"
            )
    if not isinstance(kind, str):
        raise InputError(f"config.json: model_type is {kind!r}, expected one of {', '.join(known)}")
    raise InputError(f"config.json: {unknown_name('model_type', kind, known)}")
