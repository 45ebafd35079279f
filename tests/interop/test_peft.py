"""PEFT's LoRA directories, as PEFT 0.21 saves them, compared with its formula W + B A · scale in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_directories import make, tensors
from safetensors.torch import load_file, save_file

import eabf_jax
from eabf_jax.errors import InputError
from eabf_jax.interop.huggingface import from_hf, to_hf
from eabf_jax.interop.loading import read_config

LAYERS = range(3)
ATTENTION, MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
# As PEFT writes it; a case changes some of the options.
OPTIONS: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None, "bias": "none",
    "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layer_replication": None,
    "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False,
    "lora_dropout": 0.05, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4, "rank_pattern": {},
    "revision": None, "target_modules": ["q_proj", "down_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def every(*modules: str, layers: Any = LAYERS) -> list[str]:
    return [module.format(layer) for module in modules for layer in layers]


Q, O_PROJ, DOWN = f"{ATTENTION}q_proj", f"{ATTENTION}o_proj", f"{MLP}down_proj"
# For each case: the options, the scale and rank of each adapted module, and the weights that are saved whole.
CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[float, int]], list[str]]] = {
    "plain": ({}, dict.fromkeys(every(Q, DOWN), (2.0, 4)), []),
    "rank-stabilised": ({"use_rslora": True}, dict.fromkeys(every(Q, DOWN), (4.0, 4)), []),
    "ranks and alphas of their own": (
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3.0}},
        dict.fromkeys(every(Q), (2.0, 4)) | {Q.format(1): (4.0, 2)} | dict.fromkeys(every(DOWN), (0.75, 4)),
        [],
    ),
    "some layers": ({"layers_to_transform": [0, 2]}, dict.fromkeys(every(Q, DOWN, layers=(0, 2)), (2.0, 4)), []),
    "a pattern of modules": (
        {"target_modules": r".*\.[01]\..*(q|o)_proj", "exclude_modules": ["layers.1.self_attn.o_proj"]},
        dict.fromkeys([*every(Q, layers=(0, 1)), O_PROJ.format(0)], (2.0, 4)),
        [],
    ),
    "embedding and output saved": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        dict.fromkeys(every(Q, DOWN), (2.0, 4)),
        ["model.embed_tokens", "lm_head"],
    ),
    "norms saved": (
        {"modules_to_save": ["input_layernorm"]},
        dict.fromkeys(every(Q, DOWN), (2.0, 4)),
        every("model.layers.{}.input_layernorm"),
    ),
    "embedding and output adapted": (
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"model.embed_tokens": (2.0, 4), "lm_head": (2.0, 4)},
        [],
    ),
}


def adapt(
    base: Path,
    directory: Path,
    options: dict[str, Any] = {},  # noqa: B006
    adapted: dict[str, tuple[float, int]] = CASES["plain"][1],
    saved: list[str] = [],  # noqa: B006
    rows: int = 131,
) -> dict[str, np.ndarray]:
    """Writes random adapters of a base model; returns the merged weights by name, in float64."""
    torch.manual_seed(1)
    expected = {name: value.double().numpy() for name, value in tensors(base).items()}
    values: dict[str, torch.Tensor] = {}
    for module in saved:
        wide, *rest = expected[f"{module}.weight"].shape
        value = torch.randn(rows if wide == 131 else wide, *rest)
        values[f"{module}.weight"], expected[f"{module}.weight"] = value, value.double().numpy()
    for module, (scale, rank) in adapted.items():
        before = expected[f"{module}.weight"]
        # An embedding [rows, width] is read by row, so PEFT takes rows for its input.
        wide_out, wide_in = before.shape[::-1] if "embed" in module else before.shape
        first, second = torch.randn(rank, wide_in), torch.randn(wide_out, rank)
        names = ("lora_embedding_A", "lora_embedding_B") if "embed" in module else ("lora_A.weight", "lora_B.weight")
        values |= {f"{module}.{names[0]}": first, f"{module}.{names[1]}": second}
        product = scale * (second.double() @ first.double()).numpy()
        expected[f"{module}.weight"] = before + (product.T if "embed" in module else product)
    directory.mkdir(parents=True)
    save_file({f"base_model.model.{name}": v for name, v in values.items()}, directory / "adapter_model.safetensors")
    described = OPTIONS | {"base_model_name_or_path": str(base)} | options
    (directory / "adapter_config.json").write_text(json.dumps(described))
    return expected


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make(tmp_path_factory.mktemp("base") / "hf", torch.bfloat16)
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return directory


@pytest.mark.parametrize("case", CASES)
def test_adapters_are_merged_as_peft_merges_them(base: Path, tmp_path: Path, case: str) -> None:
    expected = adapt(base, tmp_path / "peft", *CASES[case])
    from_hf(tmp_path / "peft", tmp_path / "native")
    to_hf(tmp_path / "native", tmp_path / "hf")
    found, before = tensors(tmp_path / "hf"), tensors(base)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        # The error of rounding sums of numbers of order ten to float32.
        np.testing.assert_allclose(value.double().numpy(), expected[name], rtol=0, atol=1e-5, err_msg=name)
        if np.array_equal(before[name].double().numpy(), expected[name]) and "layers" not in name:
            assert value.dtype == torch.bfloat16, name
    assert eabf_jax.load(tmp_path / "native")[1] is not None  # the base's tokenizer


def test_a_resized_embedding_sets_the_vocabulary(base: Path, tmp_path: Path) -> None:
    expected = adapt(base, tmp_path / "peft", saved=["model.embed_tokens", "lm_head"], rows=133)
    model, tokenizer = eabf_jax.load(tmp_path / "peft", dtype="float32")
    assert model.config.vocab_size == 133 == read_config(tmp_path / "peft").vocab_size and tokenizer is not None
    kernel = np.asarray(model.parameters()["lm_head"]["kernel"])
    np.testing.assert_array_equal(kernel.T, expected["lm_head.weight"])


def test_a_tied_base_with_new_rows(tmp_path: Path) -> None:
    tied = make(tmp_path / "hf", tie_word_embeddings=True)
    expected = adapt(tied, tmp_path / "peft", saved=["model.embed_tokens"], rows=133)
    path = tmp_path / "peft" / "adapter_model.safetensors"
    values = load_file(path)
    with pytest.raises(InputError, match="are one weight in the base model; expected both or neither, and equal"):
        eabf_jax.load(tmp_path / "peft")
    values["base_model.model.lm_head.weight"] = values["base_model.model.model.embed_tokens.weight"].clone()
    save_file(values, path)  # as PEFT saves it when only the number of rows has changed
    model, _ = eabf_jax.load(tmp_path / "peft", dtype="float32")
    embedding = np.asarray(model.parameters()["embed_tokens"]["embedding"])
    np.testing.assert_array_equal(embedding, expected["model.embed_tokens.weight"])


def test_the_base_may_be_native_and_elsewhere(base: Path, tmp_path: Path) -> None:
    adapt(base, tmp_path / "peft", {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"})
    message = (
        r"not in meta-llama/Llama-2-7b-hf: name its directory with convert/from_hf.py --base DIR or load\(…, base=DIR"
    )
    for read in (eabf_jax.load, lambda directory: from_hf(directory, tmp_path / "out")):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "peft")
    from_hf(base, tmp_path / "native")
    found, expected = (eabf_jax.load(tmp_path / "peft", base=at)[0].parameters() for at in (tmp_path / "native", base))
    kernel = "layers", "self_attn", "q_proj", "kernel"
    for key in kernel:
        found, expected = found[key], expected[key]
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
    (tmp_path / "peft" / "tokenizer.json").write_text((base / "tokenizer.json").read_text().replace('"b"', '"c"'))
    tokenizer = eabf_jax.load(tmp_path / "peft", base=base)[1]
    assert tokenizer is not None and tokenizer.token_id("c") == 1  # its own comes before the base's


def options(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        values = load_file(directory / "adapter_model.safetensors")
        change(values)
        save_file(values, directory / "adapter_model.safetensors")

    return edit


def pickled(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "another type": (options(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'; merge it with PEFT's merge_and"),
    "DoRA": (options(use_dora=True), "use_dora is True, expected it off"),
    "biases": (options(bias="all"), "bias is 'all', expected 'none'"),
    "transposed": (options(fan_in_fan_out=True), "fan_in_fan_out is True, expected it off"),
    "a base of its own": (options(init_lora_weights="pissa"), "init_lora_weights is 'pissa', expected True"),
    "an option of later releases": (options(new_thing={"a": 1}), "new_thing is {'a': 1}, expected it off"),
    "single tokens": (options(trainable_token_indices=[1]), r"trainable_token_indices is \[1\], expected it off"),
    "rank of a wrong type": (options(r="four"), "key 'r' is 'four'; an integer is needed"),
    "a pattern's rank": (options(rank_pattern={"q_proj": "x"}), "'rank_pattern.q_proj' is 'x'; an integer is needed"),
    "no expression": (options(target_modules="("), r"target_modules has '\(', which is no regular expression"),
    "another rank": (options(r=3), r"q_proj.lora_A.weight has shape \[4, 32\], expected \[3, 32\]"),
    "no rank": (options(r=0), "the rank of .*q_proj is 0; expected a positive number"),
    "a target less": (options(target_modules=["q_proj"]), "does not name model.layers.0.mlp.down_proj, but"),
    "a target more": (options(target_modules=["q_proj", "k_proj", "down_proj"]), r"k_proj.lora_A.weight is missing"),
    "a missing layer": (weights(lambda v: v.pop(NAME)), r"layers.1.self_attn.q_proj.lora_A.weight is missing; exp"),
    "an unknown tensor": (
        weights(lambda v: v.update({"base_model.model.score.weight": torch.ones(2)})),
        r"tensor score.weight fits no weight of the base model \(1 such\)",
    ),
    "some norms": (
        weights(lambda v: v.update({"base_model.model.model.layers.0.input_layernorm.weight": torch.ones(32)})),
        r"model.layers.1.input_layernorm.weight is missing",
    ),
    "new rows of the embedding alone": (
        weights(lambda v: v.update({"base_model.model.model.embed_tokens.weight": torch.ones(133, 32)})),
        r"the embedding has 133 rows, but the output layer is the base model's, which has 131; expected tensor lm_head",
    ),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
    "pickled weights": (pickled, "load them with PEFT and save them again as adapter_model.safetensors"),
    "no type": (options(peft_type=None), "peft_type is None, expected 'LORA'"),
    "no base": (options(base_model_name_or_path=None), "is not in a directory that they name: name its directory"),
    "itself as its base": (lambda d: options(base_model_name_or_path=str(d))(d), "name its directory with"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_supported_is_refused_in_one_line(base: Path, tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    adapt(base, tmp_path / "peft")
    change(tmp_path / "peft")
    with pytest.raises(InputError, match=message) as caught:
        from_hf(tmp_path / "peft", tmp_path / "native")
    assert "\n" not in str(caught.value) and not (tmp_path / "native").exists()


def test_a_whole_model_takes_no_base(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a whole model and takes no base"):
        from_hf(base, tmp_path / "x", base=base)
