"""A few mutated files for each reader, and the executions that once failed."""

import pytest

EXECUTIONS = 12
# Executions with seed 0 that once ended otherwise: a NUL in a shard's name, an id of 2^31 in a vocabulary.
ONCE_FAILED = {"index": (38,), "tokenizer_json": (12,)}


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("fuzz")


@pytest.mark.parametrize(
    "name",
    [
        "config",
        "index",
        "safetensors",
        "native",
        "dataset",
        "settings",
        "tokenizer_json",
        "sentencepiece",
        "template",
        "yaml",
        "study",
        "run",
        "gguf",
    ],
)
def test_mutated_files_are_accepted_or_refused_in_one_line(program, name, tmp_path):
    reader = program.READERS[name]
    reader.prepare(tmp_path)
    valid = {file: (tmp_path / file).read_bytes() for file in reader.files}
    reader.read(tmp_path)
    outcomes = {}
    for number in (*range(EXECUTIONS), *ONCE_FAILED.get(name, ())):
        outcomes[number] = program.execute(name, number, 0, tmp_path, valid)
    assert {kind for kind, _ in outcomes.values()} <= {"accepted", "refused"}, outcomes
    assert any(kind == "refused" for kind, _ in outcomes.values())


def test_every_reader_is_tested(program):
    marks = test_mutated_files_are_accepted_or_refused_in_one_line.pytestmark
    assert set(marks[0].args[1]) == set(program.READERS)


def test_findings_are_told_apart(program, monkeypatch, tmp_path):
    """A reader that fails, hangs or refuses is named as such, and an execution can be repeated."""

    def read(directory):
        text = (directory / "file").read_bytes()
        if len(text) % 3 == 0:
            raise KeyError("a")
        if len(text) % 3 == 1:
            while True:
                pass

    monkeypatch.setitem(program.READERS, "own", program.Reader(lambda directory: None, read, ("file",)))
    monkeypatch.setattr(program, "SECONDS", 1)
    monkeypatch.setattr(program, "mutate", lambda chance, name, data: data)
    kinds = [program.execute("own", 0, 0, tmp_path, {"file": b"x" * size})[0] for size in (3, 4, 5)]
    assert kinds == ["finding", "slow", "accepted"]
