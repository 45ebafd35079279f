"""Documents from text files, and the errors for other files."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from eabf_jax.errors import InputError
from eabf_jax.evaluation.documents import is_text, read_documents
from eabf_jax.interop.tokenizer import Tokenizer

TEXTS = ("The first text of all.", "A second one,\u2028with a line separator in it.", "And a third, from a file.")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in TEXTS[:2]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text(TEXTS[2], encoding="utf-8")
    (tmp_path / "notes.md").write_text("nothing to read")
    return tmp_path


def test_a_directory_is_read_in_the_order_of_names(texts: Path, tokenizer: Tokenizer) -> None:
    whole = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
    shortest = min(map(len, whole))
    documents = read_documents(str(texts), "held_out", None, None, tokenizer=tokenizer)
    np.testing.assert_array_equal(documents, [tokens[:shortest] for tokens in whole])
    (first,) = read_documents(str(texts / "b.txt"), "held_out", None, None, tokenizer=tokenizer)
    assert first.tolist() == whole[2]
    two = read_documents(str(texts), "held_out", 6, 2, tokenizer=tokenizer)
    np.testing.assert_array_equal(two, [tokens[:6] for tokens in whole[:2]])


def test_every_kind_of_file_that_prepare_reads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps([{"content": TEXTS[0]}]).encode()))
    (tmp_path / "b.csv").write_text(f'id,text\n1,"{TEXTS[1]}"\n', encoding="utf-8")
    documents = read_documents(str(tmp_path), "", 6, None, tokenizer=tokenizer)
    expected = [[tokenizer.bos_id, *tokenizer.encode(text)][:6] for text in TEXTS[:2]]
    np.testing.assert_array_equal(documents, expected)


def test_shorter_documents_are_refused_or_left_out(texts: Path, tokenizer: Tokenizer) -> None:
    lengths = [1 + len(tokenizer.encode(text)) for text in TEXTS]
    length = sorted(lengths)[1]
    with pytest.raises(InputError, match=f"{length} are needed; --skip-shorter"):
        read_documents(str(texts), "held_out", length, None, tokenizer=tokenizer)
    documents = read_documents(str(texts), "held_out", length, None, tokenizer=tokenizer, skip_shorter=True)
    assert documents.shape == (sum(n >= length for n in lengths), length)
    with pytest.raises(InputError, match="0 documents of at least 1000 tokens"):
        read_documents(str(texts), "held_out", 1000, None, tokenizer=tokenizer, skip_shorter=True)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"txt": "b"}', "entry 2: no text; a text under text or content is needed"),
        ("x.jsonl", b'{"text": 1}', "x.jsonl, entry 1: text or content that is not text"),
        ("x.jsonl", b'{"text": "a"}\n{"te', "is cut off inside a string at byte 18, .*; 1 whole entries before it$"),
        ("x.txt", b"\xff\xfe", "x.txt is not UTF-8 at byte 0"),
        ("x.md", b"text", "holds no file of a known kind"),
    ],
)
def test_files_that_are_no_texts_are_named(
    name: str, content: bytes, complaint: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        read_documents(str(tmp_path), "held_out", None, None, tokenizer=tokenizer)


def test_what_is_missing_is_told_with_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist: `eabf prepare .* --dst \S*nowhere"):
        is_text(str(tmp_path / "nowhere"))
    assert is_text(str(tmp_path))
