"""Measures generation on random weights, and transformers' `generate` on the same shape in the same run.

python benchmarks/generate.py --shape llama2_7b --json benchmarks/results/llama2_7b_generate_h200.json
python benchmarks/generate.py --shape smollm2_135m --no-peer

Decode: tokens per second after the first one, median of three, for a short prompt, a long prompt and a batch, and the
share of the card's memory bandwidth for the bytes that a step must read. Prefill: seconds to the first token of the
long prompt, and its model FLOPs as a share of the device's peak (per token 2 x the weights of the products, and 4 x
layers x width of the heads x half the length for causal attention; the output head once per row). Compilation is not
included. The peer runs in a separate process, so that it has all of the memory; SETTINGS lists how it is called.

Generated tokens are checked by reading their text as a prompt: `worst_choice` is how far the last tokens are below the
likeliest tokens there, in standard deviations of the logits. It is 0 except for rounding.
"""

import argparse
import contextlib
import gc
import importlib
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from provenance import record

from eabf_jax.cli import run
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.hardware import device_of_kind
from eabf_jax.interop.directory import write_json
from eabf_jax.model.kv_cache import CACHE_DTYPES

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
WEIGHT_BYTES = 2  # bfloat16
# Bytes of one head's key, or value, in our caches.
SLOT_BYTES: dict[str, Callable[[int], float]] = {"model": lambda head_dim: 2 * head_dim, "int8": lambda d: d + 4}

Clock = Callable[[], float]


class Setting(NamedTuple):
    """One documented way to call transformers' `generate`.

    Attributes:
      options: options of the call.
      compiled: whether `generate` compiles its decoding, as it does for a static cache on a GPU.
      kernel: the attention kernel that PyTorch tries first; None leaves the choice to PyTorch.
      attention: `attn_implementation`.
      own_cache: whether the caller creates one static cache and empties it between calls, as documented.
      number_bytes: bytes per number in the cache.
      needs: a module, or `module:name` in it, without which the setting is left out.
    """

    options: Mapping[str, Any] = MappingProxyType({})
    compiled: bool = False
    kernel: str | None = None
    attention: str = "sdpa"
    own_cache: bool = False
    number_bytes: float = 2
    needs: str = "transformers"


_STATIC = {"cache_implementation": "static"}


def _quantized(**config: Any) -> dict[str, Any]:
    return {"cache_implementation": "quantized", "cache_config": config}


# Ordered so that settings which differ only in the cache share compiled code.
SETTINGS: dict[str, Setting] = {
    "static cache, compiled": Setting(_STATIC, compiled=True),
    "static cache of the caller's, compiled": Setting(own_cache=True, compiled=True),
    "dynamic cache": Setting(),
    "dynamic cache, cuDNN attention": Setting(kernel="CUDNN_ATTENTION"),
    "dynamic cache, flash attention": Setting(kernel="FLASH_ATTENTION"),
    "dynamic cache, flash-attn": Setting(attention="flash_attention_2", needs="flash_attn"),
    "static cache, not compiled": Setting({**_STATIC, "disable_compile": True}),
    "float8 cache": Setting(
        _quantized(backend="fp8"), number_bytes=1, needs="transformers.cache_utils:Fp8QuantizedLayer"
    ),
    "4-bit cache, quanto": Setting(_quantized(backend="quanto", nbits=4), number_bytes=0.5, needs="optimum.quanto"),
    "4-bit cache, HQQ": Setting(
        _quantized(backend="hqq", nbits=4, axis_key=1, axis_value=1), number_bytes=0.5, needs="hqq"
    ),
    "static cache, compiled, cuDNN attention": Setting(_STATIC, compiled=True, kernel="CUDNN_ATTENTION"),
    "static cache, compiled, plain attention": Setting(_STATIC, compiled=True, kernel="MATH"),
    "static cache, compiled with max-autotune": Setting(
        {**_STATIC, "compile_config": {"mode": "max-autotune"}}, compiled=True
    ),
}
# A setting without compilation is timed only if it reaches this share of the best rate in a trial.
WORTH_TIMING = 0.9
TRIAL = 33  # tokens


