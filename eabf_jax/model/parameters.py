"""Every parameter of a model in one table: its names here, at Hugging Face and in GGUF, its shape, its axes.

All other code takes the parameters from here: the modules of `llama.py`, the joined weights of `decoder.py`, adapters,
sharding, the planner and the counts of parameters, conversion and checkpoints.
"""

import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from eabf_jax.errors import InputError
from eabf_jax.model.config import LlamaConfig

TreePath = tuple[str, ...]  # keys in the nested dict of parameters
Axes = tuple[str | None, ...]


class Entry(NamedTuple):
    """One line of the table.

    Attributes:
      module: the module in Hugging Face's tensor names; {} stands for the layer.
      leaf: what the parameter is to the module: kernel [in, out], bias, scale of a norm, embedding, or the adapter
        lora_a or lora_b.
      gguf: the module in GGUF's tensor names.
      shape: sizes in the letters of `llama.py`, and R for the rank of adapters; without the axis of layers.
      axes: the logical axis of each dimension, which `parallel.rules` maps to mesh axes; None is never split.
      only_if: a field of the config and the value at which a model has the parameter; None if every model has it. Two
        lines may describe the same parameter under different conditions, with the same axes.
      rotated: whether the last dimension is one of heads to which rotary embedding is applied.
    """

    module: str
    leaf: str
    gguf: str
    shape: tuple[str, ...]
    axes: Axes
    only_if: tuple[str, Any] | None = None
    rotated: bool = False

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor per layer; ours are stacked on a leading axis."""
        return "{}" in self.module

    @property
    def path(self) -> TreePath:
        """Keys in the nested dict of parameters, such as layers, self_attn, q_proj, kernel."""
        return (*self.module.removeprefix("model.").replace("{}.", "").split("."), self.leaf)

    def of(self, config: LlamaConfig, rank: int = 0) -> "Parameter":
        """Returns the parameter of a model; an adapter has the given rank."""
        sizes = {
            "V": config.vocab_size,
            "D": config.hidden_size,
            "F": config.intermediate_size,
            "NH": config.num_attention_heads * config.head_dim,
            "KH": config.num_key_value_heads * config.head_dim,
            "H": config.head_dim,
            "R": rank,
        }
        layers = config.num_hidden_layers if self.stacked else None
        return Parameter(self, tuple(sizes[name] for name in self.shape), layers)


_UNTIED = ("tie_word_embeddings", False)
_ATTN_BIAS = ("attention_bias", True)
_OUT_BIAS = ("attention_output_bias", True)
_MLP_BIAS = ("mlp_bias", True)
_PER_HEAD = ("qk_norm", "head")
_OVERALL = ("qk_norm", "full")
_BEFORE = ("post_norm", False)
_AFTER = ("post_norm", True)

TABLE: tuple[Entry, ...] = (
    Entry("model.embed_tokens", "embedding", "token_embd", ("V", "D"), ("vocab", "embed")),
    Entry("model.norm", "scale", "output_norm", ("D",), (None,)),
    Entry("lm_head", "kernel", "output", ("D", "V"), ("embed", "vocab"), _UNTIED),
    Entry("model.layers.{}.input_layernorm", "scale", "blk.{}.attn_norm", ("D",), (None,), _BEFORE),
    # Where norms precede, the one after attention is the MLP's.
    Entry("model.layers.{}.post_attention_layernorm", "scale", "blk.{}.ffn_norm", ("D",), (None,), _BEFORE),
    Entry("model.layers.{}.post_attention_layernorm", "scale", "blk.{}.post_attention_norm", ("D",), (None,), _AFTER),
    Entry("model.layers.{}.post_feedforward_layernorm", "scale", "blk.{}.post_ffw_norm", ("D",), (None,), _AFTER),
    Entry("model.layers.{}.self_attn.q_norm", "scale", "blk.{}.attn_q_norm", ("H",), (None,), _PER_HEAD, rotated=True),
    Entry("model.layers.{}.self_attn.k_norm", "scale", "blk.{}.attn_k_norm", ("H",), (None,), _PER_HEAD, rotated=True),
    Entry("model.layers.{}.self_attn.q_norm", "scale", "blk.{}.attn_q_norm", ("NH",), (None,), _OVERALL, rotated=True),
    Entry("model.layers.{}.self_attn.k_norm", "scale", "blk.{}.attn_k_norm", ("KH",), (None,), _OVERALL, rotated=True),
    Entry("model.layers.{}.self_attn.q_proj", "kernel", "blk.{}.attn_q", ("D", "NH"), ("embed", "heads"), rotated=True),
    Entry("model.layers.{}.self_attn.q_proj", "bias", "blk.{}.attn_q", ("NH",), ("heads",), _ATTN_BIAS, rotated=True),
    Entry("model.layers.{}.self_attn.k_proj", "kernel", "blk.{}.attn_k", ("D", "KH"), ("embed", "heads"), rotated=True),
    Entry("model.layers.{}.self_attn.k_proj", "bias", "blk.{}.attn_k", ("KH",), ("heads",), _ATTN_BIAS, rotated=True),
    Entry("model.layers.{}.self_attn.v_proj", "kernel", "blk.{}.attn_v", ("D", "KH"), ("embed", "heads")),
    Entry("model.layers.{}.self_attn.v_proj", "bias", "blk.{}.attn_v", ("KH",), ("heads",), _ATTN_BIAS),
    Entry("model.layers.{}.self_attn.o_proj", "kernel", "blk.{}.attn_output", ("NH", "D"), ("heads", "embed")),
    Entry("model.layers.{}.self_attn.o_proj", "bias", "blk.{}.attn_output", ("D",), (None,), _OUT_BIAS),
    Entry("model.layers.{}.mlp.gate_proj", "kernel", "blk.{}.ffn_gate", ("D", "F"), ("embed", "mlp")),
    Entry("model.layers.{}.mlp.gate_proj", "bias", "blk.{}.ffn_gate", ("F",), ("mlp",), _MLP_BIAS),
    Entry("model.layers.{}.mlp.up_proj", "kernel", "blk.{}.ffn_up", ("D", "F"), ("embed", "mlp")),
    Entry("model.layers.{}.mlp.up_proj", "bias", "blk.{}.ffn_up", ("F",), ("mlp",), _MLP_BIAS),
    Entry("model.layers.{}.mlp.down_proj", "kernel", "blk.{}.ffn_down", ("F", "D"), ("mlp", "embed")),
    Entry("model.layers.{}.mlp.down_proj", "bias", "blk.{}.ffn_down", ("D",), (None,), _MLP_BIAS),
)


def _adapters(kernel: Entry) -> tuple[Entry, Entry]:
    """Returns the low-rank matrices [in, rank] and [rank, out] of a kernel; the rank is too small to be split."""
    (wide_in, wide_out), (axis_in, axis_out) = kernel.shape, kernel.axes
    return (
        kernel._replace(leaf="lora_a", shape=(wide_in, "R"), axes=(axis_in, None)),
        kernel._replace(leaf="lora_b", shape=("R", wide_out), axes=(None, axis_out)),
    )


_PROJECTIONS = tuple(entry for entry in TABLE if entry.stacked and entry.leaf == "kernel")
PROJECTIONS = tuple(entry.path[-2] for entry in _PROJECTIONS)
ATTENTION_PROJECTIONS = tuple(entry.path[-2] for entry in _PROJECTIONS if "self_attn" in entry.path)
VECTORS = {entry.leaf for entry in TABLE if len(entry.shape) == 1}  # leaves that are not matrices
ADAPTERS = tuple(adapter for kernel in _PROJECTIONS for adapter in _adapters(kernel))
_AXES = {entry.path: (("layers",) if entry.stacked else ()) + entry.axes for entry in (*TABLE, *ADAPTERS)}


@dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree of a model.

    Attributes:
      entry: its line in the table.
      unstacked: shape without the axis of layers.
      layers: number of layers stacked on the leading axis; None if there is no such axis.
    """

    entry: Entry
    unstacked: tuple[int, ...]
    layers: int | None

    @property
    def path(self) -> TreePath:
        """Keys in the nested dict of parameters."""
        return self.entry.path

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our leaf."""
        return self.unstacked if self.layers is None else (self.layers, *self.unstacked)

    @property
    def transposed(self) -> bool:
        """Whether ours is the transpose of Hugging Face's and GGUF's, [out, in] for a kernel."""
        return self.entry.leaf == "kernel"

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in a Hugging Face or GGUF file."""
        return self.unstacked[::-1] if self.transposed else self.unstacked

    def hf_names(self) -> list[str]:
        """Returns the names of the Hugging Face tensors of this leaf, in the order of the layers."""
        return self._names(self.entry.module)

    def gguf_names(self) -> list[str]:
        """Returns the names of the GGUF tensors of this leaf, in the order of the layers."""
        return self._names(self.entry.gguf)

    def _names(self, module: str) -> list[str]:
        return [f"{module.format(i)}.{_suffix(self.entry)}" for i in range(self.layers or 1)]


