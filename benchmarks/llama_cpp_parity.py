"""Compares logits, greedy text and tokens with llama.cpp's, for the files that convert/to_gguf.py writes, in float32.

make test-llama-cpp
python benchmarks/llama_cpp_parity.py --peer PYTHON --model assets/tiny --model DIR --json OUT.json

PYTHON is the interpreter of an environment with llama-cpp-python. Each model is converted under every scheme of
`schemes`. The tokens are those of this repository's pages, up to positions beyond the window.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from greedy_parity import PROMPTS
from provenance import ROOT, record

from eabf_jax import load
from eabf_jax.cli import run
from eabf_jax.errors import InputError
from eabf_jax.inference import Generator
from eabf_jax.interop.directory import write_json
from eabf_jax.interop.gguf_writer import to_gguf
from eabf_jax.interop.huggingface import read_config, write_config
from eabf_jax.interop.tokenizer import Tokenizer
from eabf_jax.model.llama import Llama, logits
from eabf_jax.rope import Scheme, scheme

PEER = Path(__file__).with_name("llama_cpp_peer.py")

# Largest difference of a logit, in standard deviations of all logits after the same token. Two float32 computations
# differ by their rounding; another scheme makes a difference of about one (`difference_to_default`).
LIMIT = 0.002


def schemes(window: int, base: float, factor: float) -> dict[str, Scheme]:
    """Returns the schemes to compare, for a model with this window and base."""
    common: dict[str, Any] = {"base": base, "factor": factor}
    return {
        "default": scheme("default", base=base),
        "pi": scheme("pi", **common),
        "yarn": scheme("yarn", **common, pretrained_window=window),
        "ntk_by_parts": scheme("ntk_by_parts", **common, pretrained_window=window),
        "yarn, another ramp": scheme("yarn", **common, pretrained_window=window, beta_fast=8.0, beta_slow=2.0),
        "abf": scheme("abf", base=10 * base),
        "llama3": scheme("llama3", **common, pretrained_window=window),
    }


def with_scheme(source: Path, directory: Path, rope: Scheme, window: int) -> Path:
    """Makes a Hugging Face directory that differs from the source only in its scheme and its window."""
    directory.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (directory / path.name).symlink_to(path.absolute())
    config = dataclasses.replace(read_config(source), rope=rope, max_position_embeddings=window)
    write_config(directory, config, "float32")
    return directory


def our_logits(model: Llama, tokens: list[int], positions: list[int]) -> np.ndarray:
    """Returns the logits after each of the positions, [positions, vocabulary]."""

    def some(model: Llama, tokens: Any, positions: Any) -> Any:
        return logits(model.hidden_states(tokens)[0, positions], model.output_kernel())

    return np.asarray(nnx.jit(some)(model, np.array([tokens]), np.array(positions)))


def run_peer(python: Path, job: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Runs llama_cpp_peer.py on a job and returns what it wrote."""
    (folder / "job.json").write_text(json.dumps(dict(job)), encoding="utf-8")
    subprocess.run([python, PEER, folder / "job.json", folder / "result.npz"], check=True)
    return dict(np.load(folder / "result.npz"))


def same(ours: list[int], theirs: list[int]) -> int:
    """Returns the number of equal tokens from the first on."""
    return next((i for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)) if mine != other), len(ours))


def measure(source: Path, python: Path, *, window: int, beyond: int, new_tokens: int) -> dict[str, Any]:
    """Compares one model under every scheme.

    Args:
      source: a Hugging Face directory.
      window: in tokens; a model with a larger one is treated as if it had been pretrained with this one.
      beyond: number of tokens after the window.
      new_tokens: length of the greedy texts.
    """
    config, tokenizer = read_config(source), Tokenizer(source)
    window = min(window, config.max_position_embeddings)
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    tokens: list[int] = []
    while len(tokens) < window + beyond:
        tokens += tokenizer.encode("\n".join(pages))
    tokens = tokens[: window + beyond]
    positions = sorted({15, window // 4, window // 2, window - 1, window, window + beyond // 2, window + beyond - 1})
    job: dict[str, Any] = {
        "tokens": tokens,
        "positions": positions,
        "prompts": [tokenizer.encode(prompt) for prompt in PROMPTS],
        "new_tokens": new_tokens,
        "texts": [line for page in pages for line in page.splitlines() if line and not line.startswith(" ")][::4],
        "threads": os.cpu_count(),
    }
    rows: dict[str, Any] = {}
    plain, texts, same_texts = None, [], 0
    factor = max(2.0, (window + beyond) / window)
    base = float(dict(config.rope.frequencies.parameters)["base"])
    for name, rope in schemes(window, base, factor).items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            directory = with_scheme(source, Path(folder) / "hf", rope, window + beyond)
            to_gguf(directory, Path(folder) / "m.gguf", dtype="float32")
            theirs = run_peer(python, {**job, "model": str(Path(folder) / "m.gguf")}, Path(folder))
            model, _ = load(directory, dtype="float32")
        ours = our_logits(model, tokens, positions)
        plain = ours if plain is None else plain
        completions = Generator(model, tokenizer).generate(job["prompts"], new_tokens, stop_tokens=())
        pairs = zip(completions, theirs["greedy"].tolist(), strict=True)
        spread = ours.std(axis=1)
        difference = np.abs(ours - theirs["logits"]).max(axis=1) / spread
        rows[name] = {
            "scheme": rope.to_dict(),
            "difference": [round(float(value), 7) for value in difference],
            "difference_to_default": [round(float(value), 3) for value in np.abs(ours - plain).max(axis=1) / spread],
            "same_choice": (ours.argmax(1) == theirs["logits"].argmax(1)).tolist(),
            "same_tokens": [same(found.tokens, row) for found, row in pairs],
        }
        if name == "default":  # the tokenizer is the same under every scheme
            texts, ids = job["texts"], json.loads(str(theirs["ids"]))
            same_texts = sum(tokenizer.encode(text) == row for text, row in zip(texts, ids, strict=True))
            job["texts"] = []
        print(
            f"{source.name} {name}: difference {difference.max():.2g}, greedy tokens {rows[name]['same_tokens']}, "
            f"{same_texts} of {len(texts)} lines tokenized alike, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return {
        "model": source.name,
        "window": window,
        "positions": positions,
        "new_tokens": new_tokens,
        "lines": len(texts),
        "same_lines": same_texts,
        "llama_cpp_python": str(theirs["version"]),
        "schemes": rows,
    }


def agrees(model: Mapping[str, Any]) -> bool:
    """Returns whether one model's figures are within the limits."""
    return model["same_lines"] == model["lines"] and all(
        max(row["difference"]) <= LIMIT and min(row["same_tokens"]) == model["new_tokens"]
        for row in model["schemes"].values()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", required=True, help="Hugging Face directory; repeatable")
    parser.add_argument("--peer", type=Path, required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--window", type=int, default=512, help="treat a larger window as this one, to save time")
    parser.add_argument("--beyond", type=int, default=256, help="tokens after the window")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if not arguments.peer.is_file():
        raise InputError(f"--peer {arguments.peer}: no such file; `make test-llama-cpp` creates its environment")
    models = [
        measure(
            model,
            arguments.peer,
            window=arguments.window,
            beyond=arguments.beyond,
            new_tokens=arguments.new_tokens,
        )
        for model in arguments.model
    ]
    equal = all(map(agrees, models))
    if arguments.json:
        write_json(arguments.json, {**record("llama_cpp_parity"), "limit": LIMIT, "equal": equal, "models": models})
    if not equal:
        sys.exit("the models differ")


if __name__ == "__main__":
    run(main)
