import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds

from eabf_jax.data.chat import Encoded
from eabf_jax.data.dataset import (
    METADATA_FILE,
    DatasetWriter,
    Records,
    num_records,
    read_metadata,
    record_lengths,
    tokenizer_digest,
)
from eabf_jax.errors import InputError


def record(number, length=None):
    length = 3 + number if length is None else length
    return Encoded(np.arange(length, dtype=np.int32) + 1000 * number, np.arange(length) % 3 == 1)


def write(directory, counts, *, overwrite=False, shard_bytes=1 << 20):
    with DatasetWriter(directory, overwrite=overwrite, shard_bytes=shard_bytes) as writer:
        for split, count in counts.items():
            for number in range(count):
                writer.add(split, record(number), f"{split}#{number}")
        writer.finish({"seed": 3})
    return directory


@pytest.fixture
def dataset(tmp_path):
    return write(tmp_path / "set", {"train": 9, "held_out": 2}, shard_bytes=60)


def test_tfds_reads_it_without_tensorflow(dataset):
    code = f"""
        import json, sys
        import tensorflow_datasets as tfds
        builder = tfds.builder_from_directory({str(dataset)!r})
        source = builder.as_data_source()
        assert "tensorflow" not in sys.modules
        print(json.dumps({{split: [[r["id"].decode(), r["tokens"].tolist(), r["loss_mask"].tolist()] for r in records]
                          for split, records in source.items()}}))
    """
    printed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    expected = {
        split: [[f"{split}#{i}", record(i).tokens.tolist(), record(i).loss_mask.tolist()] for i in range(count)]
        for split, count in (("train", 9), ("held_out", 2))
    }
    assert json.loads(printed.stdout) == expected


def test_large_sets_are_divided_into_shards(dataset):
    shards = sorted(dataset.glob("sharegpt-train.array_record-*"))
    assert len(shards) > 2
    assert shards[0].name == f"sharegpt-train.array_record-00000-of-{len(shards):05}"
    info = tfds.builder_from_directory(dataset).info.splits["train"]
    assert len(info.shard_lengths) == len(shards)
    assert sum(info.shard_lengths) == 9


def test_records_and_figures(dataset):
    records = Records(dataset, "train")
    assert len(records) == num_records(dataset, "train") == 9
    for number in range(9):
        found = records[number]
        np.testing.assert_array_equal(found["tokens"], record(number).tokens)
        np.testing.assert_array_equal(found["loss_mask"], record(number).loss_mask)
        assert (found["tokens"].dtype, found["loss_mask"].dtype) == (np.int32, np.bool_)
        assert found["id"] == f"train#{number}"
    assert record_lengths(dataset, "train").tolist() == list(range(3, 12))
    metadata = read_metadata(dataset)
    assert metadata["seed"] == 3
    summary = metadata["splits"]["train"]
    assert (summary["records"], summary["tokens"], summary["longest"]) == (9, sum(range(3, 12)), 11)
    assert summary["response_tokens"] == sum(len(range(1, n, 3)) for n in range(3, 12))
    assert [path.name for path in dataset.parent.iterdir()] == ["set"]


def test_the_folder_has_ordinary_permissions(dataset, tmp_path):
    (tmp_path / "plain").mkdir()
    assert dataset.stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- the destination --------------------------------------------------------------------------------------------------


def test_a_dataset_is_replaced_only_when_told(dataset):
    with pytest.raises(InputError, match=r"set is not empty; pass --overwrite"):
        write(dataset, {"train": 1})
    assert num_records(dataset, "train") == 9
    (dataset / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"set is not empty, and eabf-jax did not write notes\.txt in it"):
        write(dataset, {"train": 1}, overwrite=True)
    (dataset / "notes.txt").unlink()
    write(dataset, {"train": 1}, overwrite=True)
    assert num_records(dataset, "train") == 1
    assert [path.name for path in dataset.parent.iterdir()] == ["set"]


def test_what_is_no_dataset_is_never_replaced(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"is not empty, and no eabf_dataset\.json marks it as a prepared dataset"):
        DatasetWriter(folder, overwrite=True)
    with pytest.raises(InputError, match="is a file: name a directory"):
        DatasetWriter(folder / "letter.txt", overwrite=True)
    assert (folder / "letter.txt").read_text() == "dear"


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "set").mkdir()
    assert num_records(write(tmp_path / "set", {"train": 2}), "train") == 2


