import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from eabf_jax.errors import InputError
from eabf_jax.interop.huggingface import to_hf
from eabf_jax.interop.native import save_params, write_model_json
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama
from eabf_jax.rope import scheme

SHAPE = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 16_384,
}
RUN = {
    "model": {"path": "models/chat"},
    "data": {"directory": "data/long", "split": "train"},
    "recipe": {
        "batch_size": 32,
        "beta1": 0.9,
        "beta2": 0.95,
        "weight_decay": 0.1,
        "learning_rate": 2e-5,
        "schedule": "cosine",
    },
    "lora": None,
}


@pytest.fixture
def extended(tmp_path):
    """A native directory of a model with entropy-aware ABF, its parameters at step 6."""
    rope = scheme("eabf", base=500_000.0, pretrained_window=4096, unscaled_layers=2)
    config = dataclasses.replace(LlamaConfig.from_fields(SHAPE), rope=rope)
    directory = tmp_path / "chat_16k"
    directory.mkdir()
    write_model_json(directory, config)
    save_params(directory, jax.tree.map(np.asarray, Llama(config, rngs=nnx.Rngs(0)).parameters()), step=6)
    return directory


def card_of(directory, tmp_path):
    to_hf(directory, tmp_path / "exported", overwrite=True)
    text = (tmp_path / "exported" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_runs_files_are_told(extended, tmp_path):
    (extended / "config.yaml").write_text(yaml.safe_dump(RUN))
    split = {"records": 100, "tokens": 1_234_567, "response_tokens": 765_432}
    (extended / "dataset.json").write_text(json.dumps({"splits": {"train": split}}))
    steps = [{"step": step, "loss": 3 - step / 4} for step in (5, 6, 7)]
    (extended / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 8, "lo')
    (extended / "evaluation").mkdir()
    table = {"title": "passkey, 10 prompts", "header": ["model", "base|x\n16,384"], "rows": [["chat_16k", "98.0%"]]}
    (extended / "evaluation" / "passkey.json").write_text(json.dumps({"table": table}))
    front, body = card_of(extended, tmp_path)
    assert front["library_name"] == "transformers" and "custom_code" in front["tags"]
    assert "| context window | 16,384 tokens |" in body
    assert "| rotary scheme | eabf: base 500,000, pretrained_window 4,096, unscaled_layers 2 |" in body
    # embedding and output 2 x 16 x 8, attention 4 x 8 x 8, MLP 3 x 8 x 12, three norms of 8
    assert "| parameters | 824 |" in body
    assert "| made from | models/chat |" in body
    assert "| data | data/long: 100 conversations, 1,234,567 tokens, loss on 765,432 |" in body
    adamw = "AdamW (0.9, 0.95), weight decay 0.1, peak learning rate 2e-05, cosine"
    assert f"| training | 6 optimizer steps, batch 32, {adamw} |" in body
    assert "| loss of the last step | 1.500 nats per token |" in body
    assert "trust_remote_code=True" in body
    assert "passkey, 10 prompts:\n\n| model | base\\|x 16,384 |\n| --- | --- |\n| chat_16k | 98.0% |" in body


def test_without_a_run_there_is_no_training_to_tell_of(extended, tmp_path):
    _, body = card_of(extended, tmp_path)
    assert "rotary scheme" in body
    assert "training" not in body and "Evaluation" not in body


def test_a_scheme_that_transformers_has_needs_no_code(extended, tmp_path):
    rope = scheme("yarn", factor=4.0, pretrained_window=4096)
    write_model_json(extended, dataclasses.replace(LlamaConfig.from_fields(SHAPE), rope=rope))
    front, body = card_of(extended, tmp_path)
    assert "custom_code" not in front["tags"]
    assert "trust_remote_code" not in body
    assert "| rotary scheme | yarn: " in body and "factor 4" in body


def test_adapters_are_told(extended, tmp_path):
    (extended / "config.yaml").write_text(yaml.safe_dump({**RUN, "lora": {"rank": 8}}))
    assert "cosine; adapters of rank 8, merged |" in card_of(extended, tmp_path)[1]


@pytest.mark.parametrize("text", ["[1]", "recipe: {}", "a: [", "model: 1"])
def test_a_damaged_configuration_is_one_line(extended, tmp_path, text):
    (extended / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml: not the configuration of a run"):
        card_of(extended, tmp_path)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("dataset.json", "{}"),
        ("dataset.json", '{"splits": {"train": {"records": 1}}}'),
        ("dataset.json", "{"),
        ("evaluation/passkey.json", '{"table": {"title": "passkey"}}'),
        ("evaluation/passkey.json", '{"table": 1}'),
    ],
)
def test_a_damaged_record_is_one_line(extended, tmp_path, file, text):
    (extended / "config.yaml").write_text(yaml.safe_dump(RUN))
    (extended / file).parent.mkdir(exist_ok=True)
    (extended / file).write_text(text)
    with pytest.raises(InputError, match=re.escape(file)):
        card_of(extended, tmp_path)
    assert not (tmp_path / "exported").exists()
