"""Exports a model or run to Hugging Face: python convert/to_hf.py --src DIR --dst DIR [--step N] [--dtype NAME]."""

from eabf_jax.cli import convert

if __name__ == "__main__":
    convert("to_hf")
