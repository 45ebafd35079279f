"""`python convert/to_hf.py`: a native model or run directory to a Hugging Face one."""

import argparse
import functools

from eabf_jax.commands import convert
from eabf_jax.interop.huggingface import to_hf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    convert.add_arguments(
        parser, src="native model or run directory (model.json, checkpoints/)", dst="Hugging Face directory to make"
    )
    parser.add_argument("--step", type=int, help="which checkpoint; the latest if not given")
    parser.add_argument("--dtype", choices=convert.DTYPES, help="as stored if not given")
    parser.add_argument("--base", help="of adapters: the model they belong to, if it is not where it was")


run = functools.partial(convert.run, to_hf)
