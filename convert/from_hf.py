"""Converts a Hugging Face directory to a native one: python convert/from_hf.py --src DIR --dst DIR [--base DIR]."""

from eabf_jax.cli import convert

if __name__ == "__main__":
    convert("from_hf")
