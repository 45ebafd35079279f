"""The shape of a LLaMA model, in the field names of Hugging Face's config.json."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Self

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.rope import Scheme, scheme


@dataclass(frozen=True)
class LlamaConfig:
    """Static description of a LLaMA-architecture model.

    Every field except `rope` has the same name and meaning as in Hugging Face's `LlamaConfig`; `rope` replaces
    `rope_theta` and `rope_scaling`.

    Raises:
      InputError: sizes that do not fit together.
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
            if entry.type is int and getattr(self, entry.name) < 1:
                raise InputError(f"{entry.name} {getattr(self, entry.name)} is not a positive number")
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
        known = {entry.name: entry for entry in fields(cls)}
        for name in values:
            if name not in known:
                raise unknown_name("model field", name, known)
        converted = dict(values)
        if "rope" in values and not isinstance(values["rope"], Scheme):
            converted["rope"] = Scheme.from_dict(values["rope"])
        if isinstance(values.get("eos_token_id"), list):
            converted["eos_token_id"] = tuple(values["eos_token_id"])
        for name, entry in known.items():
            if entry.default is MISSING and entry.default_factory is MISSING and name not in values:
                raise InputError(f"model field {name} is missing")
            fits, needed = _TYPES[entry.type]
            if name in values and not fits(converted[name]):
                raise InputError(f"model field {name} is {values[name]!r}; {needed} is needed")
        return cls(**converted)


def _are_integers(value: Any) -> bool:
    return all(type(item) is int for item in (value if isinstance(value, tuple) else (value,)))


# Per field type: a check of the value and the type's name in messages. Types are exact because a bool is an int.
_TYPES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (lambda value: type(value) is int, "an integer"),
    float: (lambda value: type(value) in (int, float), "a number (YAML reads 1e-5 as text: write 1.0e-5)"),
    bool: (lambda value: type(value) is bool, "true or false"),
    int | None: (lambda value: value is None or type(value) is int, "an integer or null"),
    int | tuple[int, ...] | None: (lambda value: value is None or _are_integers(value), "an integer, a list or null"),
    Scheme: (lambda value: isinstance(value, Scheme), "a rotary scheme"),
}
