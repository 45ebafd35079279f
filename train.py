"""Extends a model's context window: python train.py --config_path configs/llama2_7b_eabf_16k.yaml [--any.key value]."""

import sys

from eabf_jax.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