def _suffix(entry: Entry) -> str:
    return "bias" if entry.leaf == "bias" else "weight"


def parameters(config: LlamaConfig) -> tuple[Parameter, ...]:
    """Lists the parameters of a model, one per leaf of the parameter tree, without adapters."""
    return tuple(
        entry.of(config)
        for entry in TABLE
        if entry.only_if is None or getattr(config, entry.only_if[0]) == entry.only_if[1]
    )


def parameter_count(config: LlamaConfig) -> int:
    """Returns the number of parameters of a model, biases included."""
    return sum(math.prod(shape) for shape in shapes(config).values())


def parameter_axes(path: TreePath) -> Axes:
    """Returns one logical axis name (or None) per dimension of a parameter or adapter, that of layers included.

    Args:
      path: its path in the parameter tree, e.g. ("layers", "self_attn", "q_proj", "kernel").
    """
    return _AXES[path]


def optional_fields(gguf_tensors: Container[str]) -> dict[str, bool]:
    """Infers from a GGUF file which biases a model has, and whether its output is tied; one tensor decides each.

    Args:
      gguf_tensors: names of the tensors in the file.
    """
    conditions = [(entry, *entry.only_if) for entry in reversed(TABLE) if entry.only_if and entry.leaf != "scale"]
    return {
        field: (f"{entry.gguf.format(0)}.{_suffix(entry)}" in gguf_tensors) == value
        for entry, field, value in conditions
    }


