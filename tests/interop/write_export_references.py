"""Writes small exported models of every scheme that needs our model code, each with our own logits beside it.

python tests/interop/write_export_references.py DIR
python tests/interop/check_export_in_transformers.py DIR     # in an environment with any transformers >= 4.46
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from eabf_jax.interop import native
from eabf_jax.interop.huggingface import to_hf
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama
from eabf_jax.rope import Scheme, compose, scheme

WINDOW = 16
BY_PARTS = scheme("ntk_by_parts", base=10_000.0, factor=4.0, pretrained_window=WINDOW)
YARN = scheme("yarn", base=10_000.0, factor=4.0, pretrained_window=WINDOW)
DYNAMIC_NTK = scheme("dynamic_ntk", base=10_000.0, factor=2.0, pretrained_window=WINDOW)
DYNAMIC_YARN = scheme("dynamic_yarn", base=10_000.0, pretrained_window=WINDOW)
LLAMA3 = scheme("llama3", base=10_000.0, factor=4.0, pretrained_window=WINDOW)
ENTROPY = {"type": "entropy_aware", "pretrained_window": WINDOW, "unscaled_layers": 1}

# Cached decoding equals a full forward only where frequencies are fixed or there is but one layer.
MODELS: dict[str, tuple[Scheme, int]] = {
    "eabf": (scheme("eabf", base=50_000.0, pretrained_window=WINDOW, unscaled_layers=2), 3),
    "eabf_all_layers": (scheme("eabf", base=50_000.0, pretrained_window=WINDOW, unscaled_layers=0), 3),
    "by_parts_entropy": (compose(frequencies=BY_PARTS, logit_scale=ENTROPY), 3),
    "yarn_entropy": (compose(frequencies=YARN, logit_scale=ENTROPY), 3),
    "pi_entropy": (compose(frequencies=scheme("pi", base=10_000.0, factor=3.0), logit_scale=ENTROPY), 3),
    "ntk_entropy": (compose(frequencies=scheme("ntk", base=10_000.0, factor=3.0), logit_scale=ENTROPY), 3),
    "llama3_entropy": (compose(frequencies=LLAMA3, logit_scale=ENTROPY), 3),
    "dynamic_yarn": (DYNAMIC_YARN, 3),
    "dynamic_yarn_one_layer": (DYNAMIC_YARN, 1),
    "dynamic_ntk_entropy": (compose(frequencies=DYNAMIC_NTK, logit_scale={**ENTROPY, "unscaled_layers": 0}), 1),
}


def write(root: Path) -> None:
    """Writes one Hugging Face directory per entry of MODELS, with references.npz in it."""
    tokens = np.random.default_rng(1).integers(3, 97, (2, 48))
    initialised: dict[int, Any] = {}
    for name, (rope, layers) in MODELS.items():
        config = LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, rope=rope,
        )  # fmt: skip
        if layers not in initialised:
            initialised[layers] = Llama(config, rngs=nnx.Rngs(0)).parameters()
        model = Llama.from_params(config, initialised[layers])
        native_directory = root / f".{name}"
        native_directory.mkdir(parents=True)
        native.write_model_json(native_directory, config)
        native.save_params(native_directory, initialised[layers])
        to_hf(native_directory, root / name)
        forward = jax.jit(lambda x, model=model: model(x))
        references = {"tokens": tokens, "logits": np.asarray(forward(tokens))}
        if rope.depends_on_length:  # the same tokens have other frequencies in a shorter text
            references["short_logits"] = np.asarray(forward(tokens[:, :9]))
        np.savez(root / name / "references.npz", **references)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
