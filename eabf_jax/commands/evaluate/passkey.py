"""`eabf evaluate passkey`: a grid of lengths and depths."""

import functools

from eabf_jax.commands.evaluate import retrieval
from eabf_jax.evaluation import passkey

TASK = retrieval.Task("passkey", has_depths=True, samples=10, prompts=passkey.prompts)
add_arguments = functools.partial(retrieval.add_arguments, task=TASK)
run = functools.partial(retrieval.run, task=TASK)
