"""Hugging Face directories: compared with transformers and safetensors bit for bit, and every kind of bad input."""

import codecs
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from hf_directories import SIZES, assert_refused, assert_same_bits, edit_tensors, make, shard, tensors
from safetensors.torch import save_file

from eabf_jax.errors import InputError
from eabf_jax.interop import native
from eabf_jax.interop.huggingface import config_from_hf, config_to_hf, from_hf, to_hf
from eabf_jax.interop.loading import load_parameters
from eabf_jax.model.parameters import parameters
from eabf_jax.rope import scheme


@pytest.mark.parametrize(
    ("dtype", "shard", "settings"),
    [
        (torch.float32, "5GB", {}),
        (torch.bfloat16, "20KB", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
        (torch.float16, "20KB", {"tie_word_embeddings": True, "eos_token_id": [2, 7]}),
        (torch.float64, "5GB", {"num_key_value_heads": 4}),
        (torch.float8_e4m3fn, "20KB", {}),
    ],
)
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype, shard: str, settings: dict[str, object]) -> None:
    source = make(tmp_path / "source", dtype, shard, **settings)
    done = from_hf(source, tmp_path / "native")
    again = to_hf(tmp_path / "native", tmp_path / "again", max_shard_bytes=25_000)
    before = tensors(source)
    assert_same_bits(before, tensors(tmp_path / "again"))
    assert done == again == (len(before), sum(value.nbytes for value in before.values()))
    expected = config_from_hf(json.loads((source / "config.json").read_text()))
    assert native.read_model_json(tmp_path / "native") == expected
    assert config_from_hf(json.loads((tmp_path / "again" / "config.json").read_text())) == expected
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(before) and len(set(index["weight_map"].values())) > 1
    if dtype.itemsize > 1:
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype).state_dict()
        assert_same_bits(before, {name: theirs[name] for name in before})


