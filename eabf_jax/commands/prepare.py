"""`eabf prepare`: turns files of conversations or texts into a dataset, and shows what each stage kept."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from eabf_jax.commands.options import write_figures
from eabf_jax.console import Grid, show
from eabf_jax.data import chat
from eabf_jax.data.forms import AUTO, FORMATS
from eabf_jax.data.prepare import Options, Report, prepare
from eabf_jax.errors import InputError
from eabf_jax.interop.huggingface import tokenizer_directory
from eabf_jax.interop.tokenizer import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line; its defaults are those of `Options`."""
    fields = [field for field in dataclasses.fields(Options) if field.default is not dataclasses.MISSING]
    parser.set_defaults(**{field.name: field.default for field in fields})
    number: Any = {"type": int, "metavar": "N"}
    add = parser.add_argument
    add(
        "--src",
        nargs="+",
        type=Path,
        required=True,
        metavar="FILE",
        help="files of conversations, prompts and answers, or texts (JSON, JSONL, CSV, Parquet, Arrow, .txt), "
        "directories of such files, or directories saved by Hugging Face datasets",
    )
    add(
        "--format",
        help=f"form of the entries: {', '.join(FORMATS)}; {AUTO} decides by the first entry of each file whose keys it "
        "knows (default: %(default)s)",
    )
    add("--dst", type=Path, required=True, metavar="DIR", help="directory of the dataset to write")
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="a model's directory, for its tokenizer")
    add(
        "--template",
        help=f"chat template: {', '.join(chat.TEMPLATES)}, or {chat.OWN}: the model's, which must mark "
        "what is to be learned with {%% generation %%} (default: %(default)s)",
    )
    add(
        "--min-tokens",
        **number,
        help="drop conversations, and pieces of them, with fewer tokens (default: %(default)s)",
    )
    add("--max-tokens", **number, help="split longer conversations at turn borders (default: %(default)s)")
    add(
        "--num-conversations",
        **number,
        help="number of training records; a smaller set is the beginning of a larger one (default: all)",
    )
    add(
        "--held-out",
        **number,
        help="number of held-out records, the same ones whatever --num-conversations is (default: %(default)s)",
    )
    add(
        "--held-out-min-tokens",
        **number,
        help="hold out only conversations with at least this many tokens, cut at --max-tokens (default: --max-tokens)",
    )
    add("--language", help="keep only this language: en, or any to keep all (default: %(default)s)")
    add("--seed", type=int, help="seed of the order of the conversations (default: %(default)s)")
    add(
        "--portion",
        default="0.0:1.0",
        metavar="START:END",
        help="use only this part of the conversations, by a hash of their ids; "
        "0.0:0.9 and 0.9:1.0 never overlap, whatever the seed (default: %(default)s)",
    )
    add(
        "--keep-complete",
        action="store_true",
        help="use the complete entries of a file that is cut off or malformed, and accept trailing commas",
    )
    add("--overwrite", action="store_true", help="replace a dataset at --dst")
    add("--json", type=Path, metavar="FILE", help="also write the counts to this file")


def _portion(text: str) -> tuple[float, float]:
    start, _, end = text.partition(":")
    try:
        return float(start), float(end)
    except ValueError:
        raise InputError(f"--portion {text!r}: two numbers START:END are needed, such as 0.9:1.0") from None


def run(arguments: argparse.Namespace) -> None:
    """Prepares the dataset and prints the counts."""
    given: dict[str, Any] = vars(arguments) | {"portion": _portion(arguments.portion)}
    given |= {"sources": tuple(arguments.src), "destination": arguments.dst}
    options = Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})
    options.check()
    report = prepare(options, load_tokenizer(tokenizer_directory(arguments.tokenizer)))
    console = Console()
    for table in tables(report):
        show(table)
    skipped = [f"{path} was not read" for path in report.skipped_files]
    for note in (*report.broken_files, *skipped, *report.shortages):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    write_figures(arguments, dataclasses.asdict(report), "counts")


def tables(report: Report) -> Iterator[Grid]:
    """Yields the counts as tables, by stage and by split."""
    stages = Grid(["stage"], ["count"], title="Conversations")
    for name, count in report.stages():
        stages.add([name], [f"{count:,}"])
        for note, number in report.notes(name):
            stages.add([f"  {note}"], [f"{number:,}"])
    yield stages
    splits = Grid(["split"], ["records", "conversations", "tokens", "response tokens"], title=report.destination)
    for name, counts in report.splits.items():
        figures = (counts.records, counts.conversations, counts.tokens, counts.response_tokens)
        splits.add([name], [f"{figure:,}" for figure in figures])
    yield splits
