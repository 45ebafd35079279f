"""`eabf evaluate redraw`: table, sums and picture from a report, without a model."""

import argparse
import functools
from pathlib import Path
from typing import Any

from eabf_jax.commands import evaluate
from eabf_jax.commands.evaluate import perplexity, retrieval
from eabf_jax.errors import InputError
from eabf_jax.interop.directory import read_json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    parser.add_argument("report", metavar="FILE", help="the --json file of perplexity, passkey or line-retrieval")
    parser.add_argument("--json", help="write the report to this file, with sums and intervals computed again")
    parser.add_argument("--figure", help="draw the picture in this file (.png, .svg or .pdf)")


def run(arguments: argparse.Namespace) -> None:
    """Reads the report, and prints, writes and draws it again."""
    report = read_json_object(Path(arguments.report))
    command: Any = retrieval if "cells" in report else perplexity
    try:
        found = command.read(report)
        table, figures = command.table(found), command.figures(found)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{arguments.report} is not a report that can be drawn ({type(error).__name__}: {error}); a file written "
            "by --json of `eabf evaluate perplexity`, `passkey` or `line-retrieval` is needed"
        ) from error
    evaluate.report(arguments, table, {**report, **figures}, functools.partial(command.draw, found))
