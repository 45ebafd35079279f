"""`python convert/from_hf.py`: a Hugging Face directory to a native model directory."""

import argparse
import functools

from eabf_jax.commands import convert
from eabf_jax.interop.huggingface import from_hf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    convert.add_arguments(
        parser, src="directory with config.json and safetensors files", dst="native model directory to write"
    )


run = functools.partial(convert.run, from_hf)