# The arithmetic.


def elapsed(call: Callable[[], Any], clock: Clock) -> float:
    """Returns the seconds that a call takes."""
    begun = clock()
    call()
    return clock() - begun


def warm_up(call: Callable[[], Any], clock: Clock, most: int = 5) -> list[float]:
    """Repeats a call until it is no faster than before, when compilation and recording are done.

    Args:
      call: the function to warm up.
      clock: returns seconds.
      most: maximum number of calls.

    Returns:
      Seconds of each call.
    """
    seconds = [elapsed(call, clock), elapsed(call, clock)]
    while seconds[-1] < 0.95 * seconds[-2] and len(seconds) < most:
        seconds.append(elapsed(call, clock))
    return seconds


def speed(
    batch: int, new: int, warmup: Sequence[float], firsts: Sequence[float], rests: Sequence[float]
) -> dict[str, Any]:
    """Computes the figures of the timed calls.

    Args:
      batch: rows.
      new: tokens that a call generates per row.
      warmup: seconds of the warm-up calls.
      firsts: by timed call, seconds to the first token of all rows.
      rests: by timed call, seconds from there to the last token.

    Returns:
      `tokens_per_second` after the first token, of all rows, at the median of `rests`; `spread`, the difference between
      the slowest and the fastest call as a share of the median; all seconds.
    """
    middle = statistics.median(rests)
    return {
        "timed_runs": len(rests),
        "first_token_seconds": statistics.median(firsts),
        "tokens_per_second": batch * (new - 1) / middle,
        "spread": (max(rests) - min(rests)) / middle,
        "seconds": {"warm_up": list(warmup), "first_token": list(firsts), "decode": list(rests)},
    }


def our_speed(start: Callable[[], Iterator[Any]], batch: int, new: int, clock: Clock) -> tuple[dict[str, Any], Any]:
    """Times a stream of completions.

    Args:
      start: begins a stream, which yields the first token of every row, then more, and the complete texts last.
      batch: rows.
      new: new tokens per row.
      clock: returns seconds.

    Returns:
      The figures of `speed`, and the last completions.
    Raises:
      RuntimeError: a row has a different number of tokens.
    """
    last: Any = None

    def once() -> tuple[float, float]:
        nonlocal last
        begun = clock()
        stream = start()
        next(stream)
        first = clock()
        *_, last = stream
        return first - begun, clock() - first

    warmup = warm_up(once, clock)
    firsts, rests = zip(*(once() for _ in range(REPEATS)), strict=True)
    lengths = {len(completion.tokens) for completion in last}
    if lengths != {new}:
        raise RuntimeError(f"rows have {sorted(lengths)} new tokens where {new} were asked for")
    return speed(batch, new, warmup, firsts, rests), last


def peer_speed(
    generate: Callable[[int], Any], batch: int, new: int, clock: Clock, *, compiled: bool, best: float | None
) -> dict[str, Any]:
    """Times a function that returns all tokens at its end, so the first token's seconds are subtracted.

    Args:
      generate: generates the given number of tokens per row, and waits for the device.
      batch: rows.
      new: new tokens per row.
      clock: returns seconds.
      compiled: whether decoding is compiled; it is then warmed up at full length, and timed without a trial.
      best: the best setting's tokens per second so far; None times without a trial.

    Returns:
      The figures of `speed`, or only `trial_tokens_per_second` if the setting is too slow.
    """
    warmup = warm_up(lambda: generate(new if compiled else 2), clock)

    def seconds(tokens: int) -> float:
        return elapsed(lambda: generate(tokens), clock)

    if not compiled and best is not None:
        first = seconds(1)
        trial = batch * (TRIAL - 1) / (seconds(TRIAL) - first)
        if trial < WORTH_TIMING * best:
            return {"timed_runs": 0, "trial_tokens_per_second": trial, "trial_tokens": TRIAL}
    firsts = [seconds(1) for _ in range(REPEATS)]
    wholes = [seconds(new) for _ in range(REPEATS)]
    return speed(batch, new, warmup, firsts, [whole - statistics.median(firsts) for whole in wholes])


