import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eabf_jax.data.chat import Encoded
from eabf_jax.data.dataset import DatasetWriter
from eabf_jax.data.loader import make_loader, steps_per_epoch
from eabf_jax.errors import InputError

LENGTHS = [5, 16, 9, 12, 3, 7, 16, 11, 4, 8, 10, 6, 13, 2, 15, 14, 1, 9, 12, 8, 7, 40]


def write(directory, lengths):
    """Writes records whose tokens identify them: token t of record r is 1000 * (r + 1) + t."""
    with DatasetWriter(directory) as writer:
        for number, length in enumerate(lengths):
            tokens = np.arange(length, dtype=np.int32) + 1000 * (number + 1)
            writer.add("train", Encoded(tokens, np.arange(length) % 2 == 1), f"r{number}")
        writer.finish({})
    return directory


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write(tmp_path_factory.mktemp("loader") / "set", LENGTHS)


def loader(dataset, **options):
    return make_loader(dataset, "train", **{"batch_size": 4, "length": 40, "seed": 5, **options})


def same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


def rows_of(batches):
    return [row for batch in batches for row in batch["tokens"]]


def test_a_row_is_one_padded_record(dataset):
    batches = list(loader(dataset, epochs=1))
    assert len(batches) == steps_per_epoch(dataset, "train", batch_size=4, length=40, mode="conversations") == 5
    for batch in batches:
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
            "tokens": ((4, 40), np.dtype(np.int32)),
            "loss_mask": ((4, 40), np.dtype(bool)),
            "positions": ((4, 40), np.dtype(np.int32)),
            "segment_ids": ((4, 40), np.dtype(np.int32)),
        }
        for row in range(4):
            number = batch["tokens"][row, 0] // 1000 - 1
            used = LENGTHS[number]
            pad = [0] * (40 - used)
            assert batch["tokens"][row].tolist() == [1000 * (number + 1) + t for t in range(used)] + pad
            assert batch["loss_mask"][row].tolist() == [t % 2 == 1 for t in range(used)] + pad
            assert batch["positions"][row].tolist() == [*range(used), *pad]
            assert batch["segment_ids"][row].tolist() == [1] * used + pad


