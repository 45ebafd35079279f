"""The `eabf` command; `train.py` and the scripts of `convert/` go through it as well."""

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from eabf_jax.commands import COMMANDS, CONVERSIONS, EVALUATIONS
from eabf_jax.commands.options import check_outputs
from eabf_jax.destination import no_space
from eabf_jax.errors import InputError, unknown_name

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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The `eabf` command, by default with the process's own command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    run(lambda: _dispatch(given))


def convert(name: str) -> NoReturn:
    """The script of `convert/` that has this name in `commands.CONVERSIONS`."""
    run(lambda: _call(None, CONVERSIONS[name], f"convert.{name}", sys.argv[1:]))


def run(command: Callable[[], None]) -> NoReturn:
    """Runs a command to the process's exit: 0, or 2 with one line if it raises InputError for bad input."""
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
        if full := no_space(error):
            _fail(f"{full[0]} on the device that holds {error.filename or 'the output'}")
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


def _dispatch(given: list[str]) -> None:
    name = _chosen("eabf", "Extend the context window of LLaMA models.", "command", COMMANDS, given)
    summary, module, prog, rest = COMMANDS[name], name, f"eabf {name}", given[1:]
    if name == "evaluate":
        kind = _chosen(prog, summary, "evaluation", EVALUATIONS, rest)
        summary, module, prog, rest = EVALUATIONS[kind], f"{name}.{kind}", f"{prog} {kind}", rest[1:]
    _call(prog, summary, module.replace("-", "_"), rest)


def _chosen(prog: str, description: str, kind: str, summaries: Mapping[str, str], given: list[str]) -> str:
    """The name that the first argument gives."""
    width = max(10, *map(len, summaries))
    listed = "\n".join(f"  {name:<{width}} {summary}" for name, summary in summaries.items())
    parser = ArgumentParser(
        prog,
        description=description,
        epilog=f"{kind}s:\n{listed}\n\n`{prog} {kind.upper()} --help` describes each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        imports=False,
    )
    parser.add_argument(kind, metavar=kind.upper())
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=f"the {kind}'s own")
    name: str = getattr(parser.parse_args(given[:1]), kind)
    if name not in summaries:
        raise unknown_name(kind, name, summaries)
    return name


def _call(prog: str | None, summary: str, module: str, given: list[str]) -> None:
    """Runs a command's module with its own command line."""
    command = importlib.import_module(f"eabf_jax.commands.{module}")
    if not hasattr(command, "add_arguments"):  # all that `train` takes is a configuration, which is read elsewhere
        _, keys = ArgumentParser(prog, add_help=False, allow_abbrev=False).parse_known_args(given)
        command.run(keys)
        return
    parser = ArgumentParser(prog, description=summary)
    command.add_arguments(parser)
    arguments, others = parser.parse_known_args(given)
    if hasattr(arguments, "configuration_keys"):
        arguments.configuration_keys = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    check_outputs(arguments)
    command.run(arguments)
