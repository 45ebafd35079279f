import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eabf_jax.data.json_stream import BrokenFile, scan

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
objects = st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=6)


@settings(max_examples=80, deadline=None)
@given(objects, st.integers(1, 40), st.sampled_from([None, 1]), st.booleans(), st.booleans(), st.booleans())
def test_any_chunk_size_gives_what_json_loads_gives(content, chunk, indent, ascii_only, lines, mark):
    if lines:
        data = "\n".join(json.dumps(item, ensure_ascii=ascii_only) for item in content)
    else:
        data = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    raw = ("\ufeff" * mark + data).encode("utf-8", "surrogatepass")
    found = list(scan(io.BytesIO(raw), "file", chunk))
    assert [item.value for item in found] == content
    assert [json.loads(raw[item.offset : item.offset + item.length]) for item in found] == content


CUT = [{"id": "é_0", "n": [-1.5e3, True, None], "s": 'a "q" \\ \u20ac😀'}, {"x": {}}, {"id": "b", "t": "…"}]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_an_array_cut_at_any_byte_names_its_end_and_the_whole_entries(ascii_only, chunk):
    raw = json.dumps(CUT, ensure_ascii=ascii_only).encode()
    ends = []
    for item in CUT:
        piece = json.dumps(item, ensure_ascii=ascii_only).encode()
        ends.append(raw.index(piece) + len(piece))
    for size in range(1, len(raw)):
        found = []
        with pytest.raises(BrokenFile, match="is cut off") as caught:
            found.extend(item.value for item in scan(io.BytesIO(raw[:size]), "file", chunk))
        whole = sum(end <= size for end in ends)
        assert (caught.value.offset, caught.value.entries) == (size, whole)


def test_lines_cut_inside_an_entry_are_noticed():
    raw = b"\n".join(json.dumps(item).encode() for item in CUT)
    with pytest.raises(BrokenFile, match=f"cut off inside a string at byte {len(raw) - 3}, .* 2 whole entries"):
        list(scan(io.BytesIO(raw[:-3]), "file"))


@pytest.mark.parametrize(
    ("raw", "message", "offset", "entries"),
    [
        (b'[{"a": 1} {"a": 2}]', "expected a comma or ], found '{'", 10, 1),
        (b'[{"a": 1},]', "expected an object, found ']'", 10, 1),
        (b"[1, 2]", "expected an object, found '1'", 1, 0),
        (b"hello", "expected an object, found 'h'", 0, 0),
        (b'[{"a": 1}] x', "has more after its array", 11, 1),
        (b'[{"a": 1}, {"b" 2}, {"c": "a long text after it"}]', "Expecting ':'", 16, 1),
        ('[{"é": 1}, {"ü": "a\nb"}, {"c": "a long text after"}]'.encode(), "Invalid control character", 21, 1),
        (b'[{"a": 1}, {"b": "\xff\xfe"}]', "not UTF-8", 18, 1),
        (b'{"a": 1}\n\xff', "not UTF-8", 9, 1),
        (b'[{"a": ' + b"[" * 200_000, "recursion", 1, 0),
    ],
)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_malformed_files_are_refused_with_the_place(raw, message, offset, entries, chunk):
    with pytest.raises(BrokenFile, match=message) as caught:
        list(scan(io.BytesIO(raw), "file", chunk))
    assert (caught.value.offset, caught.value.entries) == (offset, entries)


def test_an_entry_without_end_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("eabf_jax.data.json_stream.LARGEST_ENTRY", 1000)
    with pytest.raises(BrokenFile, match="does not end within 1000 characters"):
        list(scan(io.BytesIO(b'[{"a": "' + b"x" * 100_000), "file", 100))


def values_of(raw, **options):
    found = list(scan(io.BytesIO(raw), "file", **options))
    for entry in found:
        assert entry.offset is None or json.loads(raw[entry.offset : entry.offset + entry.length]) == entry.value
    return [entry.value for entry in found]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_byte_order_mark_may_stand_before_any_line(chunk):
    raw = '\ufeff{"a": 1}\n\ufeff{"a": "\ufeff"}\r\n\ufeff'.encode()
    assert values_of(raw, chunk_bytes=chunk) == [{"a": 1}, {"a": "\ufeff"}]


def holds(key, first):
    return (key is None and first != "turn") or (key == "data" and isinstance(first, dict))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"n": 1, "of": [{"b": 1}], "data": [{"a": "é"}, {"a": 2}], "end": {}}\n', [{"a": "é"}, {"a": 2}]),
        # Not a list of entries: the object is an entry, and another may follow.
        ('{"data": ["x"]} {"data": [{"a": 1}]}', [{"data": ["x"]}, {"data": [{"a": 1}]}]),
        ('{"data": []}', [{"data": []}]),
        ('[["turn", 1], ["turn"]]', [["turn", 1], ["turn"]]),
        # Consecutive lists, each of them an entry.
        ('["turn", 1]\n["turn", 2]', [["turn", 1], ["turn", 2]]),
        ("[]", []),
        ("", []),
    ],
)
def test_lists_of_entries_are_told_from_entries(text, expected, chunk):
    assert values_of(text.encode(), chunk_bytes=chunk, holds_entries=holds) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [{"a": 1}], "more": 2} {}', "has more after its object"),
        ('{"data": [{"a": 1}], "data": [{"b": 1}]}', "second list of entries, under 'data'"),
        ('{"data": [{"a": 1}], 5', "expected a key and a colon"),
        ('{"data": [{"a": 1}] "more"', "expected a comma or }, found '\"'"),
        ('{"data": [{"a": 1}, {"a": ', "cut off at byte 26"),
        ('{"data": [{"a": 1}]', "cut off at byte 19"),
    ],
)
def test_a_list_inside_an_object_is_checked_to_the_end(text, message):
    found = []
    with pytest.raises(BrokenFile, match=message):
        found.extend(entry.value for entry in scan(io.BytesIO(text.encode()), "file", 4, holds))
    assert found == [{"a": 1}]


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1},\n]', [{"a": 1}]),
        ('[{"a": [1, 2 , ], "b": "é,]",}, {"c": 3}]', [{"a": [1, 2], "b": "é,]"}, {"c": 3}]),
        ('{"a": {"b": 1,},}\n{"c": ",}"}', [{"a": {"b": 1}}, {"c": ",}"}]),
        ('{"data": [{"a": 1},], }', [{"a": 1}]),
    ],
)
def test_trailing_commas_are_read_past_on_request(text, expected, chunk):
    assert values_of(text.encode(), chunk_bytes=chunk, holds_entries=holds, repair=True) == expected
    with pytest.raises(BrokenFile):
        values_of(text.encode(), chunk_bytes=chunk, holds_entries=holds)
