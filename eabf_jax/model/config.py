"""The shape of a LLaMA model, in the field names of Hugging Face's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from eabf_jax.errors import InputError
from eabf_jax.fields import build
from eabf_jax.rope import Scheme, scheme


@dataclass(frozen=True)
class LlamaConfig:
    """Static description of a LLaMA-architecture model.

    Every field except `rope` has the same name and meaning as in Hugging Face's `LlamaConfig`; `rope` replaces
    `rope_theta` and `rope_scaling`.

    Raises:
      InputError: a number is out of range, or sizes do not fit together.
    Source: transformers, `LlamaConfig`.
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
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    rope: Scheme = field(default_factory=lambda: scheme("default", base=10_000.0))

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type is int and value < 1:
                raise InputError(f"{entry.name} {value} is not a positive number")
            if entry.type is float and value < 0:
                raise InputError(f"{entry.name} {value} is negative")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even head size")

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Self:
        """Builds the configuration from plain values, as parsed from YAML or JSON.

        Args:
          values: values by field name; `rope` is a mapping `{type: ..., parameters}`.

        Raises:
          InputError: an unknown or missing field, or a value of the wrong type.
        """
        return build(cls, values, "model field")