def nest(leaves: Mapping[TreePath, Any]) -> dict[str, Any]:
    """Turns {path: leaf} into the nested dict that the model takes."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: TreePath = ()) -> Iterator[tuple[TreePath, Any]]:
    """Undoes `nest`: yields pairs of path and leaf, with `prefix` before every path."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def shapes(config: LlamaConfig) -> dict[TreePath, tuple[int, ...]]:
    """Returns the shape of every parameter of a model, by path."""
    return {parameter.path: parameter.shape for parameter in parameters(config)}


def check_shapes(
    found: Mapping[Any, tuple[int, ...]], expected: Mapping[Any, tuple[int, ...]], where: str, kind: str = "parameter"
) -> None:
    """Compares the shapes of arrays with those that are needed.

    Args:
      found, expected: shapes by path or name.
      where: the source of the arrays, for the message.
      kind: what the message calls an array.

    Raises:
      InputError: an array is missing, not expected, or of another shape.
    """

    def named(key: Any) -> str:
        return f"{where}: {kind} {key if isinstance(key, str) else '.'.join(key)}"

    for key, shape in expected.items():
        if key not in found:
            raise InputError(f"{named(key)} is missing; expected shape {list(shape)}")
        if tuple(found[key]) != shape:
            raise InputError(f"{named(key)} has shape {list(found[key])}, expected {list(shape)}")
    if extra := sorted(found.keys() - expected.keys()):
        raise InputError(f"{named(extra[0])} is not part of this model ({len(extra)} such)")
