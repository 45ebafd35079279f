import numpy as np

from eabf_jax.data.forms import Passage
from eabf_jax.data.passage import encode_passage, split_passage


class Letters:
    """Makes every letter a token, and "xy" a single one."""

    vocab_size, bos_id, eos_id = 300, 1, 2

    def __init__(self, adds_bos=True):
        self.adds_bos = adds_bos

    def encode(self, text, *, special=False):
        return [299 if letter == "#" else ord(letter) for letter in text.replace("xy", "#")]

    def token_id(self, piece):
        return None


def plain(encoded):
    return encoded.tokens.tolist(), np.flatnonzero(encoded.loss_mask).tolist()


def test_a_document_is_learned_from_its_first_token_to_its_end():
    assert plain(encode_passage(Passage("", "ab"), Letters())) == ([1, 97, 98, 2], [1, 2, 3])
    # The first token has no context.
    assert plain(encode_passage(Passage("", "ab"), Letters(adds_bos=False))) == ([97, 98, 2], [1, 2])


def test_of_prompt_and_completion_the_completion_is_learned():
    assert plain(encode_passage(Passage("ab", "c"), Letters())) == ([1, 97, 98, 99, 2], [3, 4])
    # A token that belongs to both is part of the answer.
    assert plain(encode_passage(Passage("ax", "yb"), Letters())) == ([1, 97, 299, 98, 2], [2, 3, 4])


def test_documents_are_cut_and_every_piece_begins_as_a_text_does():
    pieces = split_passage(Passage("", "abcdef"), Letters(), min_tokens=2, max_tokens=4)
    assert [plain(piece) for piece in pieces] == [
        ([1, 97, 98, 99], [1, 2, 3]),
        ([1, 100, 101, 102], [1, 2, 3]),
        ([1, 2], [1]),
    ]
    pieces = split_passage(Passage("", "abcdef"), Letters(adds_bos=False), min_tokens=4, max_tokens=4)
    assert [plain(piece) for piece in pieces] == [([97, 98, 99, 100], [1, 2, 3])]


def test_a_completion_is_cut_once_and_dropped_if_nothing_of_it_is_left():
    assert [plain(p) for p in split_passage(Passage("ab", "cdef"), Letters(), min_tokens=1, max_tokens=5)] == [
        ([1, 97, 98, 99, 100], [3, 4])
    ]
    assert split_passage(Passage("abcd", "e"), Letters(), min_tokens=1, max_tokens=5) == []
    assert split_passage(Passage("", "ab"), Letters(), min_tokens=1, max_tokens=1) == []
