"""The commands, one module each: `eabf evaluate line-retrieval` is `commands/evaluate/line_retrieval.py`.

In a module, `add_arguments(parser)` declares the command line, and `run(arguments)` does the work, prints and writes
files. A module is imported only when its command runs, so that `eabf --help` is quick.
"""

# The commands of `eabf`.
COMMANDS = {
    "prepare": "turn conversations or texts into a dataset of tokens and loss masks",
    "train": "run a training configuration (the same as train.py)",
    "compile": "predict a train step's memory, or compile it for a TPU slice without a TPU",
    "generate": "continue texts, or hold a conversation",
    "evaluate": "measure models: perplexity, passkey, line-retrieval, harness; redraw a report",
    "entropy": "measure attention entropy by layer, head and position",
    "suggest": "choose base and logit multiplier for a model and a window, by held-out loss",
    "verify": "compare the files of checkpoints and models with their checksums",
    "study": "train and measure methods x data x seeds, and report on them",
}
# The kinds of `eabf evaluate`.
EVALUATIONS = {
    "perplexity": "loss by band of positions, or perplexity of sliding windows",
    "passkey": "find a number in a long text, at any length and depth",
    "line-retrieval": "find one line's number in a long record of lines",
    "harness": "tasks of lm-evaluation-harness, such as LongBench's",
    "redraw": "draw the table and picture of a report again, from its JSON file",
}
# The scripts of `convert/`.
CONVERSIONS = {
    "from_hf": "Converts a Hugging Face LLaMA directory to a native one, bit for bit.",
    "to_hf": "Exports a native model or run directory to a Hugging Face one.",
    "from_gguf": "Converts a GGUF file to Hugging Face.",
    "to_gguf": "Converts a Hugging Face, native model or run directory to a GGUF file.",
}
