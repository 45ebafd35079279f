import gzip
import json
import re
import subprocess
import sys
import textwrap

import pytest

from eabf_jax.data.chat import Turn
from eabf_jax.data.forms import Unusable
from eabf_jax.data.index import Index
from eabf_jax.data.json_stream import BrokenFile
from eabf_jax.errors import InputError


def entry(identifier, *turns):
    roles = ("human", "gpt")
    return {"id": identifier, "conversations": [{"from": roles[i % 2], "value": t} for i, t in enumerate(turns)]}


def write(path, entries):
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


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
    # A separate process, whose peak is due to this work alone; the limit is a fifth of the file.
    code = f"""
        import resource, time
        from eabf_jax.data.index import Index
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        index = Index([{str(path)!r}])
        turns = [index.read(conversation) for conversation in index.conversations[::100]]
        print(index.entries, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, int(time.process_time()))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    entries, grown_kib, seconds = map(int, result.stdout.split())
    assert entries == 1700
    assert grown_kib * 1024 < size / 5
    assert seconds < 20


def test_the_real_file_is_refused_and_its_whole_entries_are_used(real_sample, real_index):
    raw = real_sample.read_bytes()
    # The publisher indents entries by two spaces, which no text contains after an unescaped newline.
    whole = len(re.findall(rb"^  },?$", raw, re.MULTILINE))
    with pytest.raises(BrokenFile, match=f"cut off .*at byte {len(raw)}, .* {whole} whole entries"):
        Index([real_sample])
    assert real_index.entries == whole
    assert real_index.forms == {"sharegpt": whole}


def test_entries_without_turns_do_not_stop_a_file(tmp_path):
    bad = [{"id": "x"}, {"conversations": 3}, {"conversations": None, "text": "t"}, {"text": "t"}, {}, ["?"]]
    path = write(tmp_path / "a.json", [*bad, entry("a", "q", "a"), *bad])
    index = Index([path])
    assert (index.entries, index.forms["sharegpt"]) == (13, 3)
    assert index.unusable == {"of no known form": 1, "not of the form sharegpt": 5, "no list of turns": 4}
    (good,) = [c for c in index.conversations if c.id == "a"]
    assert index.read(good) == [Turn("user", "q"), Turn("assistant", "a")]
    with pytest.raises(Unusable, match="turn that is not an object"):
        index.read(index.conversations[0])


@pytest.mark.parametrize("first", [{"id": 1}, {"text": "t"}])
def test_the_form_is_that_of_a_files_first_known_entry(tmp_path, first):
    path = write(tmp_path / "a.json", [first, {"text": "one"}, {"prompt": "p", "completion": "c"}])
    assert Index([path]).forms == {"text": 1 + ("text" in first)}
    assert Index([path], form="completions").forms == {"completions": 1}
    write(path, [first, {"text": "one"}] + 3 * [{"prompt": "p", "completion": "c"}])
    with pytest.raises(InputError, match="3 others are of the form completions; --format completions reads those"):
        Index([path])


def test_compressed_and_repaired_entries_are_read_from_copies(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(entry(f"c{i}", f"q{i}", "é")).encode() for i in range(9))))
    other = tmp_path / "b.json"
    other.write_text(json.dumps([entry("c9", "q9", "é")]).replace("}]}", "},],},"))
    index = Index([path, other], keep_complete=True)
    assert [index.read(c)[0].text for c in index.conversations] == [f"q{i}" for i in range(10)]
    assert index.broken == []
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BrokenFile, match="is damaged"):
        Index([path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no whole entry"),
        ("[]", "holds no whole entry"),
        (
            '{"data": []}',
            r"no entry of a known form: entry 0 \(byte 0\) has the keys 'data'; expected one of sharegpt: a list",
        ),
        ('[{}, {"data": []}]', r"entry 0 \(byte 1\) has the keys of an empty object"),
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


def test_progress_ends_at_the_size_of_the_files(tmp_path):
    paths = [write(tmp_path / f"{i}.json", [entry(f"c{i}_0", "a", "b")]) for i in range(2)]
    seen = []
    Index(paths, chunk_bytes=16, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == sum(path.stat().st_size for path in paths)
