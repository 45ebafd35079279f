"""Converts a GGUF file to Hugging Face: python convert/from_gguf.py --src FILE --dst DIR [--dtype NAME]."""

from eabf_jax.cli import convert

if __name__ == "__main__":
    convert("from_gguf")
