"""The `eabf` command; `train.py` and the scripts of `convert/` go through it as well."""

import argparse
import contextlib
import dataclasses
import errno
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.interop.directory import write_json

# What a wrong path on the command line ends in, wherever it is first touched.
_PATH_ERRORS = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG)


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with its complaints as one line like those about any other input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; `{self.prog} --help` lists what is right")


class Command(NamedTuple):
    """One subcommand: modules are imported only when it runs, so that `--help` is quick."""

    summary: str
    run: Callable[[list[str]], None]


def run(command: Callable[[], None]) -> NoReturn:
    """Runs a command to the process's exit: 0, or 2 with one line for input that the user can correct.

    Args:
      command: what to do; it raises InputError for bad input.
    """
    # Orbax, Grain and TFDS tell their own story at INFO; what the user needs to know is printed.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        command()
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"no space left on the device that holds {error.filename or 'the output'}")
        if error.errno not in _PATH_ERRORS or error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; a path that can be read, or written, is needed")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _check_file(option: str, path: str | None, suffixes: Sequence[str] = ()) -> None:
    """Refuses a file that could not be written, before the hours of work whose figures it is for."""
    if path is None:
        return
    target = Path(path)
    if target.is_dir():
        raise InputError(f"{option} {path} is a directory; expected a file to write")
    if not target.parent.is_dir():
        raise InputError(f"{option} {path}: there is no directory {target.parent}; make it, or name another file")
    if suffixes and target.suffix not in suffixes:
        raise InputError(f"{option} {path} ends in {target.suffix!r}; expected one of {', '.join(suffixes)}")


def _prepare(arguments: list[str]) -> None:
    from eabf_jax.data.prepare import add_arguments, run
    from eabf_jax.interop.tokenizer import load_tokenizer

    parser = ArgumentParser("eabf prepare", description=COMMANDS["prepare"].summary)
    add_arguments(parser)
    parsed = parser.parse_args(arguments)
    _check_file("--json", parsed.json)
    report = run(parsed, load_tokenizer)
    if parsed.json:
        write_json(Path(parsed.json), dataclasses.asdict(report))
        print(f"counts: {parsed.json}")


def _train(arguments: list[str]) -> None:
    from eabf_jax.parallel.mesh import gpu_defaults, use_every_core
    from eabf_jax.training.recipe import load_config

    config = load_config(arguments, prog="train.py")
    devices = math.prod(config.mesh.sizes)  # negative: an axis takes all that are left
    rows = 1 if config.compute.microbatch_size == "auto" else config.compute.microbatch_size
    use_every_core(devices if devices > 0 else config.recipe.batch_size // rows)
    gpu_defaults()
    import jax

    from eabf_jax.parallel.processes import connected

    with connected() if config.distributed else contextlib.nullcontext():
        from eabf_jax.training.trainer import train

        done = train(config)
        if jax.process_index() == 0:
            print(f"{done}: finished; python convert/to_hf.py --src {done} --dst DIR exports it")


def _evaluate(arguments: list[str]) -> None:
    from rich.console import Console

    from eabf_jax.analysis.figures import loss_by_position
    from eabf_jax.evaluation import command, harness_command
    from eabf_jax.parallel.mesh import use_every_core

    parser = ArgumentParser("eabf evaluate", description=COMMANDS["evaluate"].summary)
    kinds = parser.add_subparsers(dest="kind", required=True)
    perplexity = kinds.add_parser("perplexity", help="loss by band of positions, for several models side by side")
    command.add_arguments(perplexity)
    harness_command.add_arguments(kinds.add_parser("harness", help="tasks of lm-evaluation-harness, LongBench's first"))
    parsed = parser.parse_args(arguments)
    _check_file("--json", parsed.json)
    if parsed.kind == "harness":
        _evaluate_harness(parsed)
        return
    _check_file("--figure", parsed.figure, (".png", ".svg", ".pdf"))
    use_every_core()
    comparison = command.compare(parsed)
    Console().print(command.table(comparison))
    if parsed.json:
        write_json(Path(parsed.json), command.as_json(comparison, parsed))
        print(f"figures: {parsed.json}")
    if parsed.figure:
        loss_by_position(
            comparison.losses,
            Path(parsed.figure),
            pretrained_window=comparison.pretrained_window,
            title=f"loss by position, {comparison.documents} documents",
        )
        print(f"picture: {parsed.figure}")


def _evaluate_harness(parsed: argparse.Namespace) -> None:
    from rich.console import Console

    from eabf_jax.evaluation import harness_command
    from eabf_jax.parallel.mesh import gpu_defaults, use_every_core

    gpu_defaults()
    use_every_core()
    report = harness_command.run(parsed)
    Console().print(harness_command.table(report))
    if parsed.json:
        write_json(Path(parsed.json), harness_command.as_json(report, parsed))
        print(f"figures: {parsed.json}")


def _generate(arguments: list[str]) -> None:
    from eabf_jax.inference import command

    parser = ArgumentParser("eabf generate", description=COMMANDS["generate"].summary)
    command.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    _check_file("--json", parsed.json)
    figures = command.run(parsed)
    if parsed.json:
        write_json(Path(parsed.json), figures)


def _compile(arguments: list[str]) -> None:
    from rich.console import Console

    from eabf_jax.parallel.mesh import gpu_defaults
    from eabf_jax.training import compile as command

    parser = ArgumentParser(
        "eabf compile",
        description=COMMANDS["compile"].summary,
        epilog=command.EPILOG,
        usage="%(prog)s --config_path FILE [--topology SLICE | --device NAME --devices N] [--dotted.key VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    parsed, overrides = parser.parse_known_args(arguments)
    _check_file("--json", parsed.json)
    gpu_defaults()
    figures = command.run(parsed, overrides)
    Console().print(command.table(figures))
    if parsed.json:
        write_json(Path(parsed.json), figures)
        print(f"figures: {parsed.json}")


COMMANDS = {
    "prepare": Command("turn ShareGPT files into a dataset of tokens and loss masks", _prepare),
    "train": Command("run a training configuration (the same as train.py)", _train),
    "compile": Command("predict a train step's memory, or compile it for a TPU slice without a TPU", _compile),
    "generate": Command("continue texts, or keep a conversation", _generate),
    "evaluate": Command("measure models on datasets and benchmark tasks", _evaluate),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The `eabf` command.

    Args:
      arguments: the command line; None takes the process's own.
    """
    summaries = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    parser = ArgumentParser(
        "eabf",
        description="Extend the context window of LLaMA models.",
        epilog=f"commands:\n{summaries}\n\n`eabf COMMAND --help` describes each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own")
    given = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> None:
        name = parser.parse_args(given[:1]).command
        if name not in COMMANDS:
            raise unknown_name("command", name, COMMANDS)
        COMMANDS[name].run(given[1:])

    run(command)
