"""Compares logits, greedy text and tokens with llama.cpp's, for the files that convert/to_gguf.py writes, in float32.

make test-llama-cpp
python benchmarks/llama_cpp_parity.py --peer PYTHON --model assets/tiny --model DIR --json OUT.json

PYTHON is the interpreter of an environment with llama-cpp-python. Each model is converted under every scheme of
`schemes`. Random models of `family`, with the tokenizer of the first model, follow: at least one of each architecture.
The tokens are those of this repository's pages, up to positions beyond the window.
"""

import argparse
import dataclasses
import json
import os
import shutil
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
from eabf_jax.interop import native
from eabf_jax.interop.directory import write_json
from eabf_jax.interop.gguf_file import read_gguf
from eabf_jax.interop.gguf_writer import to_gguf
from eabf_jax.interop.huggingface import read_config, write_config
from eabf_jax.interop.tokenizer import Tokenizer, copy_tokenizer_files
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama, logits
from eabf_jax.model.parameters import nest, parameters
from eabf_jax.rope import Scheme, compose, scheme

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
        if path.suffix == ".safetensors":
            (directory / path.name).symlink_to(path.absolute())
        elif path.is_file() and path.name != "config.json":
            shutil.copy(path, directory)
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


def compare(
    directory: Path, model: Llama, tokenizer: Tokenizer, job: Mapping[str, Any], python: Path
) -> tuple[np.ndarray, Mapping[str, Any], dict[str, Any]]:
    """Compares one model with llama.cpp.

    Returns:
      Our logits, [positions, vocabulary]; what llama.cpp computed; and the figures.
    """
    with tempfile.TemporaryDirectory() as folder:
        to_gguf(directory, Path(folder) / "m.gguf", dtype="float32")
        architecture = read_gguf(Path(folder) / "m.gguf").metadata["general.architecture"]
        theirs = run_peer(python, {**job, "model": str(Path(folder) / "m.gguf")}, Path(folder))
    ours = our_logits(model, job["tokens"], job["positions"])
    # llama.cpp, too, chooses the list of LongRoPE by the length of its context.
    generator = Generator(model, tokenizer, rope_length=len(job["tokens"]))
    completions = generator.generate(job["prompts"], job["new_tokens"], stop_tokens=())
    pairs = zip(completions, theirs["greedy"].tolist(), strict=True)
    difference = np.abs(ours - theirs["logits"]).max(axis=1) / ours.std(axis=1)
    return (
        ours,
        theirs,
        {
            "architecture": architecture,
            "scheme": model.config.rope.to_dict(),
            "difference": [round(float(value), 7) for value in difference],
            "same_choice": (ours.argmax(1) == theirs["logits"].argmax(1)).tolist(),
            "same_tokens": [same(found.tokens, row) for found, row in pairs],
        },
    )