def product_weights(shape: Mapping[str, Any]) -> int:
    """Counts the weights of the matrix products of a layer."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    attention = 2 * hidden * (heads + shape["num_key_value_heads"] * shape["head_dim"])
    return attention + 3 * hidden * shape["intermediate_size"]


def prefill_flops(shape: Mapping[str, Any], length: int) -> float:
    """Counts the model FLOPs of reading one prompt up to the logits of its next token.

    Args:
      shape: fields of the model's configuration.
      length: tokens of the prompt.

    Returns:
      The FLOPs.
    """
    layers, heads = shape["num_hidden_layers"], shape["num_attention_heads"] * shape["head_dim"]
    products = 2 * product_weights(shape) * layers * length + 2 * shape["hidden_size"] * shape["vocab_size"]
    return products + 2 * layers * heads * length**2


def step_bytes(shape: Mapping[str, Any], batch: int, prompt: int, new: int, slot_bytes: float) -> float:
    """Counts the bytes that any decode step must read, as the mean over the steps of a call.

    Args:
      shape: fields of the model's configuration.
      batch: rows.
      prompt: prompt tokens per row.
      new: new tokens per row; the prefill makes the first of them.
      slot_bytes: bytes of one head's key, or value, in the cache.

    Returns:
      Bytes of the weights of products and norms in bfloat16, and of the keys and values of all earlier tokens in all
      rows.
    """
    layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
    weights = layers * product_weights(shape) + hidden * shape["vocab_size"] + (2 * layers + 1) * hidden
    # The step for the second token attends to the prompt and the first token; the last step attends to all tokens but
    # its own.
    slots = statistics.mean(range(prompt + 1, prompt + new))
    return WEIGHT_BYTES * weights + batch * slots * layers * shape["num_key_value_heads"] * 2 * slot_bytes


def bandwidth_share(figures: Mapping[str, Any], one: Mapping[str, int], read: float, bandwidth: float) -> float:
    """Computes the share of the card's memory bandwidth that the decode steps use for the bytes they must read.

    Args:
      figures: from `speed`.
      one: the run, `batch` rows.
      read: from `step_bytes`.
      bandwidth: of the card, in bytes per second.

    Returns:
      The share.
    """
    return read * figures["tokens_per_second"] / one["batch"] / bandwidth


def failure(error: BaseException) -> dict[str, Any]:
    """Returns the file's entry for a run that ended in an error."""
    signs = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ut of memory")
    told = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"out_of_memory": any(sign in str(error) for sign in signs), "error": told}


# Ours.


