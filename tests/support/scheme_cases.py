"""Schemes that transformers can and cannot express, and their parameters."""

from eabf_jax.rope import compose, scheme

EABF = {"type": "eabf", "base": 500_000.0, "pretrained_window": 4096, "unscaled_layers": 2}
BY_PARTS = {
    "type": "ntk_by_parts",
    "base": 10_000.0,
    "factor": 4.0,
    "pretrained_window": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
ENTROPY_AWARE = {"type": "entropy_aware", "pretrained_window": 4096, "unscaled_layers": 2}
# Lists for a head size of 64.
LONGROPE = {
    "short_factor": [1.0 + 0.01 * j for j in range(32)],
    "long_factor": [1.0 + 0.1 * j * j for j in range(32)],
    "pretrained_window": 4096,
}
STAIR = {"type": "llama4_temperature", "pretrained_window": 4096, "beta": 0.1}
WITHOUT_A_NAME = compose(frequencies=BY_PARTS, logit_scale=ENTROPY_AWARE)
KNOWN_TO_HF = [
    scheme("default"),
    scheme("default", base=500_000.0),
    scheme("abf"),
    scheme("pi", factor=4),
    scheme("dynamic_ntk", factor=2.5, pretrained_window=4096),
    scheme("ntk_by_parts", factor=4, pretrained_window=4096),
    scheme("ntk_by_parts", factor=4, pretrained_window=4096, beta_fast=64, beta_slow=2),
    scheme("yarn", factor=8, pretrained_window=4096),
    scheme("yarn", factor=8, pretrained_window=4096, attention_factor=0.875),
    scheme("yarn", factor=8, pretrained_window=4096, attention_factor=1),
    scheme("yarn", factor=8, pretrained_window=4096, truncate=False),
    scheme("ntk_by_parts", factor=4, pretrained_window=4096, truncate=False),
    *(scheme("pi", factor=0.5), scheme("yarn", factor=0.5, pretrained_window=4096)),
    scheme("llama3", base=500_000, factor=8, pretrained_window=8192),
    scheme("longrope", factor=32, **LONGROPE),
    scheme("longrope", base=500_000, factor=8, attention_factor=1.1, **LONGROPE),
]
ONLY_OURS = [
    scheme("eabf", pretrained_window=4096),
    scheme("eabf", base=1e6, pretrained_window=8192, unscaled_layers=0),
    scheme("dynamic_yarn", factor=8, pretrained_window=4096),
    scheme("dynamic_yarn", factor=8, pretrained_window=4096, truncate=False),
    scheme("ntk", factor=4),
    WITHOUT_A_NAME,
    compose(scheme("dynamic_ntk", factor=4, pretrained_window=512), ENTROPY_AWARE),
    compose(scheme("longrope", factor=8, **LONGROPE), ENTROPY_AWARE),
    *(scheme("nope"), scheme("eabf_stair", pretrained_window=4096)),
    compose(BY_PARTS, STAIR),
    compose({"type": "abf"}, {**STAIR, "one_based": True}),
    compose({"type": "abf"}, {"type": "smooth_temperature", "pretrained_window": 4096}),
    compose({"type": "abf"}, {"type": "layer_temperature", "pretrained_window": 4096, "betas": [0.0, 0.25, -0.125]}),
    compose({"type": "abf"}, {"type": "ssmax", "scaling": 0.43}),
]
# A scheme of the example in docs/schemes.md, which --import registers.
SHARP = {"type": "sharp_slow_half", "base": 20_000.0, "factor": 4.0, "pretrained_window": 16, "strength": 0.5}
