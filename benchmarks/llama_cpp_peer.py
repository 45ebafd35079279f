"""Runs one GGUF file in llama.cpp; started by llama_cpp_parity.py with a Python that has llama-cpp-python.

python benchmarks/llama_cpp_peer.py JOB RESULT

JOB is a JSON file with `model`, `tokens`, `positions`, `prompts`, `new_tokens`, `texts` and `threads`. RESULT is the
.npz file to write: `logits` [positions, vocabulary], `greedy` [prompts, new tokens], `ids` (a JSON text: the tokens of
each text) and `version`.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def logits_at(llm: Any, tokens: Sequence[int], positions: Sequence[int]) -> Iterator[np.ndarray]:
    """Reads the tokens from the first on, and yields the logits after each of the positions, which ascend."""
    llm.reset()
    begin = 0
    for position in positions:
        llm.eval(tokens[begin : position + 1])
        begin = position + 1
        yield np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()


def greedy(llm: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Continues a prompt with the likeliest token, `count` times, whatever the token."""
    (row,) = logits_at(llm, prompt, [len(prompt) - 1])
    found = [int(row.argmax())]
    while len(found) < count:
        llm.eval(found[-1:])
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),))
        found.append(int(row.argmax()))
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    longest = max(len(job["tokens"]), *(len(prompt) + job["new_tokens"] for prompt in job["prompts"]))
    llm = llama_cpp.Llama(
        job["model"], n_ctx=longest, n_batch=512, n_threads=job["threads"], n_threads_batch=job["threads"],
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False,
    )  # fmt: skip
    np.savez(
        sys.argv[2],
        logits=np.stack(list(logits_at(llm, job["tokens"], job["positions"]))),
        greedy=np.array([greedy(llm, prompt, job["new_tokens"]) for prompt in job["prompts"]]),
        ids=json.dumps([llm.tokenize(text.encode(), add_bos=False, special=False) for text in job["texts"]]),
        version=llama_cpp.__version__,
    )


if __name__ == "__main__":
    main()
