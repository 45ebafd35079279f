"""Reads mutated files with the readers of the commands, and sorts the outcomes.

Each execution changes a valid file by a random number generator that is seeded with the reader's name, the seed and the
execution's number, so that an execution can be repeated alone (`--first N --executions 1`). An outcome is

accepted   the reader took the file
refused    `InputError`, of one line
finding    any other exception, more than 10 s, or more than 1 GiB of further memory

Usage: python benchmarks/fuzz.py [--reader NAME ...] [--executions N] [--first N] [--seed N] [--json FILE]
"""

import argparse
import copy
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "tiny"
SECONDS = 10
MEMORY = 2**30

NESTED = 100_000


class TooSlow(BaseException):
    """The time of an execution is over; not an Exception, so that no reader takes it for a damaged file."""


@dataclass(frozen=True)
class Reader:
    """A reader and its valid files.

    Attributes:
      prepare: writes valid files into an empty directory.
      read: reads the directory as the commands do.
      files: the files to change.
    """

    prepare: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...]


# --- mutations --------------------------------------------------------------------------------------------------------


def hostile_value(chance: random.Random, old: Any) -> Any:
    """Returns a value of the kinds that readers fail on."""
    return chance.choice(
        [
            *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**12, 10**30, 10**400, -(10**18)),
            *(0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
            *("", "\0", "a\0b", "\ud800", "x\udfffy", "../../../etc/passwd", "/dev/zero", "é" * 300, "1", "NaN", "32"),
            *("{{", "%s%n", "\n", "x" * 100_000, "<s>", "</s>", "null"),
            *([], {}, [None], [[]], {"": None}, {"type": "eabf"}, {"content": 1}, [1, "a", None], {"\ud800": "\0"}),
            *([old], {"value": old}, [old] * 3, str(old)),
        ]
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutated_value(chance: random.Random, value: Any) -> Any:
    """Returns a copy with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        where = chance.choice(list(places(value)))
        if not where:
            if chance.random() < 0.2:
                return hostile_value(chance, value)
            if isinstance(value, dict):
                value[hostile_key(chance)] = hostile_value(chance, 1)
            continue
        parent = value
        for key in where[:-1]:
            parent = parent[key]
        kind = chance.random()
        if kind < 0.75:
            parent[where[-1]] = hostile_value(chance, parent[where[-1]])
        elif kind < 0.9 or not isinstance(parent, dict):
            del parent[where[-1]]
        else:
            parent[hostile_key(chance)] = parent.pop(where[-1])
    return value


def hostile_key(chance: random.Random) -> str:
    """Returns a name of the kinds that readers fail on."""
    return chance.choice(["", "\0", "\ud800", "type", "model.embed_tokens.weight", "x" * 5000, "../up", "__class__"])


def nested(chance: random.Random) -> str:
    """Returns JSON that is nested deeply."""
    depth = chance.choice((50, 99, 101, 500, 990, 2_000, NESTED))
    return chance.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth))


def mutated_bytes(chance: random.Random, data: bytes) -> bytes:
    """Returns a copy with bytes flipped, cut, repeated or put in, or with a large number somewhere."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(found) + 1)
        kind = chance.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del found[at : len(found) if chance.random() < 0.3 else at + chance.randrange(64)]
        elif kind == 2:
            found[at:at] = found[at : at + chance.randrange(256)]
        elif kind == 3:
            found[at:at] = chance.choice(
                (b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"{", b"[" * 300, b"&a [*a]")
            )
        else:
            number = chance.choice((2**32 - 1, 2**40, 2**63, 2**64 - 1, 10**8, 0, 1))
            size = chance.choice((4, 8))
            found[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(found)


def mutated_json(chance: random.Random, data: bytes) -> bytes:
    """Returns JSON with changed values, deep nesting, or changed bytes."""
    kind = chance.random()
    if kind < 0.15:
        return mutated_bytes(chance, data)
    if kind < 0.2:
        return nested(chance).encode()
    text = json.dumps(mutated_value(chance, json.loads(data)))
    if kind < 0.25:
        spots = [i for i, letter in enumerate(text) if letter in "[{:,"]
        at = chance.choice(spots or [0])
        text = f"{text[: at + 1]}{nested(chance)}{text[at + 1 :]}"
    if kind > 0.97:
        text = text.replace("1", "9" * chance.choice((20, 400, 5000)), 1)
    return text.encode()


def mutated_lines(chance: random.Random, data: bytes) -> bytes:
    """Returns JSON lines with one changed."""
    lines = data.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = mutated_json(chance, lines[at])
    return b"\n".join(lines) + b"\n"


def mutated_yaml(chance: random.Random, data: bytes) -> bytes:
    """Returns YAML with changed values, aliases that explode, or changed bytes."""
    kind = chance.random()
    if kind < 0.3:
        return mutated_bytes(chance, data)
    if kind < 0.35:
        return nested(chance).encode()
    text = data.decode()
    if kind < 0.45:
        depth = chance.choice((3, 9, 40))
        bomb = ["x0: &x0 [1,1,1,1,1,1,1,1,1]"]
        bomb += [f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9)}]" for i in range(1, depth)]
        return ("\n".join(bomb) + "\n" + text).encode()
    if kind < 0.5:
        odd = (
            "? [1, 2]\n: 3",
            "a: &a [*a]",
            "!!python/object:os.system x",
            "<<: 3",
            "a: 2024-02-30",
            "a: 0x" + "f" * 9000,
        )
        return f"{text}\n{chance.choice(odd)}\n".encode()
    value = mutated_value(chance, yaml.safe_load(text))
    try:
        return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return mutated_bytes(chance, data)


