"""Low-rank adapters: y = x W + (x A) B · alpha / rank, where the model's W stays frozen.

A [in, rank] and B [rank, out] are the leaves `lora_a` and `lora_b` beside the `kernel` of each adapted projection.

Source: Hu et al. 2021 (arXiv 2106.09685); training embeddings and norms too: LongLoRA (arXiv 2309.12307).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import ADAPTERS, ATTENTION_PROJECTIONS, PROJECTIONS, Parameter


@dataclass(frozen=True)
class Lora:
    """Adapters in place of a full fine-tune; null trains every parameter."""

    rank: int = 8  # columns of A and rows of B; LongLoRA: 8
    alpha: float = 16.0  # the adapters' product is multiplied by alpha / rank; LongLoRA: 16
    # any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; LongLoRA: the four attention projections
    targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    train_embeddings: bool = False  # also train token embeddings (and a tied output); LongLoRA: yes for long windows
    train_norms: bool = False  # also train the scales of all norms; LongLoRA: yes for long windows

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank is {self.rank}; a positive number is needed")
        if not self.alpha > 0:
            raise InputError(f"lora.alpha is {self.alpha}; a positive number is needed")
        if not self.targets:
            raise InputError(f"lora.targets is empty; any of {', '.join(PROJECTIONS)} is needed")
        for name in self.targets:
            if name not in PROJECTIONS:
                raise unknown_name("projection in lora.targets", str(name), PROJECTIONS)
        if len(set(self.targets)) < len(self.targets):
            raise InputError(f"lora.targets names a projection twice: {', '.join(self.targets)}")

    @property
    def scale(self) -> float:
        """The factor on the adapters' product, alpha / rank."""
        return self.alpha / self.rank

    def trains(self, path: tuple[str, ...]) -> bool:
        """Returns whether the parameter at this path of the tree is trained."""
        return (
            path[-1] in ("lora_a", "lora_b")
            or (self.train_embeddings and path[-1] == "embedding")
            or (self.train_norms and path[-1] == "scale")
        )


def adapters(config: LlamaConfig, lora: Lora | None) -> tuple[Parameter, ...]:
    """Lists the adapters of a model: `lora_a` and `lora_b` per adapted kernel, none without `lora`."""
    return () if lora is None else tuple(e.of(config, lora.rank) for e in ADAPTERS if e.path[-2] in lora.targets)


def split_trained(params: Mapping[str, Any], lora: Lora | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a model's parameters into trained and frozen ones.

    Args:
      params: nested mapping, as returned by `Llama.parameters()`.
      lora: the adapters; None trains all parameters.

    Returns:
      Two nested dicts, trained and frozen; `training.backward.merge` joins them again.
    """
    if lora is None:
        return dict(params), {}
    return _where(params, lora, True), _where(params, lora, False)


def _where(tree: Mapping[str, Any], lora: Lora, trained: bool, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = (*prefix, key)
        if isinstance(value, Mapping):
            if inner := _where(value, lora, trained, path):
                found[key] = inner
        elif lora.trains(path) == trained:
            found[key] = value
    return found


def merged_kernel(
    kernel: Float[np.ndarray, "... I O"],
    lora_a: Float[np.ndarray, "... I R"],
    lora_b: Float[np.ndarray, "... R O"],
    scale: float,
) -> Float[np.ndarray, "... I O"]:
    """Merges a projection's kernel and its adapters into one matrix, in host memory.

    Args:
      kernel: [..., in, out], of any float dtype.
      lora_a: [..., in, rank].
      lora_b: [..., rank, out].
      scale: alpha / rank.

    Returns:
      float32 kernel + lora_a @ lora_b * scale.
    """
    kernel, lora_a, lora_b = (np.asarray(array, np.float32) for array in (kernel, lora_a, lora_b))
    return kernel + np.matmul(lora_a * np.float32(scale), lora_b)