def ours(shape: dict[str, Any], runs: dict[str, dict[str, int]], cache: str, chunk: int) -> dict[str, Any]:
    """Times our generator.

    Args:
      shape: fields of the model's configuration.
      runs: by name, `batch`, `prompt` and `new` tokens.
      cache: kind of cache.
      chunk: tokens of a prompt read at a time.

    Returns:
      By run, the figures of `speed` and `worst_choice`; the device and its peak memory in GiB.
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
    del model, parameters  # the generator has its own copy
    figures: dict[str, Any] = {}
    for name, one in runs.items():
        prompts = np.random.default_rng(0).integers(0, shape["vocab_size"], (one["batch"], one["prompt"])).tolist()

        def start(prompts: list[list[int]] = prompts, new: int = one["new"]) -> Iterator[Any]:
            return generator.stream(prompts, new)

        try:
            found, last = our_speed(start, one["batch"], one["new"], time.perf_counter)
            figures[name] = {**one, **found, "worst_choice": worst_choice(generator, prompts, last)}
        except RuntimeError as error:  # JAX's errors are subclasses
            figures[name] = {**one, **failure(error)}
        print(f"{name}: {figures[name]}", flush=True)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "peak_gib": memory.get("peak_bytes_in_use", 0) / 2**30,
        "runs": figures,
    }


def worst_choice(generator: Any, prompts: list[list[int]], completions: list[Any]) -> float:
    """Compares greedy tokens with the likeliest tokens when their texts are read as prompts.

    Args:
      generator: the generator that made them.
      prompts: the prompts.
      completions: one per prompt.

    Returns:
      The largest difference between the highest logit and that of the generated token, over the last tokens (at most
      four) of the first and the last text, in standard deviations of the logits.
    """
    worst = 0.0
    for prompt, completion in ((prompts[row], completions[row]) for row in {0, len(prompts) - 1}):
        for back in range(1, 1 + min(4, len(completion.tokens))):
            (logits,) = generator.next_token_logits([prompt + completion.tokens[:-back]])
            worst = max(worst, float((logits.max() - logits[completion.tokens[-back]]) / logits.std()))
    return worst


# The peer.

# (setting, run, the best rate so far) -> figures
Measure = Callable[[str, Mapping[str, int], float | None], dict[str, Any]]


def rate(figures: Mapping[str, Any]) -> float:
    """Returns the tokens per second, of the trial if there is nothing else; 0 if the setting did not run."""
    return figures.get("tokens_per_second") or figures.get("trial_tokens_per_second") or 0.0


def strongest(settings: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Returns the timed setting with the most tokens per second; None if none was timed."""
    timed = {name: figures["tokens_per_second"] for name, figures in settings.items() if "tokens_per_second" in figures}
    return max(timed, key=timed.__getitem__, default=None)


