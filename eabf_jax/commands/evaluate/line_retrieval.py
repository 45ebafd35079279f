"""`eabf evaluate line-retrieval`: by length only, because the place of the line is random."""

import functools

from eabf_jax.commands.evaluate import retrieval
from eabf_jax.evaluation import line_retrieval

TASK = retrieval.Task("line retrieval", has_depths=False, samples=50, prompts=line_retrieval.prompts)
add_arguments = functools.partial(retrieval.add_arguments, task=TASK)
run = functools.partial(retrieval.run, task=TASK)
