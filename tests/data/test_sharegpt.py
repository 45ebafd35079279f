import json
import re

import pytest

from eabf_jax.data.index import Index
from eabf_jax.data.sharegpt import SPLIT_BYTES, fraction, order_key

# So long that two such turns and the next two do not fit in one part.
LONG = " word" * (SPLIT_BYTES // 10)


def entry(identifier, *turns, roles=("human", "gpt"), **others):
    said = [{"from": roles[i % 2], "value": f"{text}{LONG}"} for i, text in enumerate(turns)]
    return {"id": identifier, "conversations": said, **others}


def write(path, entries):
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def texts(index):
    return {c.id: [turn.text.removesuffix(LONG) for turn in index.read(c)] for c in index.conversations}


def joined(tmp_path, *entries):
    index = Index([write(tmp_path / "a.json", entries)])
    return texts(index), index.kept_apart


def test_parts_are_joined_in_order_of_their_numbers_and_overlaps_appear_once(tmp_path):
    found = joined(
        tmp_path,
        entry("x_4", "e", "f"),
        entry("y_0", "other", "one"),
        entry("x_0", "a", "b"),
        entry("x_1", "b", "c", "d", roles=("gpt", "human")),
    )
    assert found == ({"x_0": ["a", "b", "c", "d", "e", "f"], "y_0": ["other", "one"]}, 0)


def test_a_first_exchange_that_was_too_long_leaves_an_empty_part(tmp_path):
    found = joined(tmp_path, entry("x_0"), entry("x_0", "a" * SPLIT_BYTES, "b"), entry("x_2", "c", "d"))
    assert found == ({"x_0": ["a" * SPLIT_BYTES, "b", "c", "d"]}, 0)


def test_parts_may_lie_in_several_files_and_repeat(tmp_path):
    one = write(tmp_path / "1.json", [entry("x_2", "c", "d"), entry("x_0", "a", "b")])
    two = tmp_path / "2.jsonl"
    two.write_text("\n".join(json.dumps(e) for e in [entry("x_0", "a", "b"), entry("x_4", "e", "f")]))
    assert texts(Index([one, two])) == {"x_0": ["a", "b", "c", "d", "e", "f"]}
    assert texts(Index([two, one])) == {"x_0": ["a", "b", "c", "d", "e", "f"]}


def short(identifier, *turns, **others):
    return entry(identifier, *turns, **others) | {
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    }


@pytest.mark.parametrize(
    "entries",
    [
        # Three entries that fit in one part.
        [short(f"identity_{i}", f"who are you {i}", "a model") for i in (0, 2, 4)],
        # The last two entries fit in one part.
        [entry("x_0", "a", "b"), entry("x_2", "c", "d"), short("x_4", "e", "f"), short("x_6", "g", "h")],
        # Numbers that count samples, or that are not positions of turns.
        [entry(f"x_{i}", "q", "a") for i in range(6)],
        [entry(f"x_{i}", f"q{i}", "a") for i in (0, 1, 3, 4, 5)],
        [entry(f"x_{i}", f"q{i}", "a") for i in (2, 4)],
        # A gap, in which anything may be missing.
        [entry("x_0", "a", "b"), entry("x_8", "i", "j"), entry("x_10", "k", "l")],
        # Two different entries with the same number.
        [entry("x_0", "a", "b"), entry("x_0", "c", "d"), entry("x_2", "e", "f")],
        # A part that begins inside another, but with a different turn.
        [entry("x_0", "a", "b"), entry("x_1", "c", "d", "e", roles=("gpt", "human"))],
        # Different values beside the turns.
        [entry("x_0", "a", "b", system="Be brief."), entry("x_2", "c", "d", system="Be kind.")],
    ],
)
def test_what_is_not_proved_to_continue_is_kept_apart_and_counted(tmp_path, entries):
    index = Index([write(tmp_path / "a.json", entries)])
    found = [[turn.text for turn in index.read(c) if turn.role != "system"] for c in index.conversations]
    assert sorted(found) == sorted([turn["value"] for turn in e["conversations"]] for e in entries)
    assert index.kept_apart == len(entries)
    assert [c.place for c in index.conversations] == [c.id for c in index.conversations]


def test_parts_are_cut_where_no_question_follows_an_answer_but_stay_in_one_portion(tmp_path):
    entries = [entry("x_0", "a", "b"), entry("x_2", "c"), entry("x_3", "d", "e"), entry("x_5", "f", "g")]
    index = Index([write(tmp_path / "a.json", entries)])
    assert texts(index) == {"x_0": ["a", "b", "c"], "x_3": ["d", "e", "f", "g"]}
    assert index.kept_apart == 2
    assert {c.place for c in index.conversations} == {"x_0"}


def test_passages_are_never_parts(tmp_path):
    index = Index([write(tmp_path / "a.json", [{"id": f"x_{i}", "text": LONG} for i in (0, 1, 2)])])
    assert (len(index.conversations), index.kept_apart) == (3, 0)


def test_conversations_without_an_id_get_a_digest(tmp_path):
    index = Index([write(tmp_path / "a.json", [entry(None, "a", "b"), entry("", "c", "d"), entry(7, "e", "f")])])
    ids = [c.id for c in index.conversations]
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in ids[:2]) and ids[0] != ids[1]
    assert ids[2] == "7"


def test_the_real_files_parts_are_joined(real_sample, real_index):
    index = real_index
    raw = real_sample.read_bytes()
    reference = json.loads(raw[: raw.rfind(b"\n  },")] + b"\n  }]")
    prefixes = {item["id"].rsplit("_", 1)[0] for item in reference}
    assert (len(index.conversations), index.kept_apart) == (len(prefixes), 0)
    # hRPPgZT_0, _11 and _17 overlap by one answer each: 12 + 7 + 5 turns are 22.
    (conversation,) = [c for c in index.conversations if c.id == "hRPPgZT_0"]
    parts = [item["conversations"] for item in reference if item["id"].startswith("hRPPgZT_")]
    assert [len(part) for part in parts] == [12, 7, 5]
    expected = parts[0] + parts[1][1:] + parts[2][1:]
    roles = {"human": "user", "gpt": "assistant"}
    assert index.read(conversation) == [(roles[turn["from"]], turn["value"]) for turn in expected]


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
    # A tenth of 4,000 is 400, with a standard deviation of 19; the limit is five of these.
    assert all(abs(sum(i / 10 <= f < (i + 1) / 10 for f in found) - 400) < 95 for i in range(10))
