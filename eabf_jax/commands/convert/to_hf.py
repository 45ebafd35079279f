"""`python convert/to_hf.py`: a native model or run directory to a Hugging Face one."""

import argparse
import functools

from eabf_jax.commands import convert
from eabf_jax.interop.huggingface import to_hf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    convert.add_arguments(
        parser, src="native model or run directory (model.json, checkpoints/)", dst="Hugging Face directory to write"
    )
    convert.add_checkpoint(parser)
    parser.add_argument("--dtype", choices=convert.DTYPES, help="dtype of the weights (default: as stored)")
    parser.add_argument(
        "--as",
        dest="model_type",
        metavar="MODEL_TYPE",
        help="architecture to export as, if it computes the same: ministral3 for eabf_stair",
    )


run = functools.partial(convert.run, to_hf)
