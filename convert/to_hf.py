"""Exports a model or run to Hugging Face: python convert/to_hf.py --src DIR --dst DIR [--step N] [--dtype NAME]."""

import time

from eabf_jax.cli import ArgumentParser, run
from eabf_jax.interop.huggingface import to_hf


def main() -> None:
    parser = ArgumentParser(description="Exports a native model or run directory to a Hugging Face one.")
    parser.add_argument("--src", required=True, help="native model or run directory (model.json, checkpoints/)")
    parser.add_argument("--dst", required=True, help="Hugging Face directory to make")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier call made at --dst, and nothing else"
    )
    parser.add_argument("--step", type=int, help="which checkpoint; the latest if not given")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="as stored if not given")
    parser.add_argument("--base", help="of adapters: the model they belong to, if it is not where it was")
    o, start = parser.parse_args(), time.perf_counter()
    done = to_hf(o.src, o.dst, overwrite=o.overwrite, step=o.step, dtype=o.dtype, base=o.base)
    print(f"{done.tensors} tensors, {done.nbytes:,} bytes, {time.perf_counter() - start:.1f} s -> {o.dst}")


run(main)