def compare(
    names: Sequence[str],
    runs: Mapping[str, Mapping[str, int]],
    measure: Measure,
    budget: float,
    clock: Clock,
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Measures settings, starting with the strongest of the previous run.

    The strongest setting is timed in every run. The others are timed as long as the budget leaves time for the
    strongest in the remaining runs.

    Args:
      names: of the settings.
      runs: as for `ours`.
      measure: times one setting; its errors are recorded, and the next setting follows.
      budget: seconds, of all runs together.
      clock: returns seconds.
      save: gets the figures so far after each setting, by run and setting.
    """
    begun = clock()
    figures: dict[str, dict[str, Any]] = {name: {} for name in runs}
    standing: dict[str, float] = {}  # rates of the previous run, as shares of its best
    cost = 0.0  # seconds that the strongest setting takes
    for number, (name, one) in enumerate(runs.items()):
        found = figures[name]
        costs: dict[str, float] = {}
        best = None
        # Settings that were not tried yet come before the weaker ones, because they might be the strongest.
        for place, setting in enumerate(sorted(names, key=lambda setting: -standing.get(setting, WORTH_TIMING))):
            started = clock()
            left = budget - (started - begun)
            if place and left < (cost or max(costs.values())) * (len(runs) - number - 1):
                share = standing.get(setting)
                told = "not tried" if share is None else f"{share:.0%} of the strongest's rate in the run before"
                found[setting] = {"left_out": f"the {budget:g} seconds for the peer were up ({told})"}
                continue
            try:
                found[setting] = measure(setting, one, best)
            except Exception as error:
                found[setting] = failure(error)
            costs[setting] = clock() - started
            best = max(best or 0.0, rate(found[setting])) or None
            save(figures)
            print(f"transformers, {name}, {setting}: {found[setting]}", flush=True)
        if best is not None:
            # The first setting in a run compiles code that others may share.
            cost = max(next(iter(costs.values())), costs.get(strongest(found) or "", 0.0))
            standing.update({setting: rate(x) / best for setting, x in found.items() if "left_out" not in x})
        save(figures)


def missing(needs: str) -> bool:
    """Returns whether a module, or a name in it, is missing."""
    module, _, name = needs.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return True
    return bool(name) and not hasattr(found, name)


class Peer:
    """transformers' model of a shape, with random weights."""

    def __init__(self, shape: dict[str, Any]):
        """Creates it on the GPU, if there is one."""
        import torch
        import transformers

        self._torch, self._transformers, self._shape = torch, transformers, shape
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._compiled_for: Any = None
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self._device):
            config = transformers.LlamaConfig(**shape, attn_implementation="sdpa", eos_token_id=None, pad_token_id=0)
            self._model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)

    def measure(self, name: str, one: Mapping[str, int], best: float | None) -> dict[str, Any]:
        """Times one setting; see `Measure`."""
        torch, setting = self._torch, SETTINGS[name]
        if missing(setting.needs):
            return {"left_out": f"{setting.needs} is not installed"}
        self._forget((setting.kernel, setting.options.get("compile_config"), setting.attention, tuple(one.values())))
        self._model.set_attn_implementation(setting.attention)
        tokens = torch.randint(0, self._shape["vocab_size"], (one["batch"], one["prompt"]), device=self._device)
        mask = torch.ones_like(tokens)
        options = {**setting.options, "do_sample": False}
        if "compile_config" in options:
            options["compile_config"] = self._transformers.CompileConfig(**options["compile_config"])
        cache = None
        if setting.own_cache:
            slots = one["prompt"] + one["new"]
            cache = self._transformers.StaticCache(config=self._model.config, max_cache_len=slots)
            # Releases before 5.24 use a different name.
            known = inspect.signature(self._model.forward).parameters
            options["cache" if "cache" in known else "past_key_values"] = cache

        def generate(count: int) -> None:
            if cache is not None:
                cache.reset()
            found = self._model.generate(tokens, attention_mask=mask, max_new_tokens=count, **options)
            # Reading the last token waits for the device.
            if found.shape[1] != tokens.shape[1] + count or int(found[0, -1]) < 0:
                raise RuntimeError(f"generate returned {found.shape[1]} tokens where {count} new ones were asked for")

        with self._preferring(setting.kernel):
            return peer_speed(
                generate, one["batch"], one["new"], time.perf_counter, compiled=setting.compiled, best=best
            )

    def _preferring(self, kernel: str | None) -> contextlib.AbstractContextManager[Any]:
        if kernel is None:
            return contextlib.nullcontext()
        attention = self._torch.nn.attention
        others = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
        order = [kernel, *(other for other in others if other != kernel)]
        return attention.sdpa_kernel([getattr(attention.SDPBackend, name) for name in order], set_priority=True)

    def _forget(self, compiled_for: Any) -> None:
        """Drops compiled code of earlier runs: a graph for several shapes is slower than one for a single shape."""
        if compiled_for != self._compiled_for:
            self._compiled_for = compiled_for
            self._torch._dynamo.reset()
            for name in ("_previous_max_cache_length", "_cache", "_compiled_call"):
                if name in vars(self._model):
                    delattr(self._model, name)
        gc.collect()
        self._torch.cuda.empty_cache()


def peer(shape: dict[str, Any], runs: dict[str, dict[str, int]], budget: float, path: Path) -> None:
    """Times transformers' `generate`, greedy, in every setting.

    Args:
      shape: as for `ours`.
      runs: as for `ours`.
      budget: seconds in all; see `compare`.
      path: the file to which the figures so far are written after each setting, by run and setting.
    """
    compare(list(SETTINGS), runs, Peer(shape).measure, budget, time.perf_counter, lambda found: write_json(path, found))