def job_of(tokenizer: Tokenizer, window: int, beyond: int, new_tokens: int) -> dict[str, Any]:
    """Returns what llama_cpp_peer.py has to compute, but for the model.

    Args:
      window: in tokens.
      beyond: number of tokens after the window.
      new_tokens: length of the greedy texts.
    """
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    tokens: list[int] = []
    while len(tokens) < window + beyond:
        tokens += tokenizer.encode("\n".join(pages))
    return {
        "tokens": tokens[: window + beyond],
        "positions": sorted(
            {15, window // 4, window // 2, window - 1, window, window + beyond // 2, window + beyond - 1}
        ),
        "prompts": [tokenizer.encode(prompt) for prompt in PROMPTS],
        "new_tokens": new_tokens,
        "texts": [line for page in pages for line in page.splitlines() if line and not line.startswith(" ")][::4],
        "threads": os.cpu_count(),
    }


def measure(source: Path, python: Path, *, window: int, beyond: int, new_tokens: int) -> dict[str, Any]:
    """Compares one model under every scheme.

    Args:
      source: a Hugging Face directory.
      window: in tokens; a model with a larger one is treated as if it had been pretrained with this one.
      beyond, new_tokens: as for `job_of`.
    """
    config, tokenizer = read_config(source), Tokenizer(source)
    window = min(window, config.max_position_embeddings)
    job = job_of(tokenizer, window, beyond, new_tokens)
    texts, rows = job["texts"], {}
    plain, same_texts = None, 0
    factor = max(2.0, (window + beyond) / window)
    base = float(dict(config.rope.frequencies.parameters)["base"])
    for name, rope in schemes(window, base, factor).items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            directory = with_scheme(source, Path(folder) / "hf", rope, window + beyond)
            model, _ = load(directory, dtype="float32")
            ours, theirs, row = compare(directory, model, tokenizer, job, python)
        plain = ours if plain is None else plain
        spread = ours.std(axis=1)
        row["difference_to_default"] = [round(float(value), 3) for value in np.abs(ours - plain).max(axis=1) / spread]
        rows[name] = row
        if name == "default":  # the tokenizer is the same under every scheme
            ids = json.loads(str(theirs["ids"]))
            same_texts = sum(tokenizer.encode(text) == row for text, row in zip(texts, ids, strict=True))
            job["texts"] = []
        print(
            f"{source.name} {name}: {told(row)}, {same_texts} of {len(texts)} lines tokenized alike, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return {
        "model": source.name,
        "window": window,
        "positions": job["positions"],
        "new_tokens": new_tokens,
        "lines": len(texts),
        "same_lines": same_texts,
        "llama_cpp_python": str(theirs["version"]),
        "schemes": rows,
    }


def told(row: Mapping[str, Any]) -> str:
    """Returns the figures of one comparison as text."""
    return f"{row['architecture']}, difference {max(row['difference']):.2g}, greedy tokens {row['same_tokens']}"


# Sizes of the random models; 5 layers, because SmolLM3's fourth is not rotated.
SIZES: Mapping[str, int] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def family(window: int, beyond: int) -> dict[str, dict[str, Any]]:
    """Returns the models to compare by name, as fields of `LlamaConfig`: what each architecture has beyond LLaMA."""
    yarn = scheme("yarn", factor=2.0, pretrained_window=window)
    stair = {"type": "llama4_temperature", "pretrained_window": window, "beta": 0.3}
    llama3 = scheme("llama3", factor=2.0, pretrained_window=window)

    def longrope(size: int, pretrained_window: int) -> Scheme:
        short, long = ([1.0 + step * j for j in range(size // 2)] for step in (0.05, 0.4))
        return scheme("longrope", factor=4.0, pretrained_window=pretrained_window, short_factor=short, long_factor=long)

    wide = {"head_dim": 24}
    biased = {"attention_bias": True, "mlp_bias": True}
    qwen2 = {"model_type": "qwen2", "attention_bias": True, "attention_output_bias": False}
    phi3 = {"model_type": "phi3", "partial_rotary_factor": 0.5}
    granite = {
        "model_type": "granite", "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7,
        "logits_scaling": 2.5,
    }  # fmt: skip
    olmo2 = {"model_type": "olmo2", "post_norm": True, "qk_norm": "full"}
    full = window + beyond
    return {
        "llama, biases": {**biased, **wide, "rope": longrope(24, window)},
        "llama, eabf_stair": {"rope": scheme("eabf_stair", pretrained_window=window)},
        "mistral": {"model_type": "mistral", "sliding_window": full},
        "ministral": {"model_type": "ministral", "sliding_window": full, "full_attention_layers": (1, 3)},
        "ministral3, yarn": {"model_type": "ministral3", **wide, "rope": compose(yarn, stair)},
        "ministral3, a ramp": {
            "model_type": "ministral3",
            "rope": compose(
                scheme("yarn", factor=2.0, pretrained_window=window, beta_fast=8.0, beta_slow=2.0), stair
            ),
        },
        "ministral3, two windows": {
            "model_type": "ministral3", "rope": compose(scheme("yarn", factor=4.0, pretrained_window=64), stair),
        },
        "qwen2": {**qwen2, "rope": yarn, "tie_word_embeddings": True},
        "qwen2, llama3": {**qwen2, "rope": llama3},
        "qwen3": {"model_type": "qwen3", "qk_norm": "head", **wide, "rope": yarn},
        "smollm3": {
            "model_type": "smollm3", "unrotated_layers": (3,), "rope": scheme("pi", factor=2.0), "head_dim": 24
        },
        "phi3": phi3,
        "phi3, yarn": {**phi3, "rope": yarn},
        "phi3, long list": {**phi3, "rope": longrope(8, window)},
        "phi3, short list": {**phi3, "rope": longrope(8, 2 * full)},
        "phi3, llama3": {"model_type": "phi3", "rope": llama3},
        "granite": {**granite, **biased, **wide, "rope": llama3},
        "olmo2": {**olmo2, "rope": yarn},
        "exaone4": {"model_type": "exaone4", "post_norm": True, "qk_norm": "head", "rope": llama3},
        "internlm3": {"model_type": "internlm3", **biased, **wide},
        "iquestcoder": {"model_type": "iquestcoder", "attention_bias": True, **wide},
        "cwm": {"model_type": "cwm", "sliding_window": full, "full_attention_layers": (0,), **wide, "rope": llama3},
        "seed_oss": {
            "model_type": "seed_oss", "attention_bias": True, "attention_output_bias": False, **wide, "rope": yarn
        },
        "seed_oss, bias of o": {"model_type": "seed_oss", "attention_output_bias": True, **wide},
    }  # fmt: skip


def random_model(directory: Path, config: LlamaConfig, tokenizer: Path) -> Llama:
    """Writes a native directory with weights that make attention sharp and no norm or bias trivial."""
    draw = np.random.default_rng(0)
    params = {}
    for entry in parameters(config):
        noise = draw.standard_normal(entry.shape, np.float32)
        if entry.entry.leaf == "kernel":
            noise *= 1.5 / np.sqrt(entry.unstacked[0])
        params[entry.path] = 1.0 + 0.2 * noise if entry.entry.leaf == "scale" else noise
    native.save_params(directory, nest(params))
    native.write_model_json(directory, config)
    copy_tokenizer_files(tokenizer, directory)
    return Llama.from_params(config, nest(params))


def measure_family(
    source: Path, python: Path, *, window: int = 128, beyond: int = 128, new_tokens: int = 16
) -> dict[str, Any]:
    """Compares random models of every architecture, with one greedy text each.

    Args:
      source: the Hugging Face directory whose tokenizer they have.
      window, beyond, new_tokens: as for `job_of`.
    """
    like, tokenizer = read_config(source), Tokenizer(source)
    job = job_of(tokenizer, window, beyond, new_tokens)
    job |= {"prompts": job["prompts"][:1], "texts": [], "threads": 1}  # more threads only wait for each other
    ids = {name: getattr(like, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    rows = {}
    for name, fields in family(window, beyond).items():
        start = time.perf_counter()
        config = LlamaConfig(**{**ids, **SIZES, "max_position_embeddings": window + beyond, **fields})
        with tempfile.TemporaryDirectory() as folder:
            model = random_model(Path(folder), config, source)
            _, _, row = compare(Path(folder), model, tokenizer, job, python)
        rows[name] = {"model_type": config.model_type, **row}
        print(f"{name}: {told(row)}, {time.perf_counter() - start:.0f} s", flush=True)
    return {"window": window, "positions": job["positions"], "new_tokens": new_tokens, "models": rows}


def agrees(model: Mapping[str, Any]) -> bool:
    """Returns whether the figures of one model, or those of the random ones, are within the limits."""
    rows = model.get("schemes") or model["models"]
    return model.get("same_lines") == model.get("lines") and all(
        max(row["difference"]) <= LIMIT and min(row["same_tokens"]) == model["new_tokens"] for row in rows.values()
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
    others = measure_family(arguments.model[0], arguments.peer)
    equal = all(map(agrees, (*models, others)))
    if arguments.json:
        figures = {"limit": LIMIT, "equal": equal, "models": models, "family": others}
        write_json(arguments.json, {**record("llama_cpp_parity"), **figures})
    if not equal:
        sys.exit("the models differ")


if __name__ == "__main__":
    run(main)