def mutated_safetensors(chance: random.Random, data: bytes) -> bytes:
    """Returns a safetensors file with a changed header, or changed bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    if chance.random() < 0.2:
        head = mutated_bytes(chance, data[: 8 + length])
        return head + rest
    header = mutated_json(chance, header)
    told = len(header) if chance.random() < 0.9 else chance.choice((0, 1, 2**40, 2**63, 2**64 - 1, len(header) - 1))
    return struct.pack("<Q", told) + header + (rest if chance.random() < 0.9 else rest[: len(rest) // 2])


def mutated_gguf(chance: random.Random, data: bytes) -> bytes:
    """Returns a GGUF file with changed bytes, mostly in its first part, which has the metadata."""
    end = chance.choice((64, 512, 4096, len(data)))
    return mutated_bytes(chance, data[:end]) + data[end:]


def mutate(chance: random.Random, name: str, data: bytes) -> bytes:
    """Returns a changed file, by its kind."""
    if chance.random() < 0.03:
        return data[: chance.randrange(len(data) + 1)]
    for suffix, change in MUTATIONS.items():
        if name.endswith(suffix):
            return change(chance, data)
    return mutated_bytes(chance, data)


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": mutated_json,
    ".jsonl": mutated_lines,
    ".yaml": mutated_yaml,
    ".safetensors": mutated_safetensors,
    ".gguf": mutated_gguf,
}


# --- readers ----------------------------------------------------------------------------------------------------------


def small_model(directory: Path) -> None:
    """Writes a Hugging Face directory with tiny weights of random numbers, in two shards, and a tokenizer."""
    import numpy as np
    from safetensors.numpy import save_file

    config = json.loads((TINY / "config.json").read_text())
    config |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 2}
    config |= {"torch_dtype": "float32", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    (directory / "config.json").write_text(json.dumps(config))
    layers = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    layers |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    tensors: dict[str, Any] = {"model.embed_tokens.weight": np.zeros((4096, 8), np.float32)}
    tensors["model.norm.weight"] = np.ones(8, np.float32)
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.{name}.weight": np.ones((8, 8), np.float32) for name in sorted(layers)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(8, np.float32)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: file for file, held in shards.items() for name in held},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer_files(directory: Path) -> None:
    """Writes a tokenizer as SentencePiece, with every settings file."""
    small_model(directory)
    shutil.copy(TINY / "tokenizer.model", directory)
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 512}))
    token = {"content": "<s>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    (directory / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": token, "additional_special_tokens": ["<x>"]})
    )
    (directory / "added_tokens.json").write_text(json.dumps({"<x>": 4096}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "bos_token_id": 1}))


def tokenizer_json(directory: Path) -> None:
    """Writes a small tokenizer.json with each kind of part."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

    small_model(directory)
    letters = {chr(i): i for i in range(32, 127)} | {"ab": 127, "abc": 128, "<s>": 129}
    made = tokenizers.Tokenizer(models.BPE(letters, [("a", "b"), ("ab", "c")], unk_token="a"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "y")])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.Digits()])
    made.decoder = decoders.Sequence([decoders.Replace("y", "x"), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 129)])
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<end>", special=True)])
    made.enable_padding(pad_token="<end>")
    made.enable_truncation(8)
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "bos_token": "<s>"}))


