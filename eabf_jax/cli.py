"""The `eabf` command; `train.py` and the scripts of `convert/` go through it as well."""

import argparse
import contextlib
import dataclasses
import errno
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from eabf_jax.console import Grid, show
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.interop.directory import read_json_object, write_json

# What a wrong path on the command line ends in, wherever it is first touched.
_PATH_ERRORS = (
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY),
)


class _Import(argparse.Action):
    """Imports a user's schemes as soon as the option is read, so that all that follows knows them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from eabf_jax.rope import import_schemes

        import_schemes(values)


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with its complaints as one line like those about any other input, and with `--import`."""

    def __init__(self, *arguments: Any, imports: bool = True, **options: Any):
        super().__init__(*arguments, **options)
        if not imports:
            return
        self.add_argument(
            "--import",
            action=_Import,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="a .py file or a module that registers rotary schemes of your own; repeatable",
        )

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
    except BrokenPipeError:
        # Who read the output has seen enough. What is left of it must not be written as Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
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
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: nothing can be written in {target.parent}; name another file")
    if suffixes and target.suffix not in suffixes:
        raise InputError(f"{option} {path} ends in {target.suffix!r}; expected one of {', '.join(suffixes)}")
    if not suffixes and target.is_file() and target.stat().st_size:
        # Figures of an earlier call are replaced; a file that a slip of the fingers names is not.
        with target.open("rb") as file:
            if file.read(1) != b"{":
                raise InputError(f"{option} {path} is there, and holds no figures (a JSON object): name another file")


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

    _, keys = ArgumentParser("train.py", add_help=False, allow_abbrev=False).parse_known_args(arguments)
    config = load_config(keys, prog="train.py")
    # Negative: an axis takes all that are left.
    devices = -1 if config.mesh == "auto" else math.prod(config.mesh.sizes)
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
    _dispatch("eabf evaluate", COMMANDS["evaluate"].summary, "evaluation", EVALUATIONS, arguments)


def _perplexity(arguments: list[str]) -> None:
    from eabf_jax.evaluation import perplexity_command as command

    parser = ArgumentParser("eabf evaluate perplexity", description=EVALUATIONS["perplexity"].summary)
    command.add_arguments(parser)
    parsed = _parse_evaluation(parser, arguments)
    comparison = command.compare(parsed)
    _report(parsed, command.table(comparison), command.as_json(comparison, parsed), comparison)


def _passkey(arguments: list[str]) -> None:
    from eabf_jax.evaluation.retrieval_command import PASSKEY

    _retrieval("passkey", PASSKEY, arguments)


def _line_retrieval(arguments: list[str]) -> None:
    from eabf_jax.evaluation.retrieval_command import LINE_RETRIEVAL

    _retrieval("line-retrieval", LINE_RETRIEVAL, arguments)


def _retrieval(name: str, task: Any, arguments: list[str]) -> None:
    from eabf_jax.evaluation import retrieval_command as command

    parser = ArgumentParser(f"eabf evaluate {name}", description=EVALUATIONS[name].summary)
    command.add_arguments(parser, task)
    parsed = _parse_evaluation(parser, arguments)
    found = command.run(parsed, task)
    if found.note:
        print(f"note: {found.note}")
    _report(parsed, command.table(found), command.as_json(found, parsed), found)


def _redraw(arguments: list[str]) -> None:
    from eabf_jax.evaluation import perplexity_command, retrieval_command

    parser = ArgumentParser("eabf evaluate redraw", description=EVALUATIONS["redraw"].summary)
    parser.add_argument("report", metavar="FILE", help="what --json of perplexity, passkey or line-retrieval wrote")
    parser.add_argument("--json", help="write it here, sums and intervals computed anew")
    parser.add_argument("--figure", help="draw the picture here (.png, .svg or .pdf)")
    parsed = parser.parse_args(arguments)
    _check_figures(parsed)
    report = read_json_object(Path(parsed.report))
    command: Any = retrieval_command if "cells" in report else perplexity_command
    try:
        found = command.read(report)
        table, figures = command.table(found), command.figures(found)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{parsed.report} is no report that can be drawn ({type(error).__name__}: {error}); what --json of "
            "`eabf evaluate perplexity`, `passkey` or `line-retrieval` wrote is needed"
        ) from error
    _report(parsed, table, {**report, **figures}, found)


