"""llama.cpp's architectures: the features that each one computes, its keys beyond those of all, and its tensors.

`GGUF_ARCHITECTURES` has one entry for each. A new architecture made of known features is one more entry.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from eabf_jax.errors import InputError
from eabf_jax.interop.architectures import FEATURES, PARTIAL
from eabf_jax.interop.gguf_file import Kind, only
from eabf_jax.interop.huggingface import Joined, joined
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import Parameter, parameters

# Tensors of the rotary scheme, whose numbers divide the plain frequencies. Of the last two, llama.cpp takes the first
# for a context longer than the pretrained window, and else the other.
ROTARY_FACTORS, LONG_FACTORS, SHORT_FACTORS = (
    f"rope_{name}.weight" for name in ("freqs", "factors_long", "factors_short")
)

FACTORS = (ROTARY_FACTORS, LONG_FACTORS, SHORT_FACTORS)

# Keys below the prefix of an architecture.
DIMENSIONS = "rope.dimension_count"
TEMPERATURE = "attention.temperature_scale"
RAMP = ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
WINDOW = "attention.sliding_window"
# The key of each multiplier.
MULTIPLIERS: Mapping[str, str] = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}

# What to do with a model that llama.cpp does not compute.
REMEDY = "export the model with convert/to_hf.py, and serve it with transformers"


class GgufArchitecture(NamedTuple):
    """What llama.cpp computes for one value of `general.architecture`.

    Attributes:
      name: that value, and the prefix of the keys.
      model_types: transformers' architectures that it stands for, the likeliest first.
      reads: keys below the prefix that have an effect here, but not in every architecture.
      fixed: keys below the prefix with one supported value, which is not that of the other architectures.
      features: the fields that the architecture fixes.
      biases: the fields whose tensors llama.cpp loads if a file has them.
      names: other names of modules than in `model.parameters`; modules with one name are one tensor.
      factors: the tensors of rotary factors that llama.cpp loads.
      neighbours: whether the two numbers that are rotated together are neighbours in the files.
      square: whether all heads together must be as wide as the hidden states.
      rotated_in_a_row: number of layers with rotary embedding before each one without; 0 if all have it.
      windowed: the number of layers by which llama.cpp knows a model that has windows; 0 if there is none.
    """

    name: str
    model_types: tuple[str, ...]
    reads: tuple[str, ...] = ()
    fixed: Mapping[str, Kind] = {}
    features: Mapping[str, Any] = {}
    biases: tuple[str, ...] = ("attention_bias",)
    names: Mapping[str, str] = {}
    factors: tuple[str, ...] = ()
    neighbours: bool = False
    square: bool = False
    rotated_in_a_row: int = 0
    windowed: int = 0

    @property
    def prefix(self) -> str:
        """Start of the keys of this architecture."""
        return f"{self.name}."

    def fields(self, layers: int) -> dict[str, Any]:
        """Returns the fields that the architecture fixes, for a number of layers."""
        period = self.rotated_in_a_row + 1
        unrotated = tuple(range(period - 1, layers, period)) if self.rotated_in_a_row else ()
        return {**self.features, "unrotated_layers": unrotated}

    def check(self, config: LlamaConfig) -> None:
        """Raises InputError, which names the feature and a remedy, for a model that llama.cpp would not compute."""
        free = {
            *(*self.biases, "sliding_window", "full_attention_layers"),
            *(field for field, key in {**MULTIPLIERS, PARTIAL: DIMENSIONS}.items() if key in self.reads),
        }
        plain = {field.name: field.default for field in dataclasses.fields(config) if field.name in FEATURES}
        expected = dataclasses.replace(config, **{**plain, **self.fields(config.num_hidden_layers)})
        for name in (*FEATURES, *self.features):
            if name not in free and getattr(config, name) != getattr(expected, name):
                raise self._lacks(config, f"{name} {getattr(config, name)!r}")
        for name in MULTIPLIERS:
            if getattr(config, name) == 0:  # which stands for the default in the files
                raise self._lacks(config, f"{name} {getattr(config, name)!r}")
        if self.square and config.num_attention_heads * config.head_dim != config.hidden_size:
            raise self._lacks(config, f"a head_dim other than hidden_size / num_attention_heads, {config.head_dim},")
        if config.num_hidden_layers == self.windowed:
            raise self._lacks(config, f"{self.windowed} layers without windows of 4,096 tokens")
        for layer in range(config.num_hidden_layers):
            window = config.window_of(layer)
            if window is not None and window < config.max_position_embeddings:
                raise InputError(
                    f"sliding_window {window} is shorter than the {config.max_position_embeddings} tokens of "
                    f"max_position_embeddings, and llama.cpp has no windows in its architecture {self.name!r}: "
                    f"{REMEDY}, or set max_position_embeddings to at most {window}"
                )

    def _lacks(self, config: LlamaConfig, what: str) -> InputError:
        return InputError(
            f"GGUF files of the architecture {self.name!r} cannot express {what} of this model ({config.model_type}): "
            f"{REMEDY}"
        )

    def tensors(self, config: LlamaConfig) -> list[Joined]:
        """Lists the tensors of a file, without those of the rotary scheme."""
        named = ((entry, entry.entry.gguf.rpartition(".")[2], entry.gguf_names()) for entry in parameters(config))
        return joined(named, self.names)

    def stored(self, rows: np.ndarray, entry: Parameter, head_dim: int) -> np.ndarray:
        """Returns the rows of one parameter as the file has them.

        Args:
          rows: the parameter as in a Hugging Face file; [heads * head_dim, …] if it is rotated.
        """
        return permuted(rows, len(rows) // head_dim) if entry.entry.rotated and self.neighbours else rows

    def restored(self, rows: np.ndarray, entry: Parameter, head_dim: int) -> np.ndarray:
        """Undoes `stored`."""
        return unpermuted(rows, len(rows) // head_dim) if entry.entry.rotated and self.neighbours else rows


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's permutation, which interleaves the two halves of each head.

    Args:
      rows: [heads * head_dim, …], a q or k weight or bias as GGUF stores it.
      heads: number of its heads.

    Returns:
      The same rows, in Hugging Face's order.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes `unpermuted`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


_LLAMA = GgufArchitecture(
    "llama",
    ("llama", "mistral", "ministral"),
    biases=("attention_bias", "attention_output_bias", "mlp_bias"),
    factors=FACTORS,
    neighbours=True,
)

# Source: llama.cpp, `load_arch_hparams` and `load_arch_tensors` in src/models, and `llama_model_rope_type`.
GGUF_ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    entry.name: entry
    for entry in (
        _LLAMA,
        _LLAMA._replace(
            name="mistral3", model_types=("ministral3", "mistral"), reads=(TEMPERATURE, *RAMP, LOG_MULTIPLIER)
        ),
        _LLAMA._replace(
            name="granite",
            model_types=("granite",),
            reads=tuple(MULTIPLIERS.values()),
            fixed={"rope.scaling.finetuned": only("true: false turns rotary embedding off", True)},
        ),
        GgufArchitecture("qwen2", ("qwen2",), square=True),
        GgufArchitecture("qwen3", ("qwen3",), features={"qk_norm": "head"}),
        GgufArchitecture("smollm3", ("smollm3",), neighbours=True, rotated_in_a_row=3),
        GgufArchitecture(
            "phi3",
            ("phi3",),
            reads=(DIMENSIONS,),
            biases=(),
            names={**dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attn_qkv"), "ffn_gate": "ffn_up"},
            factors=(LONG_FACTORS, SHORT_FACTORS),
            square=True,
        ),
        GgufArchitecture(
            "olmo2",
            ("olmo2",),
            fixed={WINDOW: only("0: frequencies would differ by layer", 0)},
            features={"post_norm": True, "qk_norm": "full", "tie_word_embeddings": False},
            square=True,
        ),
        GgufArchitecture(
            "exaone4",
            ("exaone4",),
            features={"post_norm": True, "qk_norm": "head"},
            factors=(ROTARY_FACTORS,),
            square=True,
            windowed=64,
        ),
        GgufArchitecture("seed_oss", ("seed_oss",), names={"ffn_norm": "post_attention_norm"}),
    )
}
