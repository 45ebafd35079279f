import io
import json
import time

import numpy as np
import pytest
from rich.console import Console

from eabf_jax.data.chat import Turn, encode_conversation
from eabf_jax.data.dataset import Records, num_records, read_metadata
from eabf_jax.data.loader import make_loader
from eabf_jax.data.prepare import Options, prepare
from eabf_jax.errors import InputError


class Words:
    """Makes every word a token, so that lengths can be counted by hand."""

    vocab_size, bos_id, eos_id, adds_bos = 5000, 1, 2, True

    def encode(self, text, *, special=False):
        return [10 + sum(map(ord, word)) % 4000 for word in text.split()]

    def token_id(self, piece):
        return None


# In the llama-2 template an exchange of q and a words has q + a + 2 tokens ([INST], [/INST]) between BOS and EOS.
OVERHEAD = 4


def quiet():
    return Console(file=io.StringIO())


def words(number, name="word"):
    return " ".join(f"{name}{i}" for i in range(number))


def entry(identifier, *sizes, name=None):
    turns = [
        {"from": ("human", "gpt")[i % 2], "value": words(size, f"the answer of {name or identifier} is {i} ")}
        for i, size in enumerate(sizes)
    ]
    return {"id": identifier, "conversations": turns}


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def options(source, destination, **changes):
    defaults = {"template": "llama-2", "min_tokens": 1, "max_tokens": 1000, "language": "any"}
    return Options((source,), destination, **{**defaults, **changes})


def records(directory, split="train"):
    return [(r["id"], r["tokens"].tolist(), r["loss_mask"].tolist()) for r in Records(directory, split)]


@pytest.fixture
def many(tmp_path):
    return write(tmp_path / "many.json", [entry(f"c{i}_0", 3, 4 + i % 5, 2, 3) for i in range(60)])


def test_every_stage_is_counted(tmp_path):
    english = "Please explain how the weather in the mountains changes during the year. "
    source = write(
        tmp_path / "a.json",
        [
            {
                "id": "x_0",
                "conversations": [{"from": "human", "value": english}, {"from": "gpt", "value": english * 30}],
            },
            {
                "id": "x_2",
                "conversations": [{"from": "human", "value": "And at the sea?"}, {"from": "gpt", "value": english}],
            },
            {
                "id": "copy_0",
                "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": english * 2}],
            },
            {
                "id": "kopy_0",
                "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": english * 2}],
            },
            {
                "id": "short_0",
                "conversations": [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "How are you?"}],
            },
            {"id": "empty_0", "conversations": []},
            {"id": "no_turns"},
            {
                "id": "parts_0",
                "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "x"}]}],
            },
            {"id": "tool_0", "messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
            {"id": "who_0", "conversations": [{"from": "human", "value": "a"}, {"from": "parrot", "value": "b"}]},
            {
                "id": "german_0",
                "conversations": [
                    {"from": "human", "value": "Warum ist der Himmel am Abend rot und am Tag blau?"},
                    {"from": "gpt", "value": "Weil das Licht am Abend einen längeren Weg durch die Luft nimmt. " * 3},
                ],
            },
        ],
    )
    report = prepare(options(source, tmp_path / "set", language="en", min_tokens=20), Words(), quiet())
    assert [count for _, count in report.stages()] == [11, 9, 9, 9, 5, 4, 3, 2]
    assert report.dropped_in_cleaning == {
        "no turns": 1,
        "part that is not text": 1,
        "tool use": 1,
        "unknown role": 1,
    }
    assert report.notes("conversations, parts joined") == []
    assert (report.forms, report.unusable) == ({"sharegpt": 10}, {"not of the form sharegpt": 1})
    counts = report.splits["train"]
    assert (counts.records, counts.conversations) == (2, 2)
    # Words of question and answer: "x" 12 and 360, then 4 and 12; "copy" 1 and 24.
    assert counts.tokens == (12 + 360 + OVERHEAD) + (4 + 12 + OVERHEAD) + (1 + 24 + OVERHEAD)
    # Three answers, each with its EOS.
    assert counts.response_tokens == 360 + 12 + 24 + 3
    metadata = read_metadata(tmp_path / "set")
    assert metadata["counts"]["in_language"] == 3
    assert (metadata["template"], metadata["vocab_size"], metadata["seed"]) == ("llama-2", 5000, 0)
    assert metadata["splits"]["train"]["tokens"] == counts.tokens


