"""`python convert/from_gguf.py`: a GGUF file to a Hugging Face directory."""

import argparse
import functools

from eabf_jax.commands import convert
from eabf_jax.interop.gguf import from_gguf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    convert.add_arguments(
        parser, src="the .gguf file, or any part of a split one", dst="Hugging Face directory to write"
    )
    parser.add_argument("--dtype", choices=convert.DTYPES, default="float32", help="weight dtype (default: float32)")


run = functools.partial(convert.run, from_gguf)
