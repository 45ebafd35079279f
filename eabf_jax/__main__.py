"""Runs the `eabf` command as `python -m eabf_jax`."""

from eabf_jax.cli import main

main()
