"""`eabf evaluate line-retrieval`: by length alone, for the line asked for lies anywhere."""

import functools

from eabf_jax.commands.evaluate import retrieval
from eabf_jax.evaluation import line_retrieval

TASK = retrieval.Task(
    "line retrieval",
    False,
    50,
    lambda tokenizer, arguments, lengths, depths: line_retrieval.prompts(
        tokenizer, lengths, arguments.samples, arguments.seed, chat=arguments.chat_template
    ),
)
add_arguments = functools.partial(retrieval.add_arguments, task=TASK)
run = functools.partial(retrieval.run, task=TASK)
