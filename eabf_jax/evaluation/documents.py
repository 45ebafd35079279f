"""Documents for perplexity, from a prepared dataset or from texts."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from eabf_jax.data.dataset import METADATA_FILE, Records
from eabf_jax.data.forms import FORMS, TEXT, Passage, Unusable
from eabf_jax.data.json_stream import CHUNK_BYTES
from eabf_jax.data.sources import files_of, read_entries
from eabf_jax.errors import InputError
from eabf_jax.inference.text import encode_text
from eabf_jax.interop.tokenizer import Tokenizer


def is_text(source: str) -> bool:
    """Returns whether the path in `--data` is anything but a prepared dataset.

    Raises:
      InputError: it does not exist.
    """
    if not Path(source).exists():
        raise InputError(
            f"--data {source} does not exist: `eabf prepare --src FILE --dst {source} --tokenizer MODEL` makes a "
            "dataset; texts can be .txt (one document), .jsonl (one document a line) or another format in docs/data.md"
        )
    return not (Path(source) / METADATA_FILE).is_file()


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
      source: a dataset made by `eabf prepare`; or a file or directory that `eabf prepare --format text` reads.
      length: tokens to cut each document to; None means the shortest document's length.
      limit: number of documents, from the first; None means all.
      skip_shorter: whether to leave out documents shorter than `length` instead of refusing them.

    Returns:
      int32 [documents, length].
    Raises:
      InputError: the dataset or text does not exist, holds no document, or holds one shorter than `length`.
    """
    if is_text(source):
        assert tokenizer is not None
        name = source
        found = (np.asarray(encode_text(tokenizer, text), np.int32) for text in _texts(Path(source)))
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


def _texts(path: Path) -> Iterator[str]:
    """Yields the texts that `eabf prepare --format text` reads from the same files, in the same order."""
    form = FORMS[TEXT]
    files, _ = files_of([path])
    for file in files:
        entries = read_entries(file, TEXT, CHUNK_BYTES, False, lambda _: None)
        for number, entry in enumerate(entries, start=1):
            try:
                if not form.claims(entry.value):
                    raise Unusable("no text")
                content = form.read(entry.value)
            except Unusable as fault:
                raise InputError(f"{file}, entry {number}: {fault.reason}; {form.needs} is needed") from None
            assert isinstance(content, Passage)
            yield content.text
