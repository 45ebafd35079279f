"""What perplexity is measured on: a prepared dataset, or texts."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from eabf_jax.data.dataset import METADATA_FILE, Records
from eabf_jax.errors import InputError
from eabf_jax.inference.text import encode_text, only_text
from eabf_jax.interop.tokenizer import Tokenizer

TEXT_SUFFIXES = (".txt", ".jsonl")


def is_text(source: str) -> bool:
    """Tells texts from a prepared dataset.

    Args:
      source: what `--data` names.

    Returns:
      Whether it is a text file or a directory of such.
    Raises:
      InputError: it is neither a text nor a dataset, or is not there.
    """
    path = Path(source)
    if (path / METADATA_FILE).is_file():
        return False
    if (path.is_file() and path.suffix in TEXT_SUFFIXES) or (path.is_dir() and _text_files(path)):
        return True
    wrong = "holds neither a dataset nor .txt or .jsonl files" if path.exists() else "does not exist"
    raise InputError(
        f"--data {source} {wrong}: `eabf prepare --src sharegpt.json --dst {source} --tokenizer MODEL` makes a dataset "
        "there; texts go there as .txt (one document) or .jsonl (one a line)"
    )


def read_documents(
    source: str,
    split: str,
    length: int | None,
    limit: int | None,
    *,
    tokenizer: Tokenizer | None = None,
    skip_shorter: bool = False,
) -> Int[np.ndarray, "documents T"]:
    """Reads documents of one length.

    Args:
      source: a dataset made by `eabf prepare`, a text file (.txt: one document; .jsonl: one a line, under "text"), or a
        directory of text files.
      split: of a dataset.
      length: tokens to cut each document to; None takes the shortest one's length.
      limit: use the first so many; None takes all.
      tokenizer: for texts.
      skip_shorter: whether documents of less than `length` tokens are left out rather than refused.

    Returns:
      int32 [documents, length].
    Raises:
      InputError: no such dataset or text, no document, or one shorter than the length asked for.
    """
    if is_text(source):
        assert tokenizer is not None
        name = source
        found = (np.asarray(encode_text(tokenizer, text), np.int32) for text in read_texts(Path(source)))
    else:
        name = f"split {split!r} of {source}"
        records = Records(source, split)
        found = (records[index]["tokens"] for index in range(len(records)))
    least = max(length or 0, 2)
    if skip_shorter:
        found = (document for document in found if len(document) >= least)
    documents = list(itertools.islice(found, limit))
    shortest = min(map(len, documents), default=0)
    if shortest < least:
        hint = "" if skip_shorter or length is None else "; --skip-shorter leaves shorter ones out"
        raise InputError(
            f"{name} has {len(documents)} documents{f' of at least {least} tokens' if skip_shorter else ''}, the "
            f"shortest of {shortest} tokens; {least} are needed{hint}"
        )
    return np.stack([document[: length or shortest] for document in documents]).astype(np.int32)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file or of a directory's files, in the order of their names.

    Args:
      path: a .txt or .jsonl file, or a directory of such.

    Yields:
      One text a .txt file, one a line of a .jsonl file.
    Raises:
      InputError: a file that is no UTF-8, or a line that is no JSON object with a string under "text".
    """
    for file in _text_files(path) if path.is_dir() else [path]:
        with only_text(str(file)):
            content = file.read_text(encoding="utf-8")
        if file.suffix == ".txt":
            yield content
            continue
        # Not splitlines: a JSON string may hold line separators other than the line feed.
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                yield _text_of(line, f"{file}, line {number}")


def _text_files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.iterdir() if file.is_file() and file.suffix in TEXT_SUFFIXES)


def _text_of(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is no JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{place}: an object with a string under "text" is needed, such as {{"text": "Once ..."}}')
    return text
