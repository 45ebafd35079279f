"""`python convert/from_hf.py`: a Hugging Face directory to a native model directory."""

import argparse
import functools

from eabf_jax.commands import convert
from eabf_jax.interop.huggingface import from_hf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    convert.add_arguments(
        parser,
        src="directory with config.json and safetensors files, or with PEFT's LoRA adapters",
        dst="native model directory to write",
    )
    parser.add_argument("--base", help="base model's directory, for PEFT's adapters (default: the one they name)")
    parser.add_argument(
        "--pad-embeddings",
        action="store_true",
        help="append rows for tokens that have none, each the mean of the others",
    )


run = functools.partial(convert.run, from_hf)
