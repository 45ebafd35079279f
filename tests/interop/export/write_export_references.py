"""Writes small exported models of every registered scheme and of compositions, each with our logits as references.

PYTHONPATH=tests/support python tests/interop/export/write_export_references.py DIR
python tests/interop/export/check_export_in_transformers.py DIR     # in an environment with any transformers >= 4.46
"""

import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from family import FULL, SAME, SIZES
from flax import nnx

from eabf_jax.interop import native
from eabf_jax.interop.architectures import FEATURES
from eabf_jax.interop.huggingface import config_from_hf, to_hf
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama
from eabf_jax.rope import Scheme, compose, import_schemes, parameters_of, scheme, scheme_names

WINDOW = 16
ENTROPY = {"type": "entropy_aware", "pretrained_window": WINDOW, "unscaled_layers": 1}
# For the schemes with these parameters; a head has 8 / 2 frequencies.
GIVEN = {
    "factor": 4.0,
    "pretrained_window": WINDOW,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
}


def user_schemes(directory: Path) -> Path:
    """Writes the example in docs/schemes.md as a user's file; it registers three schemes."""
    example = re.search(r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs/schemes.md").read_text(), re.DOTALL)
    assert example is not None
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "my_schemes.py"
    path.write_text(example[1])
    return path


def models() -> dict[str, tuple[Scheme, int, dict[str, Any]]]:
    """Returns scheme, number of layers and features of every model.

    They are all registered schemes, compositions, and the architectures with fixed and with changing frequencies.
    """
    named = {
        name: scheme(name, **{key: value for key, value in GIVEN.items() if key in parameters_of(name)})
        for name in scheme_names()
    }
    by_layer = {"type": "layer_temperature", "pretrained_window": WINDOW, "betas": [0.0, 0.5, -0.25]}
    all_layers = {**ENTROPY, "unscaled_layers": 0}
    # Cached decoding equals a full forward only with fixed frequencies or a single layer.
    composed = {
        "yarn_entropy": (compose(named["yarn"], ENTROPY), 3),
        "eabf_all_layers": (compose({"type": "abf"}, all_layers), 3),
        "abf_by_layer": (compose({"type": "abf"}, by_layer), 3),
        "dynamic_yarn_one_layer": (named["dynamic_yarn"], 1),
        "dynamic_ntk_entropy": (compose(named["dynamic_ntk"], all_layers), 1),
        "longrope_entropy_one_layer": (compose(named["longrope"], all_layers), 1),
        "widening_one_layer": (named["widening"], 1),
    }
    plain = {**{name: (rope, 3) for name, rope in named.items()}, **composed}
    made = {name: (rope, layers, {}) for name, (rope, layers) in plain.items()}
    for kind, keys in (FULL | SAME).items():
        read = config_from_hf({**SIZES, **keys, "model_type": kind})
        own = {name: getattr(read, name) for name in ("model_type", *FEATURES)}
        made[f"{kind}_eabf"] = (compose({"type": "abf"}, ENTROPY), 3, own)
        if kind in ("mistral", "qwen3", "phi3"):
            one_layer = {**own, "full_attention_layers": ()}
            made[f"{kind}_dynamic"] = (composed["dynamic_ntk_entropy"][0], 1, one_layer)
    return made


def write(root: Path) -> None:
    """Writes a Hugging Face directory with references.npz for each model."""
    import_schemes(str(user_schemes(root)))
    tokens = np.random.default_rng(1).integers(3, 97, (2, 48))
    initialised: dict[str, Llama] = {}
    for name, (rope, layers, features) in models().items():
        config = LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, rope=rope, **features,
        )  # fmt: skip
        key = f".{layers}_layers_{config.model_type}_{len(features)}"
        source = root / key
        if key not in initialised:
            drawn = jax.jit(lambda config=config: Llama(config, rngs=nnx.Rngs(0)).parameters())()
            if features:  # norms and biases that do something
                noise = np.random.default_rng(2)
                drawn = jax.tree.map(lambda x, noise=noise: x + 0.1 * noise.normal(size=x.shape).astype(x.dtype), drawn)
            initialised[key] = Llama.from_params(config, drawn)
            source.mkdir(parents=True)
            native.save_params(source, initialised[key].parameters())
        model = initialised[key]
        model.config = config
        native.write_model_json(source, config)
        to_hf(source, root / name)
        forward = jax.jit(lambda x, model=model: model(x))
        references = {"tokens": tokens, "logits": np.asarray(forward(tokens))}
        if rope.depends_on_length:  # tokens have other frequencies in a shorter text
            references["short_logits"] = np.asarray(forward(tokens[:, :9]))
        np.savez(root / name / "references.npz", **references)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
