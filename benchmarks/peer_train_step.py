"""The peer of train_step.py: the same optimizer step in PyTorch with Hugging Face transformers, random weights.

`train_step.py` runs this in a separate process, so that each stack has the whole GPU. It imports nothing from eabf_jax,
and also runs alone:

    python benchmarks/peer_train_step.py --json peer.json --rope-theta 500000 --length 16384 \
        --settings default/eager/none/checkpointed/bfloat16,default/compiled/liger/checkpointed/bfloat16 \
        --shape '{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                  "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}'

Liger's kernels replace functions of transformers for the rest of the process, so either all settings of a command use
them or none.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from peer_settings import Setting, matching

# Expandable segments keep PyTorch's allocator from failing on fragmentation, which would cost it the longest lengths.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

GIB = 2**30

ATTENTION = {"default": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def settings(text: str) -> list[Setting]:
    """Parses comma-separated settings, all with Liger's kernels or all without."""
    try:
        found = matching(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if len({one.kernels for one in found}) > 1:
        raise argparse.ArgumentTypeError("settings with and without Liger's kernels need a process each")
    return found


def build_model(shape: dict[str, Any], rope_theta: float, told: Setting, device: str) -> LlamaForCausalLM:
    """Builds a model with random weights directly on the device.

    Args:
      shape: fields of transformers' LlamaConfig.
      rope_theta: base of the rotary embedding.
      told: the switches.
      device: "cuda" or "cpu".

    Returns:
      The model in training mode.
    """
    config = LlamaConfig(
        **shape,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.set_default_dtype(torch.bfloat16 if told.precision == "bfloat16" else torch.float32)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.train()
    if told.checkpointing == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if told.layers == "compiled":
        # The whole layer is compiled, checkpointing included, so the compiler can skip recomputing what the backward
        # pass does not need. It could not if checkpointing called a compiled forward pass.
        for number, layer in enumerate(model.model.layers):
            model.model.layers[number] = torch.compile(layer)
    return model


class Clock:
    """Times intervals of a step without making the host wait for the device in between."""

    def __init__(self, device: str):
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Ends an interval and begins the next."""
        if self._device == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Returns the seconds of every interval; waits for the device."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if self._device == "cuda":
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1000 for start, end in pairs]
        return [end - start for start, end in pairs]


def measure(told: Setting, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Builds the model, warms up, and times optimizer steps.

    Args:
      told: the switches.
      options: the command line.
      device: "cuda" or "cpu".

    Returns:
      The figures that benchmarks/README.md describes under `peers`.
    """
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    counters.clear()
    model = build_model(options.shape, options.rope_theta, told, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    autocast = torch.autocast(device, torch.bfloat16, enabled=told.precision == "autocast")
    kernel = ATTENTION[told.attention]
    steps = []
    for number in range(options.warmup + options.steps):
        count = options.microbatches if number >= options.warmup else min(options.microbatches, options.warmup_most)
        clock, loss_sum = Clock(device), torch.zeros((), device=device)
        began = time.perf_counter()
        clock.mark()
        size = (count, options.microbatch_size, options.length)
        for tokens in torch.randint(options.shape["vocab_size"], size, device=device):
            # The backward pass runs the layers' forward again, so it needs the same forced kernels.
            with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
                with autocast:
                    loss = model(input_ids=tokens, labels=tokens).loss / count
                loss.backward()
            loss_sum += loss.detach()
            clock.mark()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.mark()
        *microbatches, update = clock.seconds()
        steps.append((time.perf_counter() - began, microbatches, update, loss_sum.item(), norm.item()))
    timed = steps[options.warmup :]
    seconds = statistics.median(step[0] for step in timed)
    return {
        "out_of_memory": False,
        "tokens_per_second": options.microbatches * options.microbatch_size * options.length / seconds,
        "seconds": [step[0] for step in timed],
        "microbatch_seconds": statistics.median(time for step in timed for time in step[1]),
        "update_seconds": statistics.median(step[2] for step in timed),
        "first_step_seconds": steps[0][0],
        "losses": [step[3] for step in steps],
        "gradient_norms": [step[4] for step in steps],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if device == "cuda" else None,
        "limit_gib": torch.cuda.mem_get_info()[1] / GIB if device == "cuda" else None,
        "parameter_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "optimizer_dtype": str(optimizer.state[model.lm_head.weight]["exp_avg"].dtype).removeprefix("torch."),
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=json.loads, required=True, help="fields of transformers' LlamaConfig, as JSON")
    parser.add_argument("--rope-theta", type=float, required=True, help="base of the rotary embedding")
    parser.add_argument("--length", type=int, required=True, help="tokens of a row")
    parser.add_argument("--microbatches", type=int, default=2, help="microbatches of a step")
    parser.add_argument("--microbatch-size", type=int, default=1, help="rows of a microbatch")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    parser.add_argument("--warmup-most", type=int, default=2, help="microbatches of a warm-up step, at most")
    parser.add_argument("--settings", type=settings, required=True, help="of the peer, separated by commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    options = parser.parse_args()
    device = options.device
    torch.set_float32_matmul_precision("high")
    if options.settings[0].kernels == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    for told in options.settings:
        figures: dict[str, Any] = {"out_of_memory": False}
        began = time.perf_counter()
        try:
            figures = measure(told, options, device)
        except torch.OutOfMemoryError as error:
            figures = {"out_of_memory": True, "error": str(error).splitlines()[0]}
        except Exception as error:  # a setting that a release cannot run must not hide the others
            figures["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        figures |= told._asdict() | {"cuda": torch.version.cuda, "wall_seconds": time.perf_counter() - began}
        figures |= {"microbatches": options.microbatches, "microbatch_size": options.microbatch_size}
        report[str(told)] = figures
        # Frees everything of this setting on the device before the next one.
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
