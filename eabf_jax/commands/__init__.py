"""The commands, a module each: `eabf evaluate line-retrieval` is `commands/evaluate/line_retrieval.py`.

A module has `add_arguments(parser)`, which declares the command line, and `run(arguments)`, which does the work, prints
and writes files. It is imported only when its command runs, so that `eabf --help` is quick.
"""

# What `eabf` can do, by name.
COMMANDS = {
    "prepare": "turn ShareGPT files into a dataset of tokens and loss masks",
    "train": "run a training configuration (the same as train.py)",
    "compile": "predict a train step's memory, or compile it for a TPU slice without a TPU",
    "generate": "continue texts, or keep a conversation",
    "evaluate": "measure models: perplexity, passkey, line-retrieval, harness; redraw a report",
}
# The kinds of `eabf evaluate`.
EVALUATIONS = {
    "perplexity": "loss by band of positions, or perplexity of sliding windows",
    "passkey": "find a number in a long text, at any length and depth",
    "line-retrieval": "find one line's number in a long record of lines",
    "harness": "tasks of lm-evaluation-harness, LongBench's first",
    "redraw": "table and picture of a report again, from its JSON file",
}
# The scripts of `convert/`.
CONVERSIONS = {
    "from_hf": "Converts a Hugging Face LLaMA directory to a native one, bit for bit.",
    "to_hf": "Exports a native model or run directory to a Hugging Face one.",
    "from_gguf": "Converts a GGUF file of the LLaMA architecture to Hugging Face.",
}
