"""Long contexts for LLaMA models from a hundred samples: entropy-aware ABF and its peers, in JAX."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "open_weights"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import eabf_jax.rope` loads neither Orbax nor a tokenizer library.
    if name in ("load", "open_weights"):
        from eabf_jax.interop import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
