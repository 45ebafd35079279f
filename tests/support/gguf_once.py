"""Makes transformers' reader of GGUF files faster."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import gguf
import pytest


@contextmanager
def read_once() -> Iterator[None]:
    """Caches what the gguf package returns to transformers; equal calls share a result.

    transformers parses a file for the configuration, for the tensors and for the tokenizer, each time with every token
    of the vocabulary, and lists the names of all tensors for each module of a model.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield
