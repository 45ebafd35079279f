"""`python -m eabf_jax` is the `eabf` command."""

from eabf_jax.cli import main

main()