def test_steps_and_dtype_of_export(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    from_hf(source, tmp_path / "run")
    config, params = load_parameters(tmp_path / "run")
    native.save_params(tmp_path / "run", jax.tree.map(lambda x: x + 1, params), step=6)
    to_hf(tmp_path / "run", tmp_path / "last", dtype="bfloat16")
    to_hf(tmp_path / "run", tmp_path / "first", step=0)
    before = tensors(source)
    assert_same_bits(before, tensors(tmp_path / "first"))
    assert_same_bits({name: (value + 1).bfloat16() for name, value in before.items()}, tensors(tmp_path / "last"))
    assert json.loads((tmp_path / "last" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(InputError, match="no checkpoint of step 3; it has 0, 6"):
        to_hf(tmp_path / "run", tmp_path / "other", step=3)
    assert config.vocab_size == 131


def test_old_buffers_and_tied_copies_are_left_out(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", tie_word_embeddings=True)
    values = tensors(source)
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    save_file(values, source / "model.safetensors")
    from_hf(source, tmp_path / "native")
    to_hf(tmp_path / "native", tmp_path / "again")
    expected = {name: value for name, value in values.items() if "inv_freq" not in name and "lm_head" not in name}
    assert_same_bits(expected, tensors(tmp_path / "again"))
    values["lm_head.weight"][0, 0] += 1
    save_file(values, source / "model.safetensors")
    with pytest.raises(InputError, match=r"lm_head.weight differs from the embedding"):
        from_hf(source, tmp_path / "native", overwrite=True)


def test_layers_of_different_dtypes_become_the_wider(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", torch.bfloat16)
    values = tensors(source)
    name = "model.layers.1.input_layernorm.weight"
    values[name] = torch.full((32,), 1.0001)
    save_file(values, source / "model.safetensors")
    _, params = load_parameters(source)
    np.testing.assert_array_equal(np.asarray(params["layers"]["input_layernorm"]["scale"][1]), values[name].numpy())


def test_shards_of_a_hub_cache_are_read(tmp_path: Path) -> None:
    """In the Hub's cache, every file is a link into a folder of blobs."""
    made = make(tmp_path / "made", shard="20KB")
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(made.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    from_hf(snapshot, tmp_path / "native")
    to_hf(tmp_path / "native", tmp_path / "again")
    assert_same_bits(tensors(made), tensors(tmp_path / "again"))


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        values = json.loads(path.read_text())
        for name, value in changes.items():
            values.pop(name, None)
            if value != "absent":
                values[name] = value
        path.write_text(json.dumps(values))

    return edit


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def pickled(name: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        for path in directory.glob("model*"):
            path.unlink()
        (directory / name).write_bytes(b"")

    return edit


def no_weights(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()


def link_out(directory: Path) -> None:
    outside = directory.parent / "outside.safetensors"
    shard(directory).rename(outside)
    (directory / sorted(set(names(directory)))[1]).symlink_to(outside)


def names(directory: Path) -> list[str]:
    return list(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].values())


def large_vocabulary(directory: Path) -> None:
    alphabet = {chr(ord("a") + i // 26) + chr(ord("a") + i % 26): i for i in range(132)}
    model = {"type": "WordLevel", "vocab": alphabet, "unk_token": "aa"}
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


BAD = {
    "other architecture": (edit_config(model_type="mixtral"), r"model_type is 'mixtral', which has mixture of experts"),
    "no architecture": (edit_config(model_type="absent"), r"model_type is None, expected one of llama"),
    "other activation": (edit_config(hidden_act="gelu"), r"hidden_act is 'gelu', expected 'silu'"),
    "missing key": (
        edit_config(hidden_size="absent"),
        "config.json: key 'hidden_size' is missing; an integer is needed",
    ),
    "ill-typed key": (
        edit_config(num_hidden_layers="3"),
        "config.json: key 'num_hidden_layers' is '3'; an integer is needed",
    ),
    "quantised": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantization_config is \{'quant_method': 'gptq', 'bits': 4\}, expected null: .*use the model that was",
    ),
    "quantised by MLX": (edit_config(quantization={"bits": 4}), r"quantization is \{'bits': 4\}, expected null"),
    "acausal": (edit_config(is_causal=False), r"is_causal is False, expected true"),
    "sliding window": (edit_config(sliding_window=4096), r"sliding_window is 4096, expected null"),
    "layers of two kinds": (
        edit_config(layer_types=["full_attention", "sliding_attention", "full_attention"]),
        r"layer_types is \[.*\], expected 'full_attention' in every layer",
    ),
    "layers of their own": (edit_config(per_layer_config={"1": {}}), r"per_layer_config is .*, expected null"),
    "other weights": (edit_config(transformers_weights="x.safetensors"), r"transformers_weights is 'x.safetensors'"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), r"config.json: not valid JSON"),
    "config not an object": (lambda d: (d / "config.json").write_text("[]"), r"found a JSON list, expected an object"),
    "missing tensor": (
        edit_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        r"tensor model.layers.1.mlp.up_proj.weight is missing; expected shape \[48, 32\]",
    ),
    "mis-shaped tensor": (
        edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        r"model.safetensors: tensor model.norm.weight has shape \[31\], expected \[32\]",
    ),
    "extra tensor": (
        edit_tensors(lambda t: t.update({"model.extra": torch.ones(1)})),
        r"tensor model.extra is not part of this model \(1 such\)",
    ),
    "fewer layers in config": (edit_config(num_hidden_layers=2), r"tensor model.layers.2\S+ is not part of this model"),
    "index leads up": (
        edit_index(lambda m: m.update({"model.norm.weight": "../x.safetensors"})),
        r"names the file '../x.safetensors', which is outside its directory",
    ),
    "index leads to parent": (edit_index(lambda m: m.update({"model.norm.weight": ".."})), r"names the file '..'"),
    "index is absolute": (
        edit_index(lambda m: m.update({"model.norm.weight": "/etc/passwd"})),
        r"names the file '/etc/passwd', which is outside",
    ),
    "link leads out": (link_out, r"which is outside its directory"),
    "index has too much": (
        edit_index(lambda m: m.update({"model.more": m["model.norm.weight"]})),
        r"tensor model.more is missing; model.safetensors.index.json has it in this shard: copy the shard",
    ),
    "index is no map": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        r"expected a weight_map",
    ),
    "pickled": (pickled("pytorch_model.bin"), r"pickled weights \(pytorch_model.bin\).*python -c .*save_pretrained"),
    "pickled .pt": (pickled("model.pt"), r"pickled weights \(model.pt\)"),
    "no weights": (no_weights, r"no weights; expected model.safetensors"),
    "vocabulary too large": (large_vocabulary, r"the tokenizer has 132 tokens, the embedding 131 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(good: Path, tmp_path: Path, case: str) -> None:
    assert_refused(good, tmp_path, *BAD[case])


def test_config_spells_what_transformers_cannot_say() -> None:
    values = {**SIZES, "model_type": "llama", "rope_theta": 1e4}
    config = config_from_hf(values)
    assert config.num_key_value_heads == 2 and config.head_dim == 8 and config.rms_norm_eps == 1e-6
    assert config_from_hf({k: v for k, v in values.items() if k != "num_key_value_heads"}).num_key_value_heads == 4
    eabf = scheme("eabf", base=5e5, pretrained_window=64)
    written = config_to_hf(dataclasses.replace(config, rope=eabf), "bfloat16")
    assert written["model_type"] == "eabf_llama" and written["torch_dtype"] == "bfloat16"
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config_from_hf(written).rope == eabf
    assert "auto_map" not in config_to_hf(config)


MEMORY = """
import re, sys
from pathlib import Path
from eabf_jax.interop.huggingface import from_hf
from_hf(sys.argv[1], sys.argv[2])
# Not getrusage, whose maximum a child takes over from the process that started it.
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def test_memory_stays_within_the_model_and_two_gib(tmp_path: Path) -> None:
    """Converts a 0.6 GiB model in 27 shards; any model may take its size plus 2 GiB."""
    layers, hidden = 12, 2048
    sizes = {**SIZES, "hidden_size": hidden, "intermediate_size": 4096, "num_hidden_layers": layers}
    config = config_from_hf({**sizes, "head_dim": 128, "model_type": "llama"})
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config_to_hf(config, "bfloat16")))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    block = torch.randn(2**24).to(torch.bfloat16)
    for entry in parameters(config):
        for name in entry.hf_names():
            found = re.search(r"layers\.(\d+)", name)
            value = block[: int(np.prod(entry.hf_shape))].reshape(entry.hf_shape).clone()
            shards.setdefault(f"model-{found[1] if found else 'x'}-{name[-12:-8]}.safetensors", {})[name] = value
    for file, values in shards.items():
        save_file(values, source / file)
    weight_map = {name: file for file, values in shards.items() for name in values}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    size = sum(value.nbytes for values in shards.values() for value in values.values())
    assert size > 0.5 * 2**30 and len(shards) > 20
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "native")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    print(f"peak {peak / 2**30:.2f} GiB for a model of {size / 2**30:.2f} GiB")
    # Tighter than promised, so that the test detects a model held twice even at this size.
    assert peak < size + 1.0 * 2**30, f"{peak / 2**30:.2f} GiB for a model of {size / 2**30:.2f} GiB"


@pytest.mark.parametrize(("length", "expected"), [(16, 64), (64, 64), (10**30, 10**30), (None, None)])
def test_the_tokenizer_of_an_extended_model_truncates_at_its_window(
    good: Path, tmp_path: Path, length: int | None, expected: int | None
) -> None:
    from_hf(good, tmp_path / "native")
    config = native.read_model_json(tmp_path / "native")
    native.write_model_json(tmp_path / "native", dataclasses.replace(config, max_position_embeddings=64))
    settings = {"add_bos_token": True} if length is None else {"add_bos_token": True, "model_max_length": length}
    (tmp_path / "native" / "tokenizer_config.json").write_text(json.dumps(settings))
    to_hf(tmp_path / "native", tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written == {**settings, **({} if expected is None else {"model_max_length": expected})}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rms_norm_eps", "abc", "'rms_norm_eps' is 'abc'; a finite number"),
        ("rms_norm_eps", -1.0, "rms_norm_eps -1.0 is negative"),
        ("num_attention_heads", 0, "num_attention_heads 0 is not a positive number"),
        ("eos_token_id", [2, True], r"'eos_token_id' is \[2, True\]; an integer or a list of integers or null"),
        ("max_position_embeddings", None, "'max_position_embeddings' is None; an integer"),
        ("max_position_embeddings", 64.5, "'max_position_embeddings' is 64.5; an integer"),
        ("rms_norm_eps", float("inf"), "'rms_norm_eps' is inf; a finite number"),
        ("rope_theta", float("nan"), "'base' is nan; a finite number"),
    ],
)
def test_config_of_a_wrong_type(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_from_hf({"model_type": "llama", **SIZES, name: value})


@pytest.mark.parametrize(
    "name", ["num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias", "mlp_bias"]
)
def test_null_is_the_default_where_transformers_has_had_it_so(name: str) -> None:
    values = {"model_type": "llama", **SIZES}
    values.pop(name, None)
    assert config_from_hf({**values, name: None}) == config_from_hf(values)


def test_keys_of_other_architectures_are_ignored_as_transformers_ignores_them() -> None:
    others = {
        "attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0, "attention_multiplier": 3.0,
        "residual_multiplier": 3.0, "embedding_multiplier": 3.0, "logits_scaling": 3.0, "no_rope_layers": [0, 0, 0],
        "rope_interleaved": True, "use_qk_norm": True, "clip_qkv": 0.1, "hidden_activation": "gelu",
        "pretraining_tp": 2, "attention_dropout": 0.5,
    }  # fmt: skip
    logits = []
    for more in ({}, others):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more)).eval()
        logits.append(model(torch.arange(20)[None]).logits)
    assert torch.equal(*logits)
    values = {"model_type": "llama", **SIZES}
    assert config_from_hf({**values, **others}) == config_from_hf(values)


def test_numbers_with_a_point_and_a_byte_order_mark(good: Path, tmp_path: Path) -> None:
    directory = tmp_path / "marked"
    shutil.copytree(good, directory)
    edit_config(max_position_embeddings=64.0, head_dim=8.0)(directory)
    for path in directory.glob("*.json"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    config, params = load_parameters(directory)
    expected, plain = load_parameters(good)
    assert config == expected and type(config.max_position_embeddings) is int
    jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_kinds_of_directories_are_not_mixed_up(good: Path, tmp_path: Path) -> None:
    from_hf(good, tmp_path / "native")
    with pytest.raises(InputError, match="a native model directory; expected a Hugging Face one"):
        from_hf(tmp_path / "native", tmp_path / "x")
    with pytest.raises(InputError, match="expected a native model directory"):
        to_hf(good, tmp_path / "x")
