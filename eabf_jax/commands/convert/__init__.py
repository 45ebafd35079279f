"""What the scripts of `convert/` share: their options, and a summary of the result."""

import argparse
import time
from collections.abc import Callable
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser, *, src: str, dst: str) -> None:
    """Declares the options that all scripts share; `src` and `dst` are help texts."""
    parser.add_argument("--src", required=True, help=src)
    parser.add_argument("--dst", required=True, help=dst)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result at --dst, and nothing else")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Declares the options that choose the weights of a run."""
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the latest)")
    parser.add_argument("--base", help="base model of adapters, if it has moved")


def run(convert: Callable[..., Any], arguments: argparse.Namespace) -> None:
    """Calls `convert` with source, destination and the other options by name; prints the size and duration."""
    options, start = vars(arguments).copy(), time.perf_counter()
    src, dst = options.pop("src"), options.pop("dst")
    done = convert(src, dst, **options)
    print(f"{done.tensors} tensors, {done.nbytes:,} bytes, {time.perf_counter() - start:.1f} s -> {dst}")