def read_tokenizer(directory: Path) -> None:
    from eabf_jax.interop.tokenizer import export_tokenizer, load_tokenizer

    tokenizer = load_tokenizer(directory)
    tokenizer.decode(tokenizer.encode("a b abc <s> 12", special=True))
    tokenizer.encode("a b abc <s> 12")
    target = directory / "exported"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    export_tokenizer(directory, target, 1024)


def read_model(directory: Path) -> None:
    from eabf_jax.interop.huggingface import open_leaves
    from eabf_jax.interop.model_card import origin
    from eabf_jax.model.parameters import parameters

    leaves = open_leaves(directory)
    origin(directory)
    for entry in parameters(leaves.config):
        leaves.read(entry.path)


def read_config_alone(directory: Path) -> None:
    from eabf_jax.interop.huggingface import config_to_hf, read_config
    from eabf_jax.model.parameters import parameter_count

    config = read_config(directory)
    parameter_count(config)
    config_to_hf(config)


def native_files(directory: Path) -> None:
    from eabf_jax.interop.huggingface import read_config
    from eabf_jax.interop.native import write_model_json
    from eabf_jax.model.lora import Lora

    small_model(directory)
    adapter = {**asdict(Lora()), "base": str(directory), "base_digest": "0" * 16}
    write_model_json(directory, read_config(directory), adapter=adapter)
    (directory / "config.json").unlink()


def read_native(directory: Path) -> None:
    from eabf_jax.interop.adapter import read_adapter
    from eabf_jax.interop.native import read_model_json

    read_model_json(directory).rope.to_dict()
    read_adapter(directory)


def dataset_files(directory: Path) -> None:
    from eabf_jax.data.dataset import FORMAT

    split = {"records": 3, "tokens": 30, "response_tokens": 9, "longest": 12, "files": {"a.array_record": 4}}
    told = {"format": FORMAT, "template": "llama2", "max_tokens": 512, "tokenizer": "0" * 16, "seed": 1}
    told |= {"vocab_size": 4096, "language": "en", "sources": ["a.json"], "splits": {"train": split, "test": split}}
    (directory / "eabf_dataset.json").write_text(json.dumps(told))
    (directory / "a.array_record").write_bytes(b"none")


def read_dataset(directory: Path) -> None:
    from eabf_jax.data.dataset import Records, num_records, read_metadata
    from eabf_jax.errors import InputError

    metadata = read_metadata(directory)
    metadata.get("vocab_size", 0) > 1  # noqa: B015 - as the commands compare it
    for split in metadata["splits"]:
        num_records(directory, split)
    for split in metadata["splits"]:
        try:
            Records(directory, split)
        except InputError:
            continue


def yaml_files(directory: Path) -> None:
    shutil.copy(ROOT / "configs" / "tiny_eabf_2k.yaml", directory / "run.yaml")


def read_run_yaml(directory: Path) -> None:
    from eabf_jax.training.recipe import load_config

    load_config(["--config_path", str(directory / "run.yaml")])


def study_files(directory: Path) -> None:
    shutil.copy(ROOT / "configs" / "studies" / "tiny_2k.yaml", directory / "study.yaml")


