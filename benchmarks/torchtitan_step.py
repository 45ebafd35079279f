"""Times torchtitan's optimizer step on one GPU, with the shape and window of a configuration.

    pip install torchtitan
    python benchmarks/torchtitan_step.py --config_path configs/llama2_7b_eabf_16k.yaml --json OUT.json

torchtitan's Trainer runs its own Llama: compiled layers and loss, bfloat16 parameters and moments (`training.dtype`),
fused AdamW, gradients clipped to a norm of 1. Weights and tokens are random. Each mode of activation checkpointing runs
in a separate process.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from provenance import record
from train_step import model_flops_utilisation, rotary_base

from eabf_jax.cli import ArgumentParser, run
from eabf_jax.errors import InputError
from eabf_jax.interop.directory import write_json
from eabf_jax.model.config import LlamaConfig
from eabf_jax.training.recipe import load_config

GIB = 2**30
# torchtitan's modes of activation checkpointing: every layer; by operation; every second layer; none.
MODES: Mapping[str, Mapping[str, str]] = {
    "full": {"mode": "full"},
    "selective, op": {"mode": "selective", "selective_ac_option": "op"},
    "selective, 2": {"mode": "selective", "selective_ac_option": "2"},
    "none": {"mode": "none"},
}


def measure(shape: Mapping[str, Any], base: float, mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times steps of torchtitan's Trainer in this process, which must not have used torch.distributed before.

    Args:
      shape: fields of LlamaConfig.
      base: base of the rotary embedding.
      mode: a key of MODES.
      options: the command line.

    Returns:
      `seconds` of every timed step, `losses`, `peak_gib` and `parameter_dtype`.
    """
    import torch
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
    from torchtitan.protocols.train_spec import register_train_spec
    from torchtitan.train import Trainer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    class Rows:
        """Random rows, in which each token is predicted from those before it."""

        def __iter__(self) -> Iterator[tuple[dict[str, Any], Any]]:
            while True:
                rows = torch.randint(shape["vocab_size"], (1, options.length + 1))
                yield {"input": rows[:, :-1]}, rows[:, 1:].clone()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            pass

    flavor = TransformerModelArgs(
        dim=shape["hidden_size"],
        n_layers=shape["num_hidden_layers"],
        n_heads=shape["num_attention_heads"],
        n_kv_heads=shape["num_key_value_heads"],
        vocab_size=shape["vocab_size"],
        rope_theta=base,
    )
    spec = get_train_spec()
    spec.model_args = {"shape": flavor}
    spec.build_dataloader_fn, spec.build_tokenizer_fn = (lambda **_: Rows()), None
    register_train_spec("benchmark", spec)
    config = JobConfig()
    config.model.name, config.model.flavor = "benchmark", "shape"
    config.training.seq_len, config.training.local_batch_size = options.length, 1
    config.training.global_batch_size = options.microbatches
    config.training.steps = 1 + options.steps
    config.training.dtype = "bfloat16"
    config.optimizer.lr, config.lr_scheduler.warmup_steps = 2e-5, 0
    config.compile.enable = True
    for key, value in MODES[mode].items():
        setattr(config.activation_checkpoint, key, value)
    trainer = Trainer(config)
    sizes = {tuple(x.shape) for x in trainer.model_parts[0].layers["0"].feed_forward.parameters()}
    if (shape["intermediate_size"], shape["hidden_size"]) not in sizes:
        raise RuntimeError(f"torchtitan rounds the MLP to {sizes}, not {shape['intermediate_size']}")
    batches, seconds = trainer.batch_generator(trainer.dataloader), []
    for _ in range(1 + options.steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.step += 1
        trainer.train_step(batches)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "device": torch.cuda.get_device_name(),
        "first_step_seconds": seconds[0],
        "seconds": seconds[1:],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "parameter_dtype": str(next(trainer.model_parts[0].parameters()).dtype).removeprefix("torch."),
    }


def figures(shape: LlamaConfig, length: int, microbatches: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Adds `tokens_per_second` and its MFU to the figures of `measure`."""
    rate = microbatches * length / statistics.median(measured["seconds"])
    mfu = model_flops_utilisation(rate, shape, length, measured["device"])
    return {**measured, "out_of_memory": False, "tokens_per_second": rate, "mfu": mfu}


def run_mode(mode: str, shape: LlamaConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Returns one mode's figures from a separate process, or `error` if it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figures.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--only", mode, "--json", str(path)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        sys.stderr.write(done.stderr)
        if done.returncode == 0:
            return figures(shape, options.length, options.microbatches, json.loads(path.read_text()))
    last = [line for line in done.stderr.splitlines() if "Error" in line]
    return {"out_of_memory": "OutOfMemoryError" in done.stderr, "error": last[-1] if last else "no message"}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="the configuration whose shape and window are taken")
    parser.add_argument("--length", type=int, help="tokens of a row (default: the configuration's window)")
    parser.add_argument("--microbatches", type=int, default=4, help="rows of a step, one at a time (default: 4)")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, after one that is not (default: 3)")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--only", choices=MODES, help=argparse.SUPPRESS)  # for its own subprocesses
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    options = parser.parse_args()
    config = load_config(["--config_path", options.config_path, "--model.path", "null"])
    options.length = config.window if options.length is None else options.length
    for name in ("length", "microbatches", "steps"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: a positive number is needed")
    if options.only:
        base = rotary_base(config.scheme.to_dict())
        found = measure(config.model.shape or {}, base, options.only, options)
        options.json.write_text(json.dumps(found))
        return
    shape = LlamaConfig.from_fields({**(config.model.shape or {}), "rope": config.scheme})
    report: dict[str, Any] = {
        **record("torchtitan_step"),
        "name": Path(options.config_path).stem,
        "length": options.length,
        "microbatches": options.microbatches,
        "modes": {},
    }
    for mode in options.modes:
        report["modes"][mode] = run_mode(mode, shape, options)
        print(f"{mode}: {report['modes'][mode]}", flush=True)
        write_json(options.json, report)


if __name__ == "__main__":
    run(main)
