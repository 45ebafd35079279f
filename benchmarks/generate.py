"""Speed of generation on random weights, and of transformers' `generate` on the same shape in the same run.

python benchmarks/generate.py --shape llama2_7b --json benchmarks/results/llama2_7b_generate_h100.json
python benchmarks/generate.py --shape smollm2_135m --no-peer

Decode: tokens a second after the first one, best of three, at a short prompt, at a long one, and for a batch. Prefill:
seconds to the first token of the long prompt, and the share of the device's peak that its model FLOPs make (2 x the
weights of the products a token, 4 x layers x width of the heads x half the length a token for causal attention, the
head's once a row). Compilation is outside all of them. The peer is a process of its own, for the whole of the memory.

What was generated is compared with what texts read as prompts would go on with: `worst_choice` is how far the last
tokens were below the likeliest there, in standard deviations of the logits. It is 0, or rounding.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from eabf_jax.cli import run
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.interop.directory import write_json

SHAPES: dict[str, dict[str, Any]] = {
    "llama2_7b": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 16_384,
    },
    "smollm2_135m": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
    "micro": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    },
}  # fmt: skip
REPEATS = 3
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12}  # dense bfloat16


def prefill_flops(shape: dict[str, Any], length: int) -> float:
    """Model FLOPs of reading one prompt up to the logits of its next token.

    Args:
      shape: fields of the model's configuration.
      length: of the prompt, in tokens.

    Returns:
      The FLOPs.
    """
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    attention = 2 * hidden * (heads + shape["num_key_value_heads"] * shape["head_dim"])
    layer = attention + 3 * hidden * shape["intermediate_size"]
    products = 2 * layer * shape["num_hidden_layers"] * length + 2 * hidden * shape["vocab_size"]
    return products + 2 * shape["num_hidden_layers"] * heads * length**2


def ours(shape: dict[str, Any], runs: dict[str, dict[str, int]], cache: str, chunk: int) -> dict[str, Any]:
    """Times our generator.

    Args:
      shape: fields of the model's configuration.
      runs: by name, `batch`, `prompt` and `new` tokens.
      cache: kind of cache.
      chunk: tokens of a prompt read at a time.

    Returns:
      By run, seconds to the first token, tokens a second and `worst_choice`; the device and its peak memory in GiB.
    """
    import jax

    from eabf_jax.inference import Generator
    from eabf_jax.model import Llama, LlamaConfig
    from eabf_jax.rope import scheme

    config = LlamaConfig.from_fields(shape | {"eos_token_id": None, "rope": scheme("eabf", pretrained_window=4096)})

    @jax.jit
    def random_parameters(key: jax.Array) -> Any:
        abstract = Llama.abstract(config, param_dtype="bfloat16").parameters()
        leaves, structure = jax.tree.flatten(abstract)
        keys = jax.random.split(key, len(leaves))
        drawn = [0.02 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    parameters = random_parameters(jax.random.key(0))
    model = Llama.from_params(config, parameters, dtype="bfloat16", param_dtype="bfloat16")
    generator = Generator(model, cache=cache, prefill_chunk=chunk)
    del model, parameters  # the generator has its own
    figures: dict[str, Any] = {}
    for name, one in runs.items():
        prompts = np.random.default_rng(0).integers(0, shape["vocab_size"], (one["batch"], one["prompt"])).tolist()
        firsts, rates = [], []
        for _ in range(1 + REPEATS):  # the first one compiles
            begun = time.perf_counter()
            stream = generator.stream(prompts, one["new"])
            next(stream)
            first = time.perf_counter()
            *_, last = stream
            made = sum(len(completion.tokens) - 1 for completion in last)
            firsts.append(first - begun)
            rates.append(made / (time.perf_counter() - first))
        figures[name] = {
            **one, "compile_seconds": firsts[0] - min(firsts[1:]), "first_token_seconds": min(firsts[1:]),
            "tokens_per_second": max(rates[1:]), "worst_choice": worst_choice(generator, prompts, last),
        }  # fmt: skip
        print(f"{name}: {figures[name]}", flush=True)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "peak_gib": memory.get("peak_bytes_in_use", 0) / 2**30,
        "runs": figures,
    }


def worst_choice(generator: Any, prompts: list[list[int]], completions: list[Any]) -> float:
    """Compares greedy tokens with what their texts, read as prompts, would have been continued with.

    Args:
      generator: that made them.
      prompts: what was continued.
      completions: of each.

    Returns:
      The largest difference between the highest logit and that of the token generated, of the last tokens (at most
      four) of the first and the last text, in standard deviations of the logits.
    """
    worst = 0.0
    for prompt, completion in ((prompts[row], completions[row]) for row in {0, len(prompts) - 1}):
        for back in range(1, 1 + min(4, len(completion.tokens))):
            (logits,) = generator.next_token_logits([prompt + completion.tokens[:-back]])
            worst = max(worst, float((logits.max() - logits[completion.tokens[-back]]) / logits.std()))
    return worst


def peer(shape: dict[str, Any], runs: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Times transformers' `generate`, greedy, with its default cache.

    Args:
      shape: as for `ours`.
      runs: as for `ours`.

    Returns:
      By run, seconds to the first token and tokens a second; None for one that does not fit the memory.
    """
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, attn_implementation="sdpa", eos_token_id=None, pad_token_id=0)
        ).eval()

    def seconds(tokens: Any, count: int) -> float:
        begun = time.perf_counter()
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert found.shape[1] == tokens.shape[1] + count and int(found[0, -1]) >= 0  # waits for the device
        return time.perf_counter() - begun

    figures: dict[str, Any] = {}
    for name, one in runs.items():
        tokens = torch.randint(0, shape["vocab_size"], (one["batch"], one["prompt"]), device=device)
        try:
            seconds(tokens, 2)
            first = min(seconds(tokens, 1) for _ in range(REPEATS))
            whole = min(seconds(tokens, one["new"]) for _ in range(REPEATS))
        except torch.OutOfMemoryError:
            figures[name] = None
            continue
        rate = one["batch"] * (one["new"] - 1) / (whole - first)
        figures[name] = {**one, "first_token_seconds": first, "tokens_per_second": rate}
        print(f"transformers, {name}: {figures[name]}", flush=True)
    return {"transformers": transformers.__version__, "torch": torch.__version__, "runs": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama2_7b", help=", ".join(SHAPES))
    parser.add_argument("--new", type=int, default=256, help="tokens to generate (default: 256)")
    parser.add_argument("--short", type=int, default=128, help="tokens of the short prompt (default: 128)")
    parser.add_argument("--long", type=int, help="tokens of the long prompt (default: the shape's window)")
    parser.add_argument("--batch", type=int, default=16, help="rows of the batch (default: 16)")
    parser.add_argument("--batch-prompt", type=int, default=2048, help="tokens of each row's prompt (default: 2048)")
    parser.add_argument("--cache", default="model", help="model or int8")
    parser.add_argument("--prefill-chunk", type=int, default=8192)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--only-peer", action="store_true", help="what this program starts for the peer")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.shape not in SHAPES:
        raise unknown_name("shape", arguments.shape, SHAPES)
    if arguments.new < 2:
        raise InputError(f"--new {arguments.new}: at least 2 are needed; speed is that of those after the first")
    shape = SHAPES[arguments.shape]
    long = arguments.long or shape["max_position_embeddings"]
    runs = {
        "short": {"batch": 1, "prompt": arguments.short, "new": arguments.new},
        "long": {"batch": 1, "prompt": long, "new": arguments.new},
        "one_row": {"batch": 1, "prompt": arguments.batch_prompt, "new": arguments.new},
        "batch": {"batch": arguments.batch, "prompt": arguments.batch_prompt, "new": arguments.new},
    }
    if arguments.only_peer:
        write_json(arguments.json, peer(shape, runs))
        return
    figures: dict[str, Any] = {"shape": arguments.shape, "cache": arguments.cache, "command": sys.argv}
    if not arguments.no_peer:  # first: JAX takes the device's memory and keeps it
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "peer.json"
            subprocess.run([sys.executable, *sys.argv, "--only-peer", "--json", str(report)], check=True)
            figures["peer"] = json.loads(report.read_text())
    figures |= ours(shape, runs, arguments.cache, arguments.prefill_chunk)
    measured = figures["runs"]
    figures["batch_to_one_row"] = measured["batch"]["tokens_per_second"] / measured["one_row"]["tokens_per_second"]
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in figures["device"]), None)
    if peak is not None:
        figures["prefill_mfu"] = prefill_flops(shape, long) / measured["long"]["first_token_seconds"] / peak
    if "peer" in figures:
        figures["decode_ratio_to_peer"] = {
            name: measured[name]["tokens_per_second"] / theirs["tokens_per_second"]
            for name, theirs in figures["peer"]["runs"].items()
            if theirs is not None
        }
    print(json.dumps({name: value for name, value in figures.items() if name not in ("runs", "peer")}, indent=2))
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    run(main)