def read_study(directory: Path) -> None:
    from eabf_jax.analysis.study import load_study

    load_study(str(directory / "study.yaml"))


def run_files(directory: Path) -> None:
    """Writes the small files of a run, and of its evaluation."""
    from eabf_jax.training.recipe import dump_config, load_config

    small_model(directory)
    config = load_config(["--config_path", str(ROOT / "configs" / "tiny_eabf_2k.yaml")])
    (directory / "config.yaml").write_text(dump_config(config))
    dataset_files(directory)
    (directory / "eabf_dataset.json").rename(directory / "dataset.json")
    step = {"loss": 1.5, "tokens_per_second": 9.0, "trained_tokens": 10, "seconds": 0.1, "compile_seconds": 1.0}
    lines = [json.dumps({"step": number, **step}) for number in (1, 2, 3)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "evaluation").mkdir()
    table = {"title": "Perplexity", "header": ["model", "2,048"], "rows": [["tiny", "9.1"]]}
    (directory / "evaluation" / "perplexity.json").write_text(json.dumps({"table": table}))
    (directory / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n# A model\n")


def read_run(directory: Path) -> None:
    from eabf_jax.analysis.study_run import _metrics
    from eabf_jax.interop.huggingface import read_config
    from eabf_jax.interop.model_card import model_card
    from eabf_jax.training.recipe import config_differences, is_written_config, load_config

    model_card(directory, "name", read_config(directory), 3)
    is_written_config(directory / "config.yaml")
    config_differences(
        directory / "config.yaml", load_config(["--config_path", str(ROOT / "configs/tiny_eabf_2k.yaml")])
    )
    _metrics(directory)


def gguf_files(directory: Path) -> None:
    from eabf_jax.interop.gguf_writer import to_gguf

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        tokenizer_files(model)
        for name in ("special_tokens_map.json", "added_tokens.json"):
            (model / name).unlink()
        to_gguf(model, directory / "model.gguf")


def read_gguf(directory: Path) -> None:
    from eabf_jax.interop.gguf import from_gguf

    target = directory / "converted"
    shutil.rmtree(target, ignore_errors=True)
    from_gguf(directory / "model.gguf", target)


def template_files(directory: Path) -> None:
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    (directory / "template.jinja").write_text(settings["chat_template"])


def read_template(directory: Path) -> None:
    from eabf_jax.data.chat_template import render
    from eabf_jax.reading import read_text

    turns = [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi")]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    render(read_text(directory / "template.jinja"), turns, tokens, add_generation_prompt=True)


SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
READERS: dict[str, Reader] = {
    "config": Reader(small_model, read_config_alone, ("config.json",)),
    "index": Reader(small_model, read_model, ("model.safetensors.index.json",)),
    "safetensors": Reader(small_model, read_model, ("model-00002-of-00002.safetensors",)),
    "native": Reader(native_files, read_native, ("model.json",)),
    "dataset": Reader(dataset_files, read_dataset, ("eabf_dataset.json",)),
    "settings": Reader(tokenizer_files, read_tokenizer, SETTINGS),
    "tokenizer_json": Reader(tokenizer_json, read_tokenizer, ("tokenizer.json",)),
    "sentencepiece": Reader(tokenizer_files, read_tokenizer, ("tokenizer.model",)),
    "template": Reader(template_files, read_template, ("template.jinja",)),
    "yaml": Reader(yaml_files, read_run_yaml, ("run.yaml",)),
    "study": Reader(study_files, read_study, ("study.yaml",)),
    "run": Reader(
        run_files,
        read_run,
        ("config.yaml", "dataset.json", "metrics.jsonl", "evaluation/perplexity.json", "README.md"),
    ),
    "gguf": Reader(gguf_files, read_gguf, ("model.gguf",)),
}


# --- executions -------------------------------------------------------------------------------------------------------


def execute(name: str, number: int, seed: int, directory: Path, valid: dict[str, bytes]) -> tuple[str, str]:
    """Runs one execution in a directory with the reader's valid files; returns the outcome and what it says."""
    from eabf_jax.errors import InputError

    chance = random.Random(f"{name} {seed} {number}")
    file = chance.choice(READERS[name].files)
    (directory / file).write_bytes(mutate(chance, file, valid[file]))
    begun, before = time.monotonic(), peak()
    try:
        with timed(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            READERS[name].read(directory)
        outcome, says = "accepted", ""
    except InputError as error:
        outcome, says = "refused", str(error)
        if isinstance(error.__cause__, MemoryError):
            outcome = "memory"
    except TooSlow:
        outcome, says = "slow", ""
    except MemoryError:
        outcome, says = "memory", ""
    except OSError as error:
        # The command line has its own line for a path that cannot be opened.
        outcome = "refused" if error.filename is not None else "finding"
        says = f"OSError: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)
        own = [entry for entry in place if "eabf_jax" in entry.filename]
        at = own[-1] if own else place[-1]
        outcome, says = "finding", f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {error!s:.200}"
    finally:
        (directory / file).write_bytes(valid[file])
    if time.monotonic() - begun > SECONDS:
        outcome = "slow"
    if peak() - before > MEMORY:
        outcome = "memory"
    return outcome, says


def peak() -> int:
    """Returns the largest memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def timed() -> Iterator[None]:
    """Raises TooSlow in the block when its time is over."""

    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def work(name: str, numbers: range, seed: int, results: Any) -> None:
    """Runs executions in a process of its own, which may end at any of them."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # the panics of Rust code
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        reader = READERS[name]
        reader.prepare(directory)
        valid = {file: (directory / file).read_bytes() for file in reader.files}
        reader.read(directory)  # imports everything, and proves that the valid files are valid
        limit = virtual() + 3 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in numbers:
            results.send((number, *execute(name, number, seed, directory, valid)))
    results.send(None)


def virtual() -> int:
    """Returns this process's address space in bytes."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 64 * MEMORY


def fuzz(name: str, numbers: range, seed: int) -> Iterator[tuple[int, str, str]]:
    """Runs executions; yields the number of each, its outcome and what the reader said."""
    context = multiprocessing.get_context("spawn")
    while numbers:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(name, numbers, seed, sender), daemon=True)
        process.start()
        sender.close()
        following, started = numbers.start, False
        try:
            # The first answer waits for imports.
            while receiver.poll(3 * SECONDS if started else 120):
                found = receiver.recv()
                if found is None:
                    process.join()
                    return
                started, following = True, found[0] + 1
                yield found
            yield following, "slow", "no answer"
        except EOFError:
            process.join()
            if not started and following == numbers.start and process.exitcode == 1:
                raise RuntimeError(f"{name}: the valid files are not accepted") from None
            yield following, "finding", f"the process ended with {process.exitcode}"
        process.kill()
        process.join()
        numbers = range(following + 1, numbers.stop)


def main() -> None:
    """Fuzzes the readers and prints the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--reader", action="append", choices=READERS, help="repeatable (default: all)")
    parser.add_argument("--executions", type=int, default=2000, help="of each reader (default: 2000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first execution (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for name in options.reader or READERS:
        begun, counts = time.monotonic(), Counter[str]()
        examples: dict[str, str] = {}
        for number, outcome, says in fuzz(name, range(options.first, options.first + options.executions), options.seed):
            counts[outcome] += 1
            if outcome not in ("accepted", "refused"):
                examples.setdefault(f"{outcome}: {says.split(': ')[0]}", f"{number}: {says}")
        seconds = time.monotonic() - begun
        print(f"{name:15} {dict(counts)} in {seconds:.0f} s", flush=True)
        for kind, example in examples.items():
            print(f"    {kind}\n        execution {example}", flush=True)
        figures[name] = {"executions": options.executions, **counts, "seconds": round(seconds)}
    if options.json:
        found = {"command": " ".join(["python", "benchmarks/fuzz.py", *sys.argv[1:]]), "readers": figures}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
