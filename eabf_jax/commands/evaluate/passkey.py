"""`eabf evaluate passkey`: a grid of lengths and depths."""

import functools

from eabf_jax.commands.evaluate import retrieval
from eabf_jax.evaluation import passkey

TASK = retrieval.Task(
    "passkey",
    True,
    10,
    lambda tokenizer, arguments, lengths, depths: passkey.prompts(
        tokenizer, lengths, depths, arguments.samples, arguments.seed, chat=arguments.chat_template
    ),
)
add_arguments = functools.partial(retrieval.add_arguments, task=TASK)
run = functools.partial(retrieval.run, task=TASK)