def _harness(arguments: list[str]) -> None:
    from eabf_jax.evaluation import harness_command as command

    parser = ArgumentParser("eabf evaluate harness", description=EVALUATIONS["harness"].summary)
    command.add_arguments(parser)
    parsed = _parse_evaluation(parser, arguments)
    report = command.run(parsed)
    _report(parsed, command.table(report), command.as_json(report, parsed))


def _parse_evaluation(parser: ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """What every evaluation does before JAX is first used."""
    from eabf_jax.parallel.mesh import gpu_memory_defaults, use_every_core

    parsed = parser.parse_args(arguments)
    _check_figures(parsed)
    use_every_core()
    gpu_memory_defaults()
    return parsed


def _check_figures(parsed: argparse.Namespace) -> None:
    _check_file("--json", parsed.json)
    _check_file("--figure", getattr(parsed, "figure", None), (".png", ".svg", ".pdf"))


def _report(parsed: argparse.Namespace, table: Grid, figures: dict[str, Any], found: Any = None) -> None:
    """Shows an evaluation's table, and writes the files that were asked for."""
    show(table)
    if parsed.json:
        write_json(Path(parsed.json), {**figures, "table": table.plain()})
        print(f"figures: {parsed.json}")
    if getattr(parsed, "figure", None):
        from eabf_jax.analysis.figures import picture

        picture(found, Path(parsed.figure))
        print(f"picture: {parsed.figure}")


def _generate(arguments: list[str]) -> None:
    from eabf_jax.inference import command
    from eabf_jax.parallel.mesh import gpu_memory_defaults

    parser = ArgumentParser("eabf generate", description=COMMANDS["generate"].summary)
    command.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    _check_file("--json", parsed.json)
    gpu_memory_defaults()
    figures = command.run(parsed)
    if parsed.json:
        write_json(Path(parsed.json), figures)


def _compile(arguments: list[str]) -> None:
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
    show(command.table(figures))
    if parsed.json:
        write_json(Path(parsed.json), figures)
        print(f"figures: {parsed.json}")


COMMANDS = {
    "prepare": Command("turn ShareGPT files into a dataset of tokens and loss masks", _prepare),
    "train": Command("run a training configuration (the same as train.py)", _train),
    "compile": Command("predict a train step's memory, or compile it for a TPU slice without a TPU", _compile),
    "generate": Command("continue texts, or keep a conversation", _generate),
    "evaluate": Command("measure models: perplexity, passkey, line-retrieval, harness; redraw a report", _evaluate),
}


# The kinds of `eabf evaluate`.
EVALUATIONS = {
    "perplexity": Command("loss by band of positions, or perplexity of sliding windows", _perplexity),
    "passkey": Command("find a number in a long text, at any length and depth", _passkey),
    "line-retrieval": Command("find one line's number in a long record of lines", _line_retrieval),
    "harness": Command("tasks of lm-evaluation-harness, LongBench's first", _harness),
    "redraw": Command("table and picture of a report again, from its JSON file", _redraw),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The `eabf` command.

    Args:
      arguments: the command line; None takes the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    run(lambda: _dispatch("eabf", "Extend the context window of LLaMA models.", "command", COMMANDS, given))


def _dispatch(prog: str, description: str, kind: str, commands: Mapping[str, Command], given: list[str]) -> None:
    """Runs the command that the first argument names, with the others."""
    width = max(10, *map(len, commands))
    summaries = "\n".join(f"  {name:<{width}} {command.summary}" for name, command in commands.items())
    parser = ArgumentParser(
        prog,
        description=description,
        epilog=f"{kind}s:\n{summaries}\n\n`{prog} {kind.upper()} --help` describes each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        imports=False,
    )
    parser.add_argument(kind, metavar=kind.upper())
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=f"the {kind}'s own")
    name = getattr(parser.parse_args(given[:1]), kind)
    if name not in commands:
        raise unknown_name(kind, name, commands)
    commands[name].run(given[1:])
