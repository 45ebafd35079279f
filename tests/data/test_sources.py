import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from pyarrow import parquet

from eabf_jax.data.index import Index
from eabf_jax.errors import InputError

ROWS = [
    {"id": f"c{i}", "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "é"}]}
    for i in range(100)
]
LINES = "\n".join(json.dumps(row) for row in ROWS).encode()
BATCHES = pyarrow.Table.from_pylist(ROWS).to_batches(max_chunksize=70)


def arrow(path, opened, batches=BATCHES):
    with opened(str(path), batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write(path):
    """Writes the same rows in the format of the file's suffix."""
    kind = "".join(path.suffixes)
    if kind == ".parquet":
        parquet.write_table(pyarrow.Table.from_batches(BATCHES), str(path), row_group_size=30)
    elif kind in (".arrow", ".feather"):
        arrow(path, pyarrow.ipc.new_file if kind == ".feather" else pyarrow.ipc.new_stream)
    else:
        compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        content = LINES if path.suffixes[0] != ".json" else json.dumps({"version": 1, "data": ROWS}).encode()
        path.write_bytes(compress(content))
    return path


def questions(index):
    return [index.read(c)[0].text for c in index.conversations]


@pytest.mark.parametrize(
    "ending",
    ["json", "jsonl", "ndjson", "lines", "parquet", "arrow", "feather", "jsonl.gz", "json.bz2", "jsonl.xz", "txt.gz"],
)
def test_kinds_of_files(tmp_path, ending):
    index = Index([write(tmp_path / f"a.{ending}")])
    assert questions(index) == [f"q{i}" for i in range(100)]


def test_tables_of_texts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffprompt,completion,n\r\n"a, ""b""\nc",d,1\r\ne,f,2\r\n')
    index = Index([path])
    assert [index.read(c) for c in index.conversations] == [('a, "b"\nc', "d"), ("e", "f")]
    path = tmp_path / "a.tsv"
    path.write_text("instruction\toutput\na\tb\n")
    assert Index([path]).forms == {"instructions": 1}
    for broken, message in (("a,text\n1\n", "after row 0: more or fewer fields"), ("text\n\x00\xff\n", "not UTF-8")):
        bad = tmp_path / "bad.csv"
        bad.write_bytes(broken.encode("latin-1"))
        with pytest.raises(InputError, match=message):
            Index([bad])


def test_dates_and_pictures_in_tables_are_no_text(tmp_path):
    table = pyarrow.Table.from_pylist([{"text": "a", "image": {"bytes": b"\x89PNG"}}, {"text": "b", "image": None}])
    parquet.write_table(table, str(tmp_path / "a.parquet"))
    index = Index([tmp_path / "a.parquet"])
    assert index.read(index.conversations[1]).text == "b"
    with pytest.raises(ValueError, match="pictures"):
        index.read(index.conversations[0])


def test_plain_text_is_one_document(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeff[INST] Größe\r\n".encode())
    index = Index([path])
    assert index.read(index.conversations[0]) == ("", "[INST] Größe\r\n")
    other = tmp_path / "book.md"
    other.write_text("# [Title]\n")
    with pytest.raises(InputError, match=r"book.md is not JSON \('#' found at byte 0\).*--format text reads it"):
        Index([other])
    assert Index([other], form="text").forms == {"text": 1}
    # JSON is recognised under any name, even if texts are requested.
    other.write_text('{"text": "a"}\n{"text": "b"}')
    assert Index([other], form="text").forms == {"text": 2}
    (tmp_path / "good.json").write_text("good morning")
    with pytest.raises(InputError, match=r"'g' found at byte 0.*--format text"):
        Index([tmp_path / "good.json"])
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="not UTF-8 at byte 2"):
        Index([path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04\x95\x00", "a pickle, which is never loaded"),
        (b"\x28\xb5\x2f\xfd....", "decompress it first"),
        (b"PK\x03\x04", "unpack it first"),
        (b"PAR1 and no more", "not a whole Parquet file"),
        (b"\xff\xff\xff\xff\x10\x00\x00\x00", "not a whole Arrow file"),
        (b"\x1f\x8b\x08", "is damaged"),
    ],
)
def test_what_is_not_read_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Index([path])
    assert "\n" not in str(caught.value)


def test_a_saved_dataset_is_read_in_its_order(tmp_path):
    """Reads the layout of `datasets` 5.2: shards in Arrow's stream format, listed in state.json."""
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    saved = tmp_path / "train"
    saved.mkdir()
    for name, batch in zip(names, BATCHES, strict=True):
        arrow(saved / name, pyarrow.ipc.new_stream, [batch])
    (saved / "cache-1.arrow").write_bytes(b"left over")
    (saved / "dataset_info.json").write_text('{"features": {}}')
    state = {"_data_files": [{"filename": name} for name in names], "_format_columns": None}
    (saved / "state.json").write_text(json.dumps(state))
    assert questions(Index([saved])) == [f"q{i}" for i in range(100)]

    (saved / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "x"}]}))
    with pytest.raises(InputError, match="flatten_indices"):
        Index([saved])
    (saved / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"state.json is damaged"):
        Index([saved])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match=r"several splits: name one of .*/train"):
        Index([tmp_path])


def test_a_directory_of_files(tmp_path):
    write(tmp_path / "b.jsonl.gz")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.json").write_text("?")
    (tmp_path / "more").mkdir()
    index = Index([tmp_path])
    assert index.forms == {"text": 1, "sharegpt": 100}
    assert [path.name for path in index.paths] == ["a.txt", "b.jsonl.gz"]
    assert index.skipped == [str(tmp_path / "README.md"), str(tmp_path / "more")]
    with pytest.raises(InputError, match=r"more holds no file of a known kind \(.json, "):
        Index([tmp_path / "more"])
    (tmp_path / "more" / "eabf_dataset.json").write_text("{}")
    with pytest.raises(InputError, match="is already prepared"):
        Index([tmp_path / "more"])


def test_a_file_of_which_nothing_can_be_used_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,messages\n1,\"[{'role': 'user'}]\"\n")
    with pytest.raises(InputError, match=r"none of 1 entries can be used \(no list of turns: 1\)"):
        Index([path])
