"""What the scripts of `convert/` share: from a directory or file to a directory."""

import argparse
import time
from collections.abc import Callable
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser, *, src: str, dst: str) -> None:
    """Declares what all of them take.

    Args:
      src: what to convert, for its help.
      dst: what to make, likewise.
    """
    parser.add_argument("--src", required=True, help=src)
    parser.add_argument("--dst", required=True, help=dst)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier call made at --dst, and nothing else"
    )


def run(convert: Callable[..., Any], arguments: argparse.Namespace) -> None:
    """Converts, and tells how much it was.

    Args:
      convert: takes source, destination and, by name, all other options.
    """
    options, start = vars(arguments).copy(), time.perf_counter()
    src, dst = options.pop("src"), options.pop("dst")
    done = convert(src, dst, **options)
    print(f"{done.tensors} tensors, {done.nbytes:,} bytes, {time.perf_counter() - start:.1f} s -> {dst}")