def described(name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a setting's figures how `generate` was called."""
    defaults, setting = Setting(), SETTINGS[name]._asdict()
    changed = {key: value for key, value in setting.items() if value != getattr(defaults, key)}
    return {"settings": {key: value for key, value in changed.items() if key != "needs"}, **figures}


def finish(figures: dict[str, Any], shape: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the figures that follow from ours and the peer's.

    Args:
      figures: `device`, `cache`, `runs` and, if there is one, `peer`: by run and setting.
      shape: fields of the model's configuration.

    Returns:
      The figures, with shares of the card's peaks, `strongest_peer` and `ratio_to_strongest_peer` by run.
    """
    card = device_of_kind(figures["device"])
    figures["memory_bandwidth"] = card.bandwidth if card else None
    by_run = figures.get("peer", {})
    for name, mine in figures["runs"].items():
        size = {key: mine[key] for key in ("batch", "prompt", "new")}
        slots = {"": SLOT_BYTES[figures["cache"]](shape["head_dim"])}
        slots |= {setting: SETTINGS[setting].number_bytes * shape["head_dim"] for setting in by_run.get(name, {})}
        for setting, slot_bytes in slots.items():
            found = by_run[name][setting] if setting else mine
            if "tokens_per_second" in found:
                found["step_bytes"] = step_bytes(shape, **size, slot_bytes=slot_bytes)
                if card:
                    found["bandwidth_share"] = bandwidth_share(found, size, found["step_bytes"], card.bandwidth)
        if name == "long" and card and "first_token_seconds" in mine:
            figures["prefill_mfu"] = prefill_flops(shape, mine["prompt"]) / mine["first_token_seconds"] / card.flops
    if by_run:
        figures["peer"] = {
            name: {setting: described(setting, x) for setting, x in found.items()} for name, found in by_run.items()
        }
        figures["strongest_peer"] = {name: strongest(found) for name, found in by_run.items()}
        figures["ratio_to_strongest_peer"] = {
            name: figures["runs"][name]["tokens_per_second"] / by_run[name][setting]["tokens_per_second"]
            for name, setting in figures["strongest_peer"].items()
            if setting is not None and "tokens_per_second" in figures["runs"][name]
        }
    return figures


def errors(figures: Mapping[str, Any]) -> list[str]:
    """Returns a line for each failure with a reason other than memory."""
    named = [(f"ours, {name}", found) for name, found in figures["runs"].items()]
    for name, settings in figures.get("peer", {}).items():
        named += [(f"{name}, {setting}", found) for setting, found in settings.items()]
    failed = [f"{name}: {found['error']}" for name, found in named if "error" in found and not found["out_of_memory"]]
    return failed + ([figures["peer_error"]] if "peer_error" in figures else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama2_7b", help=", ".join(SHAPES))
    parser.add_argument("--new", type=int, default=256, help="tokens to generate (default: 256)")
    parser.add_argument("--short", type=int, default=128, help="tokens of the short prompt (default: 128)")
    parser.add_argument("--long", type=int, help="tokens of the long prompt (default: the shape's window)")
    parser.add_argument("--batch", type=int, default=16, help="rows of the batch (default: 16)")
    parser.add_argument("--batch-prompt", type=int, default=2048, help="tokens of each row's prompt (default: 2048)")
    parser.add_argument("--cache", default="model", help=", ".join(CACHE_DTYPES))
    parser.add_argument("--prefill-chunk", type=int, default=8192)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument(
        "--peer-seconds", type=float, default=210, help="after which the peer's weaker settings have no more turn"
    )
    parser.add_argument("--only-peer", action="store_true", help="what this program starts for the peer")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    if arguments.shape not in SHAPES:
        raise unknown_name("shape", arguments.shape, SHAPES)
    if arguments.cache not in CACHE_DTYPES:
        raise unknown_name("kind of cache", arguments.cache, CACHE_DTYPES)
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
        peer(shape, runs, arguments.peer_seconds, arguments.json)
        return
    figures: dict[str, Any] = {**record("generate"), "shape": arguments.shape, "cache": arguments.cache}
    if not arguments.no_peer:  # before ours: JAX takes the device's memory and keeps it
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "peer.json"
            ended = subprocess.run([sys.executable, *sys.argv, "--only-peer", "--json", str(report)]).returncode
            if ended:
                figures["peer_error"] = f"the peer's process ended with status {ended}"
            figures["peer"] = json.loads(report.read_text()) if report.exists() else {}
    figures |= ours(shape, runs, arguments.cache, arguments.prefill_chunk)
    finish(figures, shape)
    shown = ("device", "prefill_mfu", "strongest_peer", "ratio_to_strongest_peer")
    print(json.dumps({name: figures[name] for name in shown if name in figures}, indent=2))
    if arguments.json:
        write_json(arguments.json, figures)
    failed = errors(figures)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