def test_records_are_what_the_template_gives(tmp_path):
    source = write(tmp_path / "a.json", [entry("c_0", 5, 6)])
    prepare(options(source, tmp_path / "set"), Words(), quiet())
    turns = entry("c_0", 5, 6)["conversations"]
    expected = encode_conversation(
        [Turn("user", turns[0]["value"]), Turn("assistant", turns[1]["value"])], "llama-2", Words()
    )
    assert records(tmp_path / "set") == [("c_0#0", expected.tokens.tolist(), expected.loss_mask.tolist())]


def test_long_conversations_become_several_records(tmp_path):
    # `entry` writes 7 words for each of size, so an exchange has 7 * 2 + 4 = 18 tokens.
    source = write(tmp_path / "a.json", [entry("c_0", *[1] * 14)])
    report = prepare(options(source, tmp_path / "set", max_tokens=40, min_tokens=19), Words(), quiet())
    # Seven exchanges, two per record; the seventh alone is too short.
    assert [(name, len(tokens)) for name, tokens, _ in records(tmp_path / "set")] == [
        (f"c_0#{i}", 36) for i in range(3)
    ]
    assert report.splits["train"].conversations == 1


def test_subsets_nest_and_the_held_out_stay(many, tmp_path):
    held_out, train = {}, {}
    for number in (4, 10, None):
        directory = tmp_path / f"set{number}"
        made = options(many, directory, num_conversations=number, held_out=5, held_out_min_tokens=60, max_tokens=200)
        report = prepare(made, Words(), quiet())
        held_out[number], train[number] = records(directory, "held_out"), records(directory)
        assert report.shortages == []
        if number == 4:
            assert report.examined < 60
    assert held_out[4] == held_out[10] == held_out[None]
    assert len(train[4]) == 4
    assert train[10][:4] == train[4]
    assert train[None][:10] == train[10]
    names = [name.split("#")[0] for name, *_ in train[None] + held_out[None]]
    assert len(set(names)) == len(names) == 60
    assert all(len(tokens) >= 60 for _, tokens, _ in held_out[4])


def test_the_seed_and_not_the_file_decides_the_order(many, tmp_path):
    turned = write(tmp_path / "turned.json", json.loads(many.read_text())[::-1])
    sets = {}
    for name, source, seed in (("a", many, 1), ("b", turned, 1), ("c", many, 2)):
        prepare(options(source, tmp_path / name, num_conversations=10, seed=seed), Words(), quiet())
        sets[name] = records(tmp_path / name)
    assert sets["a"] == sets["b"] != sets["c"]


def test_portions_are_disjoint_whatever_the_seed(many, tmp_path):
    names = []
    for seed, portion in ((1, (0.0, 0.5)), (2, (0.5, 1.0))):
        directory = tmp_path / str(seed)
        prepare(options(many, directory, seed=seed, portion=portion), Words(), quiet())
        names.append({name for name, *_ in records(directory)})
    assert names[0] | names[1] == {f"c{i}_0#0" for i in range(60)}
    assert names[0] & names[1] == set()
    assert min(map(len, names)) > 10


def test_held_out_records_are_full_by_default(tmp_path):
    source = write(tmp_path / "a.json", [entry(f"c{i}_0", 1, 1 + i, 1, 1 + i) for i in range(20)])
    report = prepare(options(source, tmp_path / "set", max_tokens=100, held_out=8), Words(), quiet())
    assert [len(tokens) for _, tokens, _ in records(tmp_path / "set", "held_out")] == [100] * 8
    # Two exchanges of 7 and 7 (1 + i) words, plus two overheads, reach 100 tokens from i = 5 on.
    assert {int(name[1:].split("_")[0]) for name, *_ in records(tmp_path / "set", "held_out")} <= set(range(5, 20))
    assert report.splits["held_out"].tokens == 800