def test_every_epoch_is_another_shuffle_without_its_incomplete_batch(dataset):
    batches = list(loader(dataset, epochs=3))
    # 22 records are 5 batches of 4; the last 2 records of each epoch are dropped.
    assert len(batches) == 15
    epochs = [[row[0] // 1000 for row in rows_of(batches[5 * e : 5 * e + 5])] for e in range(3)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides(dataset):
    same(loader(dataset, epochs=2), loader(dataset, epochs=2))
    first, other = (rows_of(loader(dataset, epochs=1, seed=seed)) for seed in (5, 6))
    assert [row[0] for row in first] != [row[0] for row in other]


def test_without_a_number_of_epochs_it_does_not_end(dataset):
    endless = loader(dataset)
    same([next(endless) for _ in range(12)], list(loader(dataset, epochs=3))[:12])


@pytest.mark.parametrize("mode", ["conversations", "packed"])
@pytest.mark.parametrize("taken", [0, 1, 4, 5, 7])
def test_it_resumes_after_the_batch_last_taken(dataset, mode, taken):
    options = {"epochs": 3, "batch_size": 2, "mode": mode, "length": 40 if mode == "conversations" else 17}
    whole = list(loader(dataset, **options))
    interrupted = loader(dataset, **options)
    for _ in range(taken):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = loader(dataset, **options)
    resumed.set_state(state)
    same(resumed, whole[taken:])


@pytest.mark.parametrize("mode", ["conversations", "packed"])
@pytest.mark.parametrize("count", [2, 4])
def test_the_processes_together_have_the_batch_of_one(dataset, mode, count):
    whole = list(loader(dataset, epochs=2, mode=mode))
    parts = [list(loader(dataset, epochs=2, mode=mode, process_index=i, process_count=count)) for i in range(count)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts, strict=True)
    ]
    same(joined, whole)
    assert parts[0][0]["tokens"].shape == (4 // count, 40)


def test_packed_rows_hold_every_token_once(dataset):
    total = sum(LENGTHS)
    length = 17
    rows = total // length
    batches = list(loader(dataset, epochs=1, batch_size=1, length=length, mode="packed"))
    assert len(batches) == steps_per_epoch(dataset, "train", batch_size=1, length=length, mode="packed") == rows
    seen = np.concatenate(rows_of(batches))
    assert len(set(seen.tolist())) == len(seen) == rows * length
    everything = {1000 * (n + 1) + t for n, size in enumerate(LENGTHS) for t in range(size)}
    assert set(seen.tolist()) <= everything
    assert len(everything) - len(seen) < length


@pytest.mark.parametrize(("mode", "length", "rows"), [("conversations", 40, 9), ("packed", 17, sum(LENGTHS[:9]) // 17)])
def test_samples_are_the_first_records(dataset, mode, length, rows):
    options = {"batch_size": 2, "length": length, "mode": mode, "samples": 9}
    assert steps_per_epoch(dataset, "train", **options) == rows // 2
    batches = list(loader(dataset, epochs=40, **options))
    assert len(batches) == 40 * (rows // 2)
    found = {int(token) // 1000 - 1 for row in rows_of(batches) for token in row if token}
    # Packed rows lack the tokens of the last incomplete row, which may be a whole record.
    assert found <= set(range(9)) and len(found) >= (9 if mode == "conversations" else 6)


def test_a_longer_record_behind_the_samples_does_not_matter(dataset):
    most = max(LENGTHS[:5])
    assert steps_per_epoch(dataset, "train", batch_size=5, length=most, mode="conversations", samples=5) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_packed_segments_are_consecutive_pieces_of_one_record(dataset, length, seed):
    for batch in loader(dataset, epochs=1, batch_size=2, length=length, seed=seed, mode="packed"):
        for tokens, mask, positions, segments in zip(
            *(batch[name] for name in ("tokens", "loss_mask", "positions", "segment_ids")), strict=True
        ):
            assert segments.min() == 1
            for segment in range(1, segments.max() + 1):
                place = np.flatnonzero(segments == segment)
                assert place.tolist() == list(range(place[0], place[-1] + 1))
                assert positions[place].tolist() == list(range(len(place)))
                assert mask[place].tolist() == [False] + [True] * (len(place) - 1)
                piece = tokens[place]
                assert (np.diff(piece) == 1).all()
                assert len(set(piece // 1000)) == 1
                # Only the row's first segment may begin inside a record, and only its last may end inside one.
                if segment > 1:
                    assert piece[0] % 1000 == 0
                if segment < segments.max():
                    assert piece[-1] % 1000 == LENGTHS[piece[0] // 1000 - 1] - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 23}, "has 22 records, fewer than one batch of 23"),
        ({"batch_size": 8, "length": 40, "mode": "packed"}, "has 5 rows of 40 tokens, fewer than one batch of 8"),
        ({"length": 39}, "has records of 40 tokens, but rows have 39: prepare with --max-tokens 39"),
        ({"samples": 23}, "has 22 records, and 23 samples are asked for: prepare more, or use fewer"),
        ({"samples": 3}, "has 3 records, fewer than one batch of 4"),
        ({"process_count": 3}, "batch size 4 is not divisible by 3 processes"),
        ({"mode": "pakced"}, "did you mean 'packed'"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"length": 0}, "at least 1"),
    ],
)
def test_impossible_requests_are_refused(dataset, options, message):
    with pytest.raises(InputError, match=message):
        loader(dataset, **options)


def test_a_damaged_record_stops_the_loop_with_one_line(tmp_path):
    dataset = write(tmp_path / "set", [30_000])
    (shard,) = dataset.glob("sharegpt-train.array_record-*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 8] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"record 0 of .* is damaged"):
        next(loader(dataset, batch_size=1, length=30_000))


def test_loading_starts_no_accelerator(dataset):
    code = f"""
        import sys
        from eabf_jax.data.loader import make_loader
        next(make_loader({str(dataset)!r}, "train", batch_size=4, length=40, seed=0))
        bridge = sys.modules.get("jax._src.xla_bridge")
        print(bool(bridge and bridge._backends), "tensorflow" in sys.modules)
    """
    printed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["False", "False"]
