import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from eabf_jax.errors import InputError
from eabf_jax.interop.huggingface import from_hf, read_config, to_hf
from eabf_jax.interop.native import save_params, write_model_json
from eabf_jax.interop.tokenizer import copy_tokenizer_files
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
    "window": 16_384,
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


def any_parameters(config):
    return jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), Llama.abstract(config).parameters())


@pytest.fixture
def extended(tmp_path):
    """A native directory of a model with entropy-aware ABF and a checkpoint of step 6."""
    rope = scheme("eabf", base=500_000.0, pretrained_window=4096, unscaled_layers=2)
    config = dataclasses.replace(LlamaConfig.from_fields(SHAPE), rope=rope)
    directory = tmp_path / "chat_16k"
    directory.mkdir()
    write_model_json(directory, config)
    save_params(directory, any_parameters(config), step=6)
    return directory


def card_of(directory, tmp_path):
    to_hf(directory, tmp_path / "chat_16k_hf", overwrite=True)
    text = (tmp_path / "chat_16k_hf" / "README.md").read_text()
    assert str(tmp_path) not in text
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_runs_files_are_told(extended, tmp_path):
    (extended / "config.yaml").write_text(yaml.safe_dump(RUN))
    split = {"records": 100, "tokens": 1_234_567, "response_tokens": 765_432}
    sources = [f"part_{number}.json" for number in range(5)]
    dataset = {"splits": {"train": split}, "sources": sources, "language": "en"}
    (extended / "dataset.json").write_text(json.dumps(dataset))
    steps = [{"step": step, "loss": 3 - step / 4, "trained_tokens": 1000 + step} for step in range(1, 8)]
    (extended / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 8, "lo')
    (extended / "evaluation").mkdir()
    table = {"title": "passkey, 10 prompts", "header": ["model", "base|x\n16,384"], "rows": [["chat_16k", "98.0%"]]}
    (extended / "evaluation" / "passkey.json").write_text(json.dumps({"table": table}))
    front, body = card_of(extended, tmp_path)
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["long-context", "llama", "eabf", "custom_code"],
        "language": "en",
    }
    assert body.startswith("\n# chat_16k_hf\n")
    assert "| context window | 16,384 tokens |" in body
    assert "| rotary scheme | eabf: base 500,000, pretrained_window 4,096, unscaled_layers 2 |" in body
    # embedding and output 2 x 16 x 8, attention 4 x 8 x 8, MLP 3 x 8 x 12, three norms of 8
    assert "| parameters | 824 |" in body
    assert "| made from | chat |" in body
    sources = "part_0.json, part_1.json, part_2.json and 2 others"
    assert f"| data | long: 100 records of 1,234,567 tokens in all, from {sources} |" in body
    # 6 steps of 32 rows; 1,001 + ... + 1,006 tokens
    assert "| trained on | 192 rows of at most 16,384 tokens, with the loss on 6,021 tokens |" in body
    adamw = "AdamW (0.9, 0.95), weight decay 0.1, peak learning rate 2e-05, cosine"
    assert f"| training | 6 optimizer steps, batch 32, {adamw} |" in body
    assert "| loss of the last step | 1.500 nats per token |" in body
    assert 'directory = "chat_16k_hf"' in body
    assert "AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)" in body
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


