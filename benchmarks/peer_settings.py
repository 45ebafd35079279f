"""Names and choices of the training peer's switches. Imports neither JAX nor PyTorch."""

import fnmatch
import itertools
from typing import NamedTuple


class Setting(NamedTuple):
    """One way to set the peer, written as one word with slashes between the fields."""

    attention: str
    layers: str
    kernels: str
    checkpointing: str
    precision: str

    def __str__(self) -> str:
        return "/".join(self)


CHOICES: dict[str, tuple[str, ...]] = {
    # the kernel of scaled_dot_product_attention: PyTorch's own choice, or only the named one
    "attention": ("default", "cudnn", "flash"),
    # compiled: every decoder layer through torch.compile
    "layers": ("eager", "compiled"),
    # liger: Liger's RMSNorm, rotary embedding, SwiGLU and fused linear cross-entropy
    "kernels": ("none", "liger"),
    # gradient checkpointing in every layer, or all activations kept
    "checkpointing": ("checkpointed", "kept"),
    # parameters, gradients and moments in bfloat16; or in float32, with products in bfloat16 (autocast)
    "precision": ("bfloat16", "autocast"),
}
ALL = tuple(Setting(*words) for words in itertools.product(*CHOICES.values()))


def matching(patterns: str) -> list[Setting]:
    """Returns the settings that match patterns.

    Args:
      patterns: comma-separated settings, with `*` for every choice: "*/compiled/liger/checkpointed/bfloat16".

    Returns:
      The settings, in the order of ALL; those without Liger's kernels first.
    Raises:
      ValueError: a pattern matches no setting.
    """
    wanted = [pattern for pattern in patterns.split(",") if pattern]
    for pattern in wanted:
        if not fnmatch.filter(map(str, ALL), pattern):
            told = "; ".join(f"{name}: {' or '.join(choices)}" for name, choices in CHOICES.items())
            raise ValueError(f"no setting of the peer matches {pattern!r}; they are {'/'.join(CHOICES)} ({told})")
    found = [one for one in ALL if any(fnmatch.fnmatchcase(str(one), pattern) for pattern in wanted)]
    return sorted(found, key=lambda one: one.kernels != "none")
