"""Converts a model or run to GGUF for llama.cpp: python convert/to_gguf.py --src DIR --dst FILE [--dtype NAME]."""

from eabf_jax.cli import convert

if __name__ == "__main__":
    convert("to_gguf")
