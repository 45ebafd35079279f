"""The shape of a model of the LLaMA family: sizes, and the features in which architectures differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from eabf_jax.errors import InputError
from eabf_jax.fields import build
from eabf_jax.rope import Scheme, scheme

# Positions, token ids and sizes are int32 in JAX.
MAX_SIZE = 2**31 - 1
# Many tables have a row for each layer; the deepest models in use have 126.
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class LlamaConfig:
    """Static description of a model of the LLaMA family.

    Sizes and token ids have the names and meanings of Hugging Face's `LlamaConfig`. Each of the other fields is a
    feature of one or more architectures; `interop.architectures` reads and writes them for each `model_type`.

    Attributes:
      model_type: the architecture's name in Hugging Face's config.json, for export.
      attention_bias: whether the q, k and v projections have biases.
      attention_output_bias: whether the o projection has a bias; None means as `attention_bias`.
      mlp_bias: whether the projections of the MLP have biases.
      qk_norm: RMS norm of queries and keys before rotation: over each "head", or over all heads ("full").
      post_norm: whether norms follow attention and MLP, inside the residual branch, instead of preceding them.
      partial_rotary_factor: share of each head, from its start, that is rotated.
      unrotated_layers: 0-based layers without rotary embedding.
      sliding_window: tokens that a query sees, itself included; None means all earlier ones.
      full_attention_layers: 0-based layers that see all earlier tokens in spite of `sliding_window`.
      embedding_multiplier: multiplies the hidden states before the first layer.
      attention_multiplier: multiplies the attention logits; None means head_dim ** -0.5.
      residual_multiplier: multiplies what attention and MLP add to the hidden states.
      logits_scaling: divides the logits.
      rope: the rotary scheme.

    Raises:
      InputError: a number is out of range, or sizes do not fit together.
    Source: transformers, `LlamaConfig` and the configs of the other architectures.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    post_norm: bool = False
    partial_rotary_factor: float = 1.0
    unrotated_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    rope: Scheme = field(default_factory=lambda: scheme("default", base=10_000.0))

    def __post_init__(self) -> None:
        if self.attention_output_bias is None:
            object.__setattr__(self, "attention_output_bias", self.attention_bias)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type is int and value < 1:
                raise InputError(f"{entry.name} {value} is not a positive number")
            if entry.type is int and value > MAX_SIZE:
                raise InputError(f"{entry.name} {value} is too large; at most {MAX_SIZE} is possible")
            if entry.type is float and value < 0:
                raise InputError(f"{entry.name} {value} is negative")
        check_layers(self.num_hidden_layers)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.partial_rotary_factor == 1.0 and self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even head size")
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise InputError(
                f"partial_rotary_factor {self.partial_rotary_factor}: {self.rotary_dim} rotated dimensions of head_dim "
                f"{self.head_dim}; an even number from 2 to head_dim is needed"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise InputError(f"sliding_window {self.sliding_window} is not a positive number")
        betas = dict(self.rope.logit_multiplier.parameters).get("betas")
        if betas is not None and len(betas) != self.num_hidden_layers:
            raise InputError(f"rope: {len(betas)} betas for {self.num_hidden_layers} layers; each layer needs one")
        for name in ("unrotated_layers", "full_attention_layers"):
            for layer in getattr(self, name):
                if not 0 <= layer < self.num_hidden_layers:
                    raise InputError(f"{name} names layer {layer}; the model has 0 to {self.num_hidden_layers - 1}")

    @property
    def rotary_dim(self) -> int:
        """The number of dimensions of each head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def attention_scale(self) -> float:
        """The factor on the attention logits, without the scheme's multiplier."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    def window_of(self, layer: int) -> int | None:
        """Returns the sliding window of a layer in tokens; None if the layer has none."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Self:
        """Builds the configuration from plain values, as parsed from YAML or JSON.

        Args:
          values: values by field name; `rope` is a mapping `{type: ..., parameters}`.

        Raises:
          InputError: an unknown or missing field, or a value of the wrong type.
        """
        return build(cls, values, "model field")


def check_layers(count: int) -> None:
    """Raises InputError if a model has so many layers that loops over them would not end."""
    if count > MAX_LAYERS:
        raise InputError(f"num_hidden_layers {count} is too large; at most {MAX_LAYERS} is possible")