def interrupt(directory, error, *, overwrite=False):
    with DatasetWriter(directory, overwrite=overwrite) as writer:
        writer.add("train", record(1), "x")
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_is_interrupted_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        interrupt(tmp_path / "set", error)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_keeps_the_old_one(dataset):
    with pytest.raises(KeyboardInterrupt):
        interrupt(dataset, KeyboardInterrupt, overwrite=True)
    assert num_records(dataset, "train") == 9
    assert [path.name for path in dataset.parent.iterdir()] == ["set"]


@pytest.mark.parametrize("limit", [0, 100_000])
def test_no_space_left_is_one_line_and_leaves_nothing(tmp_path, limit):
    # A limit on file sizes makes writes fail as on a full disk, in the same system calls.
    code = f"""
        import resource, signal
        import numpy as np
        from eabf_jax.data.chat import Encoded
        from eabf_jax.data.dataset import DatasetWriter
        from eabf_jax.errors import InputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        rng = np.random.default_rng(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
        try:
            with DatasetWriter({str(tmp_path / "set")!r}) as writer:
                for number in range(300):
                    writer.add("train", Encoded(rng.integers(0, 2**31, 4096, np.int32), np.ones(4096, bool)), "x")
                writer.finish({{}})
        except InputError as error:
            print(error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    (line,) = result.stdout.splitlines()
    assert "cannot write the dataset" in line
    assert "File too large" in line
    assert "free some space" in line
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(InputError, match=r"file/set: .*file is a file, so nothing can be created in it"),
        DatasetWriter(tmp_path / "file" / "set"),
    ):
        raise AssertionError("entered")


# --- damage -----------------------------------------------------------------------------------------------------------


def damage(dataset, kind):
    (shard, *_) = sorted(dataset.glob("sharegpt-train.array_record-*"))
    if kind == "empty":
        shutil.rmtree(dataset)
        dataset.mkdir()
    elif kind == "absent":
        shutil.rmtree(dataset)
    elif kind == "cut":
        os.truncate(shard, shard.stat().st_size // 2)
    elif kind == "missing shard":
        shard.unlink()
    elif kind == "lengths":
        (dataset / "lengths-train.npy").write_bytes(b"x" * (dataset / "lengths-train.npy").stat().st_size)
    elif kind == "info":
        (dataset / "dataset_info.json").write_text('{"name": ')
    elif kind == "features":
        (dataset / "features.json").unlink()
    elif kind == "metadata":
        (dataset / METADATA_FILE).write_text('{"format": 1}')
    elif kind == "metadata kind":
        (dataset / METADATA_FILE).write_text("[]")
    elif kind == "version":
        content = json.loads((dataset / METADATA_FILE).read_text())
        (dataset / METADATA_FILE).write_text(json.dumps({**content, "format": 99}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is not a prepared dataset"),
        ("absent", "is not a prepared dataset"),
        ("cut", r"has \d+ bytes, expected \d+"),
        ("missing shard", "is missing: prepare"),
        ("info", "cannot be opened"),
        ("features", "cannot be opened"),
        ("metadata", "damaged; .*'splits'"),
        ("metadata kind", "damaged; prepare"),
        ("version", "has format 99"),
    ],
)
def test_damaged_datasets_are_refused(dataset, kind, message):
    damage(dataset, kind)
    with pytest.raises(InputError, match=message) as caught:
        Records(dataset, "train")
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_noticed_when_its_record_is_read(tmp_path):
    dataset = tmp_path / "set"
    with DatasetWriter(dataset) as writer:
        writer.add("train", record(1, 30_000), "x")
        writer.finish({})
    (shard,) = dataset.glob("sharegpt-train.array_record-*")
    content = bytearray(shard.read_bytes())
    # The first block of 64 KiB begins with the chunk of the only record.
    content[len(content) // 8] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"record 0 of .* is damaged"):
        Records(dataset, "train")[0]


@pytest.mark.parametrize("content", [None, b"not an array", "other shape"])
def test_damaged_lengths_are_refused(dataset, content):
    path = dataset / "lengths-train.npy"
    if content is None:
        path.unlink()
    elif content == "other shape":
        np.save(path, np.zeros(3, np.int32))
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"missing or damaged|has shape \(3,\), expected \(9,\)"):
        record_lengths(dataset, "train")


def test_unknown_splits_are_refused(dataset):
    with pytest.raises(InputError, match="'trian': did you mean 'train'"):
        num_records(dataset, "trian")


def test_tokenizer_digests_tell_tokenizers_apart(smollm2, llama_like):
    assert tokenizer_digest(smollm2) == tokenizer_digest(smollm2) != tokenizer_digest(llama_like)
    assert len(tokenizer_digest(smollm2)) == 16
