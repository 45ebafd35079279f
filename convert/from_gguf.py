"""Converts a GGUF file to Hugging Face: python convert/from_gguf.py --src FILE --dst DIR [--dtype NAME]."""

import time

from eabf_jax.cli import ArgumentParser, run
from eabf_jax.interop.gguf import from_gguf


def main() -> None:
    parser = ArgumentParser(description="Converts a GGUF file of the LLaMA architecture to Hugging Face.")
    parser.add_argument("--src", required=True, help="the .gguf file, or any part of a split one")
    parser.add_argument("--dst", required=True, help="Hugging Face directory to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier call made at --dst, and nothing else"
    )
    options, start = parser.parse_args(), time.perf_counter()
    done = from_gguf(options.src, options.dst, dtype=options.dtype, overwrite=options.overwrite)
    print(f"{done.tensors} tensors, {done.nbytes:,} bytes, {time.perf_counter() - start:.1f} s -> {options.dst}")


run(main)
