"""Every parameter of a LLaMA model: where it is in our tree, what Hugging Face and GGUF call it, what shape it has."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eabf_jax.errors import InputError
from eabf_jax.model.config import LlamaConfig


@dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree.

    Attributes:
      path: keys in the nested dict of parameters.
      hf_name: name in a Hugging Face file; holds `{layer}` where there is one tensor per layer.
      gguf_name: name in a GGUF file, likewise.
      hf_shape: shape of one Hugging Face tensor, [out, in] for a kernel.
      transposed: whether ours is the transpose of Hugging Face's.
      layers: how many layers are stacked on the leading axis; None where there is no such axis.
    """

    path: tuple[str, ...]
    hf_name: str
    gguf_name: str
    hf_shape: tuple[int, ...]
    transposed: bool
    layers: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our leaf."""
        own = self.hf_shape[::-1] if self.transposed else self.hf_shape
        return own if self.layers is None else (self.layers, *own)

    def hf_names(self) -> list[str]:
        """The Hugging Face tensors that make up this leaf, in the order of the layers."""
        return [self.hf_name.format(layer=i) for i in range(1 if self.layers is None else self.layers)]

    def gguf_names(self) -> list[str]:
        """The GGUF tensors that make up this leaf, in the order of the layers."""
        return [self.gguf_name.format(layer=i) for i in range(1 if self.layers is None else self.layers)]


def parameters(config: LlamaConfig) -> tuple[Parameter, ...]:
    """Lists the parameters of a model.

    Args:
      config: the model's shape.

    Returns:
      One entry per leaf of the parameter tree.
    """
    hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    embedding = (config.vocab_size, hidden)
    entries = [
        Parameter(
            ("embed_tokens", "embedding"), "model.embed_tokens.weight", "token_embd.weight", embedding, False, None
        ),
        Parameter(("norm", "scale"), "model.norm.weight", "output_norm.weight", (hidden,), False, None),
    ]
    if not config.tie_word_embeddings:
        entries.append(Parameter(("lm_head", "kernel"), "lm_head.weight", "output.weight", embedding, True, None))
    for norm, gguf in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
        names = (f"model.layers.{{layer}}.{norm}.weight", f"blk.{{layer}}.{gguf}.weight")
        entries.append(Parameter(("layers", norm, "scale"), *names, (hidden,), False, layers))
    for block, name, gguf, shape, bias in (
        ("self_attn", "q_proj", "attn_q", (query, hidden), config.attention_bias),
        ("self_attn", "k_proj", "attn_k", (key, hidden), config.attention_bias),
        ("self_attn", "v_proj", "attn_v", (key, hidden), config.attention_bias),
        ("self_attn", "o_proj", "attn_output", (hidden, query), config.attention_bias),
        ("mlp", "gate_proj", "ffn_gate", (wide, hidden), config.mlp_bias),
        ("mlp", "up_proj", "ffn_up", (wide, hidden), config.mlp_bias),
        ("mlp", "down_proj", "ffn_down", (hidden, wide), config.mlp_bias),
    ):
        stem, gguf_stem = f"model.layers.{{layer}}.{block}.{name}", f"blk.{{layer}}.{gguf}"
        path = ("layers", block, name)
        entries.append(Parameter((*path, "kernel"), f"{stem}.weight", f"{gguf_stem}.weight", shape, True, layers))
        if bias:
            entries.append(Parameter((*path, "bias"), f"{stem}.bias", f"{gguf_stem}.bias", shape[:1], False, layers))
    return tuple(entries)


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Turns {path: leaf} into the nested dict that the model takes.

    Args:
      leaves: leaf by path.

    Returns:
      Nested dict.
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Undoes `nest`.

    Args:
      tree: nested mapping.
      prefix: path of the mapping itself.

    Yields:
      Path and leaf.
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def shapes(config: LlamaConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of every parameter of a model, by path."""
    return {entry.path: entry.shape for entry in parameters(config)}


def check_shapes(
    found: Mapping[tuple[str, ...], tuple[int, ...]], expected: Mapping[tuple[str, ...], tuple[int, ...]], where: str
) -> None:
    """Compares the leaves of a stored tree with those that are needed.

    Args:
      found: shape by path.
      expected: likewise.
      where: named in the message.

    Raises:
      InputError: a parameter missing, too many, or of another shape.
    """
    for path, shape in expected.items():
        name = ".".join(path)
        if path not in found:
            raise InputError(f"{where}: parameter {name} is missing; expected shape {list(shape)}")
        if tuple(found[path]) != shape:
            raise InputError(f"{where}: parameter {name} has shape {list(found[path])}, expected {list(shape)}")
    if extra := sorted(".".join(path) for path in found.keys() - expected.keys()):
        raise InputError(f"{where}: parameter {extra[0]} is not part of this model ({len(extra)} such)")
