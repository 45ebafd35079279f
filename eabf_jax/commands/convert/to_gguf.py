"""`python convert/to_gguf.py`: a Hugging Face directory, a native model or a run to a GGUF file."""

import argparse
import functools

from eabf_jax.commands import convert
from eabf_jax.interop.gguf_writer import KINDS, to_gguf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    convert.add_arguments(parser, src="Hugging Face, native model or run directory", dst=".gguf file to write")
    convert.add_checkpoint(parser)
    parser.add_argument("--dtype", choices=list(KINDS), help="dtype of the matrices (default: as stored)")


run = functools.partial(convert.run, to_gguf)
