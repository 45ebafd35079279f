"""The border of every reader: files from strangers end as plain values or as one `InputError`."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from eabf_jax.errors import InputError, one_line

# Real files have fewer than 20 levels. Later steps such as json.dumps recurse, and have Python's stack only in part.
MAX_NESTING = 100
# A number beyond every float; model_max_length is 10^30 in many files.
MAX_BITS = 1024
# Nodes of a YAML document after each alias is replaced by what it stands for; a study has a few hundred.
MAX_YAML_NODES = 100_000


@contextmanager
def reading(source: Path | str, fault: str) -> Iterator[None]:
    """Turns whatever a library raises for a damaged file into InputError.

    Args:
      source: the file, for the message.
      fault: what the file is not, such as "not valid JSON".

    Raises:
      InputError: the block raised it, or any other error except a failure to open the file.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if error.filename is not None:  # a path that cannot be opened; the command line has its own words for these
            raise
        raise InputError(f"{source}: {fault}: {told(error)}") from error
    except BaseException as error:
        # The tokenizers library's Rust code panics with a direct subclass of BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{source}: {fault}: {told(error)}") from error


def prefixed(source: Path | str, error: InputError) -> InputError:
    """Returns an error whose message begins with the file's name."""
    return error if str(error).startswith(f"{source}: ") else InputError(f"{source}: {error}")


def told(error: BaseException) -> str:
    """Describes a library's error in one line."""
    if isinstance(error, RecursionError):
        return f"it is nested too deeply; at most {MAX_NESTING} levels are read"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, KeyError | TypeError | AttributeError | IndexError) or not str(error):
        return f"{type(error).__name__}: {one_line(error)}"
    return one_line(error)


def parse_json(text: str | bytes, source: Path | str, fault: str = "not valid JSON") -> Any:
    """Parses JSON.

    Args:
      source, fault: as for `reading`.

    Raises:
      InputError: not JSON, nested more than 100 levels deep, or with text or numbers that nothing else can represent.
    """
    with reading(source, fault):
        value = json.loads(text)
        _check_plain(value)
    return value


def read_text(path: Path) -> str:
    """Reads a file of UTF-8, with or without a byte order mark.

    Raises:
      InputError: there is no such file, or it is not UTF-8.
    """
    try:
        with reading(path, "not valid UTF-8"):
            return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises InputError as `read_text` and `parse_json`."""
    return parse_json(read_text(path), path)


def parse_yaml(text: Any, source: Path | str, loader: Any = yaml.SafeLoader) -> Any:
    """Parses one YAML document.

    Args:
      text: the document, or an open file.
      source: the file, for messages.
      loader: a subclass of `yaml.SafeLoader`.

    Raises:
      InputError: not YAML, nested more than 100 levels deep, or aliases that stand for more than 100,000 nodes.
    """
    with reading(source, "not YAML"):
        opened = loader(text)
        try:
            node = opened.get_single_node()
            if node is None:
                return None
            if _expanded(node, {}) > MAX_YAML_NODES:
                raise ValueError(f"its aliases stand for more than {MAX_YAML_NODES:,} values; write fewer out")
            value = opened.construct_document(node)
        finally:
            opened.dispose()
        _check_plain(value)
    return value


def _expanded(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Counts the nodes of a YAML document with each alias replaced by what it stands for."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError("an alias stands for a value that contains it")
        return found
    known[id(node)] = None
    parts: Iterable[yaml.Node] = ()
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = (part for pair in node.value for part in pair)
    known[id(node)] = total = 1 + sum(_expanded(part, known) for part in parts)
    return total


def _check_plain(value: Any) -> None:
    """Refuses what parses but fails later: deep nesting, numbers beyond every float, lone surrogates."""
    level = [value]
    for _ in range(MAX_NESTING):
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, str):
                entry.encode()
            elif isinstance(entry, dict):
                below += entry.keys()
                below += entry.values()
            elif isinstance(entry, list | tuple | set):
                below += entry
            elif isinstance(entry, int) and entry.bit_length() > MAX_BITS:
                raise ValueError(f"a number of {entry.bit_length()} bits; at most {MAX_BITS} are read")
        if not below:
            return
        level = below
    raise RecursionError
