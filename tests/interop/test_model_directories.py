"""What ordinary model directories hold besides a model's own files: compared with what transformers loads from them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hf_directories import assert_refused, edit_tensors, make, shard, tensors
from safetensors.torch import load_file, save_file

import eabf_jax
from eabf_jax.errors import InputError
from eabf_jax.interop.gguf import from_gguf
from eabf_jax.interop.huggingface import from_hf, to_hf
from eabf_jax.interop.loading import load_parameters
from eabf_jax.interop.tokenizer import load_tokenizer
from eabf_jax.model.parameters import flatten, parameters

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
INDEX = "model.safetensors.index.json"


def assert_as_transformers_loads_it(directory: Path) -> None:
    """Compares every weight; transformers must have found all of them."""
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    state = theirs.state_dict()
    config, ours = load_parameters(directory)
    leaves = dict(flatten(ours))
    for entry in parameters(config):
        for layer, name in enumerate(entry.hf_names()):
            own = np.asarray(leaves[entry.path])[layer] if entry.layers else np.asarray(leaves[entry.path])
            np.testing.assert_array_equal(own.T if entry.transposed else own, state[name].numpy(), err_msg=name)


def with_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return edit


def old_buffers(values: dict[str, torch.Tensor]) -> None:
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq"):
        values[name] = torch.ones(4)
    values["model.layers.1.self_attn.rotary_emb.cos_cached"] = torch.ones(1, 1, 64, 8)
    values["model.layers.1.self_attn.bias"] = torch.ones(1, 1, 4, 4)
    values["model.layers.1.self_attn.masked_bias"] = torch.tensor(-1e4)
    values["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    values["model.layers.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    values["model.position_ids"] = torch.arange(64)[None]


def key_twice(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"vocab_size":', '"vocab_size": 5,\n  "vocab_size":'))


def listing(name: str) -> Callable[[dict[str, str]], None]:
    return lambda weights: weights.update({name: next(iter(weights.values()))})


def moved_in_index(weights: dict[str, str]) -> None:
    first, *_, last = sorted(set(weights.values()))
    weights["model.norm.weight"] = first if weights["model.norm.weight"] == last else last


def bare(directory: Path) -> None:
    model = transformers.AutoModel.from_pretrained(directory)
    shutil.rmtree(directory)
    model.save_pretrained(directory)
    assert "embed_tokens.weight" in load_file(directory / "model.safetensors")


def in_a_folder(directory: Path) -> None:
    (directory / "shards").mkdir()
    path = shard(directory)
    path.rename(directory / "shards" / path.name)
    with_index(lambda weights: weights.update({k: f"shards/{v}" for k, v in weights.items() if v == path.name}))(
        directory
    )


def beside(directory: Path) -> None:
    """Leaves one model.safetensors, and other copies that are not read."""
    edit_tensors(lambda values: None)(directory)
    (directory / "original").mkdir()
    (directory / "original" / "params.json").write_text("{}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "training_args.bin", "x.gguf", INDEX):
        (directory / name).write_text("not read")


WORKS: dict[str, tuple[dict[str, object], Callable[[Path], object]]] = {
    "buffers of old releases": ({}, edit_tensors(old_buffers)),
    "an index that lists buffers": ({}, with_index(listing("model.layers.0.self_attn.rotary_emb.inv_freq"))),
    "an index that lists a tied output": ({"tie_word_embeddings": True}, with_index(listing("lm_head.weight"))),
    "an index without one tensor": ({}, with_index(lambda weights: weights.pop("model.norm.weight"))),
    "an index with a tensor elsewhere": ({}, with_index(moved_in_index)),
    "an index of files in a folder": ({}, in_a_folder),
    "a bare tied LlamaModel": ({"tie_word_embeddings": True}, bare),
    "names without a prefix, and an output with one": (
        {},
        edit_tensors(lambda values: [values.update({rename(name): values.pop(name)}) for name in [*values]]),
    ),
    "a tied model that stores only its output": (
        {"tie_word_embeddings": True},
        edit_tensors(lambda values: values.update({"lm_head.weight": values.pop("model.embed_tokens.weight")})),
    ),
    "other copies of the weights": ({}, beside),
    "a key of config.json twice": ({}, key_twice),
}  # fmt: skip


def rename(name: str) -> str:
    return f"model.{name}" if name == "lm_head.weight" else name.removeprefix("model.")


@pytest.mark.parametrize("case", WORKS)
def test_what_transformers_loads_is_loaded(tmp_path: Path, case: str) -> None:
    settings, change = WORKS[case]
    directory = make(tmp_path / "hf", shard="20KB", **settings)
    change(directory)
    if not (directory / INDEX).is_file() or "not read" in (directory / INDEX).read_text():
        path = directory / "model.safetensors"
        save_file(load_file(path), path, metadata={"format": "pt"})  # as transformers asks
    assert_as_transformers_loads_it(directory)


def no_output(directory: Path) -> None:
    bare(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def only(name: str, content: str = "") -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        for path in directory.glob("model*"):
            path.unlink()
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content)

    return edit


def twice(directory: Path) -> None:
    first, second = shard(directory, 0), shard(directory, 1)
    values = load_file(second)
    save_file({**values, next(iter(load_file(first))): torch.ones(2)}, second)


def link_to_nothing(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "model.safetensors").symlink_to("../../blobs/0")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no output layer": (no_output, "lm_head.weight is missing; .* save it with AutoModelForCausalLM, or set tie_word"),
    "another prefix": (
        edit_tensors(lambda values: [values.update({f"module.{name}": values.pop(name)}) for name in [*values]]),
        r"embed_tokens.weight is missing; .*: module.model.embed_tokens.weight is there, so remove the prefix 'module",
    ),
    "with and without a prefix": (
        edit_tensors(lambda values: values.update({"norm.weight": torch.ones(32)})),
        "tensor model.norm.weight is stored twice, once with and once without `model.`",
    ),
    "a tensor in two shards": (twice, r"is in model-00001-of-\d+.safetensors too; expected it in one shard"),
    "a Git LFS pointer": (
        lambda directory: shard(directory).write_text(POINTER), "only Git LFS's pointer .* run `git lfs pull`"
    ),
    "weights of AutoGPTQ": (
        lambda directory: (directory / "quantize_config.json").write_text("{}"), "quantize_config.json: .*are quantised"
    ),
    "a broken link": (link_to_nothing, "model.safetensors: a link to .*blobs/0, which is missing; download it again"),
    "a bias that config.json denies": (
        edit_tensors(lambda values: values.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
        r"q_proj.bias is not part of this model \(1 such\); expected attention_bias true in config.json",
    ),
    "a variant": (only("model.fp16.safetensors"), "model.fp16.safetensors is there, but expected .*: copy the index"),
    "GGUF beside config.json": (only("m.Q4_0.gguf"), "no weights; .*convert/from_gguf.py --src .*m.Q4_0.gguf"),
    "Meta's weights": (only("consolidated.00.pth"), "no weights; .*these are Meta's or Mistral's own files"),
    "a checkpoint below": (only("checkpoint-5/config.json"), "no weights; .*did you mean .*checkpoint-5?"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_names_its_remedy(good: Path, tmp_path: Path, case: str) -> None:
    assert_refused(good, tmp_path, *REFUSED[case])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("m.gguf", r"neither .*: convert the GGUF file with convert/from_gguf.py --src .*m.gguf"),
        ("params.json", "neither .*: these are Meta's or Mistral's own files"),
        ("snapshots/abc/config.json", r"neither .*: did you mean .*snapshots/abc\?"),
    ],
)
def test_directories_of_another_kind(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=message):
        eabf_jax.load(tmp_path)


@pytest.mark.document_check
def test_the_page_names_tests_that_exist() -> None:
    root = Path(__file__).parents[2]
    told = set(re.findall(r"`(test_\w+)`", (root / "docs/model_directories.md").read_text(encoding="utf-8")))
    code = "".join(path.read_text(encoding="utf-8") for path in (root / "tests/interop").glob("test_*.py"))
    assert told and told <= set(re.findall(r"^def (test_\w+)", code, re.MULTILINE))


def test_gguf_beside_a_short_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "m.gguf").write_text("")
    with pytest.raises(InputError, match=r"'vocab_size' is missing; .*convert/from_gguf.py --src .*m.gguf"):
        eabf_jax.load(tmp_path)


def test_a_file_in_place_of_its_directory(good: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("")
    for read in (eabf_jax.load, lambda path: from_hf(path, tmp_path / "out")):
        with pytest.raises(InputError, match=r"m.gguf: .*: a file; convert it with convert/from_gguf.py"):
            read(tmp_path / "m.gguf")
        with pytest.raises(InputError, match=r"safetensors: .*: a file; name .*/hf"):
            read(shard(good))


def test_pointers_in_place_of_other_files(tmp_path: Path) -> None:
    for name, read in (
        ("tokenizer.json", load_tokenizer),
        ("tokenizer.model", load_tokenizer),
        ("m.gguf", lambda directory: from_gguf(directory / "m.gguf", tmp_path / "out")),
    ):
        directory = tmp_path / name.replace(".", "_")
        directory.mkdir()
        (directory / name).write_text(POINTER)
        with pytest.raises(InputError, match="only Git LFS's pointer"):
            read(directory)


def test_more_rows_than_tokens(tmp_path: Path) -> None:
    """Embeddings are often padded to a multiple of 64 rows."""
    directory = with_tokens(make(tmp_path / "hf"), 2)
    loaded, tokenizer = eabf_jax.load(directory, dtype="float32")
    assert tokenizer is not None and tokenizer.vocab_size == 2 and loaded.config.vocab_size == 131
    from_hf(directory, tmp_path / "native", pad_embeddings=True)  # nothing to do
    assert load_parameters(tmp_path / "native")[0].vocab_size == 131


def with_tokens(directory: Path, number: int) -> Path:
    """Writes a tokenizer whose last token is [PAD], as a fine-tune adds it."""
    vocabulary = {**{f"t{i}": i for i in range(number - 1)}, "[PAD]": number - 1}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return directory


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_more_tokens_than_rows(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    """The appended rows are the mean of the others, compared in float64; the result loads in transformers."""
    directory = with_tokens(make(tmp_path / "hf", dtype, tie_word_embeddings=tied), 133)
    for refused in (eabf_jax.load, lambda source: from_hf(source, tmp_path / "native")):
        with pytest.raises(InputError, match=r"133 tokens, the embedding 131 rows; .*from_hf.py --pad-embeddings app"):
            refused(directory)
    from_hf(directory, tmp_path / "native", pad_embeddings=True)
    model, tokenizer = eabf_jax.load(tmp_path / "native")
    assert tokenizer is not None and tokenizer.vocab_size == model.config.vocab_size == 133
    to_hf(tmp_path / "native", tmp_path / "again")
    before, after = tensors(directory), tensors(tmp_path / "again")
    assert before.keys() == after.keys() and ("lm_head.weight" in after) != tied
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)], value) and after[name].dtype == dtype, name
        if len(value) == 131:
            assert after[name].shape == (133, 32)
            mean = value.double().mean(0).to(dtype).expand(2, -1)
            torch.testing.assert_close(after[name][131:], mean, rtol=torch.finfo(dtype).eps, atol=0)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").config.vocab_size == 133
