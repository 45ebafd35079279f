"""transformers' own reading of GGUF files, in a fraction of the time."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import gguf
import pytest


@contextmanager
def read_once() -> Iterator[None]:
    """The same calls of the gguf package have the same results, computed once.

    transformers parses a file for the configuration, for the tensors and for the tokenizer, each time with every token
    of the vocabulary, and lists the names of all tensors for each module of a model.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield
