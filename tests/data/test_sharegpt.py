import io
import json
import re
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eabf_jax.data.sharegpt import BrokenFile, Index, RawTurn, fraction, order_key, scan
from eabf_jax.errors import InputError


def entry(identifier, *turns):
    roles = ("human", "gpt")
    return {"id": identifier, "conversations": [{"from": roles[i % 2], "value": t} for i, t in enumerate(turns)]}


def write(path, entries):
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def texts(index):
    return {c.id: [turn.text for turn in index.read(c)] for c in index.conversations}


# --- the reader -------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
objects = st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=6)


@settings(max_examples=150, deadline=None)
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
        (b'[{"a": 1} {"a": 2}]', "comma or ] was expected", 10, 1),
        (b'[{"a": 1},]', "object was expected, ']' found", 10, 1),
        (b"[1, 2]", "object was expected, '1' found", 1, 0),
        (b"hello", "object was expected, 'h' found", 0, 0),
        (b'[{"a": 1}] x', "goes on after its array ends", 11, 1),
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
    monkeypatch.setattr("eabf_jax.data.sharegpt.LARGEST_ENTRY", 1000)
    with pytest.raises(BrokenFile, match="does not end within 1000 characters"):
        list(scan(io.BytesIO(b'[{"a": "' + b"x" * 100_000), "file", 100))


def test_memory_stays_flat_on_a_large_file(tmp_path):
    path = tmp_path / "large.json"
    with path.open("w") as stream:
        stream.write("[")
        for number in range(1700):
            line = json.dumps(entry(f"c{number:06}_0", f"question {number} " * 1300, f"answer {number} " * 1300))
            stream.write(("," if number else "") + line)
        stream.write("]")
    size = path.stat().st_size
    assert size > 50e6
    # A process of its own, for its peak to be this work's; the limit is a tenth of the file.
    code = f"""
        import resource
        from eabf_jax.data.sharegpt import Index
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        index = Index([{str(path)!r}])
        turns = [index.read(conversation) for conversation in index.conversations[::100]]
        print(index.entries, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    begin = time.monotonic()
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    entries, grown_kib = map(int, result.stdout.split())
    assert entries == 1700
    assert grown_kib * 1024 < size / 5
    assert time.monotonic() - begin < 20


def test_the_real_file_is_refused_and_its_whole_entries_are_used(real_sample):
    raw = real_sample.read_bytes()
    # The publisher's layout: an entry at two spaces of indentation, which no text contains unescaped.
    whole = len(re.findall(rb"^  },?$", raw, re.MULTILINE))
    with pytest.raises(BrokenFile, match=f"cut off .*at byte {len(raw)}, .* {whole} whole entries"):
        Index([real_sample])
    index = Index([real_sample], keep_complete=True)
    assert index.entries == whole
    reference = json.loads(raw[: raw.rfind(b"\n  },")] + b"\n  }]")
    prefixes = {item["id"].rsplit("_", 1)[0] for item in reference}
    assert len(index.conversations) == len(prefixes)
    # hRPPgZT_0, _11 and _17 overlap by one answer each: 12 + 7 + 5 turns are 22.
    (conversation,) = [c for c in index.conversations if c.id == "hRPPgZT_0"]
    parts = [item["conversations"] for item in reference if item["id"].startswith("hRPPgZT_")]
    assert [len(part) for part in parts] == [12, 7, 5]
    expected = parts[0] + parts[1][1:] + parts[2][1:]
    assert index.read(conversation) == [RawTurn(turn["from"], turn["value"]) for turn in expected]


# --- joining ----------------------------------------------------------------------------------------------------------


def test_parts_are_joined_in_order_of_their_numbers_and_overlaps_appear_once(tmp_path):
    path = write(
        tmp_path / "a.json",
        [
            entry("x_4", "e", "f"),
            entry("y_0", "other", "one"),
            entry("x_0", "a", "b"),
            {
                "id": "x_1",
                "conversations": [
                    {"from": "gpt", "value": "b"},
                    {"from": "human", "value": "c"},
                    {"from": "gpt", "value": "d"},
                ],
            },
        ],
    )
    assert texts(Index([path])) == {"x_0": ["a", "b", "c", "d", "e", "f"], "y_0": ["other", "one"]}


def test_parts_may_lie_in_several_files_and_repeat(tmp_path):
    one = write(tmp_path / "1.json", [entry("x_2", "c", "d"), entry("x_0", "a", "b")])
    two = tmp_path / "2.jsonl"
    two.write_text("\n".join(json.dumps(e) for e in [entry("x_0", "a", "b"), entry("x_4", "e", "f")]))
    assert texts(Index([one, two])) == {"x_0": ["a", "b", "c", "d", "e", "f"]}
    assert texts(Index([two, one])) == {"x_0": ["a", "b", "c", "d", "e", "f"]}


def test_numbers_that_count_conversations_join_nothing(tmp_path):
    path = write(tmp_path / "a.json", [entry(f"item_{i}", f"question {i}", f"answer {i}") for i in range(6)])
    assert len(Index([path]).conversations) == 6


def test_a_part_after_a_gap_stands_for_itself(tmp_path):
    path = write(tmp_path / "a.json", [entry("x_0", "a", "b"), entry("x_8", "i", "j"), entry("x_10", "k", "l")])
    assert texts(Index([path])) == {"x_0": ["a", "b"], "x_8": ["i", "j", "k", "l"]}


def test_other_spellings_and_broken_turns(tmp_path):
    path = write(
        tmp_path / "a.json",
        [
            {"id": 7, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            {"conversation": ["no turn", {"from": "gpt"}, {"from": None, "value": 3}]},
        ],
    )
    index = Index([path])
    assert index.read(index.conversations[0]) == [RawTurn("user", "q"), RawTurn("assistant", "a")]
    assert index.conversations[0].id == "7"
    assert index.read(index.conversations[1]) == [RawTurn(None, None), RawTurn("gpt", None), RawTurn(None, None)]
    assert re.fullmatch("[0-9a-f]{16}", index.conversations[1].id)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no whole entry"),
        ("[]", "holds no whole entry"),
        ('{"data": []}', "entry 0 .* has no list of turns under 'conversations'.*keys found: 'data'"),
        ('[{"id": "a", "conversations": []}, {"conversations": "x"}]', r"entry 1 .*\(byte 35\) has no list of turns"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        Index([path])


def test_missing_files_and_files_that_change_are_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        Index([tmp_path / "none.json"])
    path = write(tmp_path / "a.json", [entry("x_0", "a", "b")])
    index = Index([path])
    path.write_text("[]")
    with pytest.raises(InputError, match="changed while it was being read"):
        index.read(index.conversations[0])


def test_keep_complete_needs_at_least_one_entry(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": "x')
    with pytest.raises(InputError, match="holds no whole entry"):
        Index([path], keep_complete=True)


# --- order ------------------------------------------------------------------------------------------------------------


def test_order_depends_on_seed_and_ids_only(tmp_path):
    entries = [entry(f"c{i}_0", f"q{i}", "a") for i in range(50)] + [
        entry("same_0", "x", "y"),
        entry("same_0", "z", "w"),
    ]
    forward = Index([write(tmp_path / "a.json", entries)])
    backward = Index([write(tmp_path / "b.json", entries[::-1])])

    def order(index, seed):
        return [index.read(c) for c in sorted(index.conversations, key=lambda c: order_key(seed, c))]

    assert order(forward, 1) == order(backward, 1)
    assert order(forward, 1) != order(forward, 2)


def test_fractions_are_even():
    found = [fraction(f"id{i}") for i in range(4000)]
    assert all(0 <= f < 1 for f in found)
    # A tenth of 4,000 is 400 with a standard deviation of 19: five of those.
    assert all(abs(sum(i / 10 <= f < (i + 1) / 10 for f in found) - 400) < 95 for i in range(10))


def test_progress_ends_at_the_size_of_the_files(tmp_path):
    paths = [write(tmp_path / f"{i}.json", [entry(f"c{i}_0", "a", "b")]) for i in range(2)]
    seen = []
    Index(paths, chunk_bytes=16, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == sum(path.stat().st_size for path in paths)