def test_a_scheme_with_lists(extended, tmp_path):
    lists = {"short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    rope = scheme("longrope", factor=4.0, pretrained_window=4096, **lists)
    write_model_json(extended, dataclasses.replace(LlamaConfig.from_fields(SHAPE), rope=rope))
    _, body = card_of(extended, tmp_path)
    assert "factor 4, short_factor [1, 1.25, 1.5, 2], long_factor [1, 2, 4, 8], pretrained_window 4,096 |" in body


def test_one_of_a_kind_is_not_many(extended, tmp_path):
    run = {**RUN, "recipe": {**RUN["recipe"], "batch_size": 1}}
    (extended / "config.yaml").write_text(yaml.safe_dump(run))
    split = {"records": 1, "tokens": 900, "response_tokens": 1}
    (extended / "dataset.json").write_text(json.dumps({"splits": {"train": split}}))
    (extended / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "trained_tokens": 1}\n')
    (extended / "checkpoints" / "6").rename(extended / "checkpoints" / "1")
    _, body = card_of(extended, tmp_path)
    assert "| data | long: 1 record of 900 tokens in all |" in body
    assert "| trained on | 1 row of at most 16,384 tokens, with the loss on 1 token |" in body
    assert "| training | 1 optimizer step, batch 1," in body


def test_metrics_of_some_steps_do_not_tell_how_many_tokens_were_trained(extended, tmp_path):
    (extended / "config.yaml").write_text(yaml.safe_dump(RUN))
    (extended / "metrics.jsonl").write_text('{"step": 6, "loss": 2.0, "trained_tokens": 7}\n')
    assert "| trained on | 192 rows of at most 16,384 tokens |" in card_of(extended, tmp_path)[1]


CARD = "---\nlicense: llama2\nlanguage: [en, de]\ndatasets: [a/b]\nbase_model: x/base\ntags: [chat]\n---\n# A model\n"


@pytest.mark.parametrize(
    ("place", "card", "expected"),
    [
        ("chat", CARD, {"license": "llama2", "language": ["en", "de"], "datasets": ["a/b"], "base_model": "x/base"}),
        ("models--org--chat-7b/snapshots/0a", "# No front matter\n", {"base_model": "org/chat-7b"}),
        (
            "models--org--chat-7b/snapshots/0a",
            "---\nlicense: mit\nbase_model: org/before\n---\n",
            {"license": "mit", "base_model": "org/chat-7b"},
        ),
        ("chat", "---\n[not: front matter\n---\n", {}),
        ("chat", "---\n- a list\n---\n", {}),
        ("chat", None, {}),
    ],
)
@pytest.mark.parametrize("converted", [False, True])
def test_only_what_the_base_says_of_itself_is_passed_on(extended, tmp_path, place, card, expected, converted):
    base = tmp_path / place
    name = "org/chat-7b" if "snapshots" in place and not converted else "native" if converted else "chat"
    to_hf(extended, base)
    (base / "README.md").unlink() if card is None else (base / "README.md").write_text(card)
    if converted:
        from_hf(base, tmp_path / "native")
        base = tmp_path / "native"
    (extended / "config.yaml").write_text(yaml.safe_dump({**RUN, "model": {"path": str(base)}}))
    front, body = card_of(extended, tmp_path)
    named = ("license", "language", "datasets", "base_model")
    assert {name: front[name] for name in named if name in front} == expected
    assert f"| made from | {name} |" in body
    # A conversion of the export also inherits the front matter.
    from_hf(tmp_path / "chat_16k_hf", tmp_path / "again")
    front, _ = card_of(tmp_path / "again", tmp_path)
    assert {name: front[name] for name in named if name in front} == expected


def test_the_snippet_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    tiny = Path(__file__).parents[2] / "assets" / "tiny"
    config = dataclasses.replace(
        LlamaConfig.from_fields({**SHAPE, "vocab_size": read_config(tiny).vocab_size}),
        rope=scheme("eabf", pretrained_window=4096),
    )
    directory = tmp_path / "native"
    directory.mkdir()
    write_model_json(directory, config)
    save_params(directory, any_parameters(config))
    copy_tokenizer_files(tiny, directory)
    _, body = card_of(directory, tmp_path)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    exec(code.replace("max_new_tokens=64", "max_new_tokens=2"), {})
    assert "The history of" in capsys.readouterr().out


def test_adapters_are_told(extended, tmp_path):
    (extended / "config.yaml").write_text(yaml.safe_dump({**RUN, "lora": {"rank": 8}}))
    assert "cosine; adapters of rank 8, merged |" in card_of(extended, tmp_path)[1]


@pytest.mark.parametrize("text", ["[1]", "recipe: {}", "a: [", "model: 1"])
def test_a_damaged_configuration_is_one_line(extended, tmp_path, text):
    (extended / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml: not (the configuration of a run|YAML)"):
        card_of(extended, tmp_path)
    assert not (tmp_path / "chat_16k_hf").exists()


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
    assert not (tmp_path / "chat_16k_hf").exists()
