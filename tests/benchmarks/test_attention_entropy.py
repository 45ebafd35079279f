"""The report on a micro model."""

import json
import sys
from pathlib import Path

import pytest
import yaml

SHAPE = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 16,
}  # fmt: skip


def test_report(load_program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"type": "eabf", "base": 20_000, "pretrained_window": 16}
    settings = {"output": "unused", "window": 32, "rope": rope, "model": {"shape": SHAPE}}
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(settings))
    options = ["--config", str(tmp_path / "micro.yaml"), "--repeats", "2", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["attention_entropy.py", *options])
    load_program("attention_entropy").main()
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["tokens"], report["layers_heads"], len(report["seconds"])) == (32, [3, 2], 2)
    # Later passes do not compile.
    assert 0 < max(report["seconds"]) < report["first_pass_seconds"]
