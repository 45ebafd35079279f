"""The `eabf` command, which `train.py` and the scripts of `convert/` also use."""

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
from eabf_jax.errors import InputError, Stopped, unknown_name
from eabf_jax.signals import handled

# Errors that a wrong path on the command line can cause.
_PATH_ERRORS = (
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY),
)


class _Import(argparse.Action):
    """The action of `--import`, which imports a user's schemes at once, so that later arguments can name them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from eabf_jax.rope import import_schemes

        import_schemes(values)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that has the option `--import`, and raises InputError for bad arguments."""

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
            help="a .py file or module that registers your own rotary schemes; repeatable",
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; `{self.prog} --help` lists the options")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the `eabf` command with the given arguments, or else with the process's own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    run(lambda: _dispatch(given))


def convert(name: str) -> NoReturn:
    """Runs the script of `convert/` with this name in `commands.CONVERSIONS`."""
    run(lambda: _call(None, CONVERSIONS[name], f"convert.{name}", sys.argv[1:]))


def run(command: Callable[[], None]) -> NoReturn:
    """Runs a command and exits: with status 0, or for bad input with status 2 and one line of error.

    docs/exit_statuses.md has every status.
    """
    # Orbax, Grain and TFDS log details at INFO that users do not need.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with handled():
            command()
    except InputError as error:
        _fail(str(error))
    except BrokenPipeError:
        # The reader closed the pipe; discard what Python would otherwise flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if full := no_space(error):
            _fail(f"{full[0]} on the device that holds {error.filename or 'the output'}")
        if error.errno not in _PATH_ERRORS or error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; a readable or writable path is needed")
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
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
    """Returns the name in the first argument, checked against the known ones."""
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
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=f"the {kind}'s own arguments")
    name: str = getattr(parser.parse_args(given[:1]), kind)
    if name not in summaries:
        raise unknown_name(kind, name, summaries)
    return name


def _call(prog: str | None, summary: str, module: str, given: list[str]) -> None:
    """Runs a command's module with its own command line."""
    command = importlib.import_module(f"eabf_jax.commands.{module}")
    if not hasattr(command, "add_arguments"):  # `train` takes only configuration keys
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