def test_too_few_records_are_reported(many, tmp_path):
    report = prepare(options(many, tmp_path / "set", num_conversations=100), Words(), quiet())
    assert report.shortages == ["train: 60 records found, 100 requested"]


def test_ids_that_look_like_parts_are_reported(tmp_path):
    source = write(tmp_path / "identity.json", [entry(f"identity_{i}", 1, 1) for i in (0, 2, 4)])
    report = prepare(options(source, tmp_path / "set"), Words(), quiet())
    assert (report.kept_apart, report.splits["train"].conversations) == (3, 3)
    assert report.notes("conversations, parts joined") == [("ids that look like parts, kept apart", 3)]


def test_only_held_out(many, tmp_path):
    made = options(many, tmp_path / "set", num_conversations=0, held_out=3, held_out_min_tokens=10)
    report = prepare(made, Words(), quiet())
    assert report.examined == 3
    assert list(read_metadata(tmp_path / "set")["splits"]) == ["held_out"]


@pytest.mark.parametrize(
    "changes", [{"min_tokens": 900}, {"held_out": 2, "held_out_min_tokens": 900}, {"portion": (0.0, 1e-9)}]
)
def test_an_empty_split_is_refused_with_the_counts(many, tmp_path, changes):
    with pytest.raises(
        InputError, match=r"no conversation is left for split .*entries in the files 60, .*long enough \d"
    ):
        prepare(options(many, tmp_path / "set", **changes), Words(), quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["many.json"]


def test_a_broken_file_needs_keep_complete(many, tmp_path):
    many.write_text(many.read_text()[:-30])
    with pytest.raises(InputError, match=r"cut off inside a string at byte \d+.* 59 whole entries .*--keep-complete"):
        prepare(options(many, tmp_path / "set"), Words(), quiet())
    assert not (tmp_path / "set").exists()
    report = prepare(options(many, tmp_path / "set", keep_complete=True), Words(), quiet())
    assert report.entries == 59
    assert "59 whole entries" in report.broken_files[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "lama-2"}, "did you mean 'llama-2'"),
        ({"format": "sharegtp"}, "did you mean 'sharegpt'"),
        ({"language": "english"}, "did you mean|known: any, en"),
        ({"sources": ()}, "no source file"),
        ({"min_tokens": 30, "max_tokens": 20}, "--min-tokens 30 --max-tokens 20"),
        ({"held_out": -1}, "neither may be negative"),
        ({"num_conversations": 0}, "nothing to prepare"),
        ({"held_out_min_tokens": 1}, "at least 2"),
        ({"portion": (0.5, 0.5)}, "0 <= START < END <= 1"),
        ({"portion": (float("nan"), 1.0)}, "0 <= START < END <= 1"),
    ],
)
def test_contradicting_options_are_refused(many, tmp_path, changes, message):
    made = Options(**{**options(many, tmp_path / "set").__dict__, **changes})
    with pytest.raises(InputError, match=message):
        prepare(made, Words(), quiet())


# --- other data than conversations ------------------------------------------------------------------------------------


