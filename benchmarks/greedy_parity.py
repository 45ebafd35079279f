"""Compares our greedy text of a model with transformers' `generate`, token for token in float32.

python benchmarks/greedy_parity.py --model DIR --json benchmarks/results/greedy_parity_smollm2_cpu.json

DIR is a Hugging Face directory, for example SmolLM2-135M-Instruct converted by `python convert/from_gguf.py`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from eabf_jax import load
from eabf_jax.cli import run
from eabf_jax.errors import InputError
from eabf_jax.inference import Generator
from eabf_jax.interop.directory import write_json

PROMPTS = (
    "The history of the Roman Empire begins",
    "def quicksort(values):\n",
    "Dear customer,\nwe are sorry to",
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics state that",
)


def measure(model: Path, tokens: int) -> dict[str, Any]:
    """Continues every prompt with our generator and with transformers' `generate`.

    Args:
      model: a Hugging Face directory.
      tokens: number of new tokens.

    Returns:
      For each prompt, the number of equal tokens from the first on, and the text.
    Raises:
      InputError: no such directory, or a directory without a tokenizer.
    """
    ours, tokenizer = load(model, dtype="float32")
    if tokenizer is None:
        raise InputError(f"{model} has no tokenizer")
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    completions = Generator(ours, tokenizer).generate(prompts, tokens, stop_tokens=())
    peer = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = []
    for text, prompt, completion in zip(PROMPTS, prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        found = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        pairs = zip(found, completion.tokens, strict=True)
        same = next((index for index, (theirs, mine) in enumerate(pairs) if theirs != mine), tokens)
        rows.append({"prompt": text, "same_tokens": same, "text": completion.text})
        print(f"{same} of {tokens} tokens are the same: {text!r}", flush=True)
    return {
        "model": model.name,
        "dtype": "float32",
        "tokens": tokens,
        "equal": all(row["same_tokens"] == tokens for row in rows),
        "transformers": transformers.__version__,
        "prompts": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    figures = measure(arguments.model, arguments.tokens)
    if arguments.json:
        write_json(arguments.json, figures)
    if not figures["equal"]:
        sys.exit("the texts differ")


if __name__ == "__main__":
    run(main)
