"""Converts a Hugging Face directory to a native one: python convert/from_hf.py --src DIR --dst DIR [--overwrite]."""

import time

from eabf_jax.cli import ArgumentParser, run
from eabf_jax.interop.huggingface import from_hf


def main() -> None:
    parser = ArgumentParser(description="Converts a Hugging Face LLaMA directory to a native one, bit for bit.")
    parser.add_argument("--src", required=True, help="directory with config.json and safetensors files")
    parser.add_argument("--dst", required=True, help="native model directory to make")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier call made at --dst, and nothing else"
    )
    options, start = parser.parse_args(), time.perf_counter()
    done = from_hf(options.src, options.dst, overwrite=options.overwrite)
    print(f"{done.tensors} tensors, {done.nbytes:,} bytes, {time.perf_counter() - start:.1f} s -> {options.dst}")


run(main)