def lines(path, *entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return path


def test_of_prompts_and_completions_the_completions_are_learned(tmp_path):
    source = lines(tmp_path / "a.jsonl", {"id": "c", "prompt": "one two ", "completion": "three four"})
    prepare(options(source, tmp_path / "set"), Words(), quiet())
    tokens = [1, *Words().encode("one two three four"), 2]
    assert records(tmp_path / "set") == [("c#0", tokens, [False] * 3 + [True] * 3)]
    assert read_metadata(tmp_path / "set")["template"] is None
    # On request, through the template as question and answer.
    prepare(options(source, tmp_path / "chat", format="instructions"), Words(), quiet())
    expected = encode_conversation([Turn("user", "one two"), Turn("assistant", "three four")], "llama-2", Words())
    assert records(tmp_path / "chat")[0][1] == expected.tokens.tolist()


def test_instructions_go_through_the_template(tmp_path):
    source = lines(tmp_path / "a.jsonl", {"instruction": "one", "input": "two", "output": "<p>three</p>"})
    prepare(options(source, tmp_path / "set"), Words(), quiet())
    expected = encode_conversation([Turn("user", "one\n\ntwo"), Turn("assistant", "<p>three</p>")], "llama-2", Words())
    (record,) = records(tmp_path / "set")
    assert record[1:] == (expected.tokens.tolist(), expected.loss_mask.tolist())
    assert read_metadata(tmp_path / "set")["template"] == "llama-2"


def test_texts_are_packed_and_learned_whole(tmp_path):
    texts = [words(5, "a"), words(9, "b"), words(20, "c")]
    source = lines(tmp_path / "a.jsonl", *({"id": text[0], "text": text} for text in texts), {"text": texts[0]})
    (tmp_path / "other.txt").write_text(words(9, "d"))
    made = Options(
        (source, tmp_path / "other.txt"),
        tmp_path / "set",
        min_tokens=2,
        max_tokens=11,
        language="any",
        held_out=1,
        held_out_min_tokens=22,
    )
    report = prepare(made, Words(), quiet())
    # A copy counts once.
    assert (report.forms, report.distinct) == ({"text": 5}, 4)
    (held_out,) = records(tmp_path / "set", "held_out")
    assert held_out[1:] == ([1, *Words().encode(texts[2])[:10]], [False] + [True] * 10)
    found = {name[0]: tokens for name, tokens, mask in records(tmp_path / "set") if mask == [False] + [True] * 10}
    assert found["b"] == [1, *Words().encode(texts[1]), 2]

    arguments = {"batch_size": 1, "seed": 0, "epochs": 1}
    packed = list(make_loader(tmp_path / "set", "train", length=14, mode="packed", **arguments))
    # 7 + 11 + 11 tokens in two rows; all tokens except a segment's first are predicted.
    assert len(packed) == 2
    for batch in packed:
        assert (batch["loss_mask"] == (batch["positions"] > 0)).all()
    padded = list(make_loader(tmp_path / "set", "train", length=11, mode="conversations", **arguments))
    assert sorted(int(batch["loss_mask"].sum()) for batch in padded) == [6, 10, 10]


# --- real conversations -----------------------------------------------------------------------------------------------


def test_real_conversations(real_sample, smollm2, tmp_path):
    begin = time.monotonic()
    made = Options(
        (real_sample,),
        tmp_path / "set",
        template="chatml",
        min_tokens=1250,
        max_tokens=2048,
        num_conversations=40,
        held_out=10,
        keep_complete=True,
    )
    report = prepare(made, smollm2, quiet())
    assert time.monotonic() - begin < 30
    assert num_records(tmp_path / "set", "train") == 40
    end = smollm2.token_id("<|im_end|>")
    start = smollm2.token_id("<|im_start|>")
    for split, shortest in (("train", 1250), ("held_out", 2048)):
        for record in Records(tmp_path / "set", split):
            tokens, mask = record["tokens"], record["loss_mask"]
            assert shortest <= len(tokens) <= 2048
            assert tokens[0] == start
            # Each learned stretch ends with the end of a turn, or where the record was cut.
            last = np.flatnonzero(mask & ~np.append(mask[1:], False))
            assert all(tokens[i] == end or i == len(tokens) - 1 for i in last)
            assert not np.any(mask & (tokens == start))
    # Most of the file is English, and about two thirds of the text are answers.
    assert report.in_language > 0.9 * report.distinct
    share = report.splits["train"].response_tokens / report.splits["train"].tokens
    assert 0.4 < share < 0.95
