"""Measures the time and memory of attention entropies of one document, at the size of a real model.

    python benchmarks/attention_entropy.py --config configs/smollm2_135m_eabf_32k.yaml --json OUT.json

The model has the configuration's shape, window and scheme, and random weights. The first pass compiles; the figures are
those of the passes after it.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from provenance import commit

from eabf_jax.analysis.attention_entropy import entropies
from eabf_jax.cli import ArgumentParser, run
from eabf_jax.commands.entropy import default_edges
from eabf_jax.commands.evaluate import measured_on
from eabf_jax.evaluation.scorer import evaluation_mesh
from eabf_jax.interop.directory import write_json
from eabf_jax.model.llama import Llama
from eabf_jax.parallel.mesh import gpu_memory_defaults
from eabf_jax.parallel.rules import moved
from eabf_jax.training.recipe import load_config
from eabf_jax.training.trainer import extended_config


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration with model.shape")
    parser.add_argument("--repeats", type=int, default=3, help="passes after the first (default: %(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    arguments = parser.parse_args()
    gpu_memory_defaults()
    config = load_config([f"--config_path={arguments.config}"])
    shape = extended_config(config)
    make = jax.jit(lambda: nnx.state(Llama(shape, rngs=nnx.Rngs(0), dtype="bfloat16", param_dtype="bfloat16")))
    params = nnx.to_pure_dict(make())
    model = Llama.from_params(shape, params, dtype="bfloat16", param_dtype="bfloat16")
    model = moved(model, evaluation_mesh(shape, "bfloat16"))
    del params
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (jax.device_count(), config.window))
    edges = default_edges(config.window, shape.max_position_embeddings)
    seconds = []
    for _ in range(1 + arguments.repeats):
        began = time.perf_counter()
        found = entropies(model, tokens, edges)
        seconds.append(time.perf_counter() - began)
    memory = jax.devices()[0].memory_stats() or {}
    figures = {
        **measured_on(),
        "commit": commit(),
        "config": arguments.config,
        "tokens": config.window,
        "documents_at_a_time": len(tokens),
        "layers_heads": list(found.means.shape[1:3]),
        "first_pass_seconds": seconds[0],
        "seconds": seconds[1:],
        "peak_gib": memory.get("peak_bytes_in_use", 0) / 2**30 or None,
    }
    write_json(arguments.json, figures)
    print(figures)


if __name__ == "__main__":
    run(main)
