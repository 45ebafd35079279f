"""Compares our model class in lm-evaluation-harness with its Hugging Face backend: same requests, same results.

python benchmarks/harness_parity.py --model DIR --json benchmarks/results/harness_parity_smollm2_cpu.json

DIR is a Hugging Face directory, for example SmolLM2-135M-Instruct converted by `python convert/from_gguf.py`. The tasks
are LongBench's twelve as the harness defines them, on our own short documents, and local tasks for log-likelihoods.
Prompts are in the model's chat template where LongBench uses one. Both backends run greedily in float32.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ("local_choice", "local_last_word", "local_rolling")
# A window for scoring that some texts exceed, so that they need several windows.
WINDOW = 2048


def measure(model: Path) -> dict[str, Any]:
    """Runs every task with both backends.

    Args:
      model: a Hugging Face directory.

    Returns:
      For each task, the scores of both, and how closely the answers to its requests agree.
    """
    import lm_eval
    import transformers
    from lm_eval.models.huggingface import HFLM

    from eabf_jax.commands.evaluate.harness import evaluate, load_tasks
    from eabf_jax.evaluation.harness import EabfLM
    from eabf_jax.evaluation.longbench import GROUP

    os.chdir(ROOT)  # the task files name their documents relative to it
    tasks_of = "tests/evaluation/harness_tasks"
    arguments = argparse.Namespace(apply_chat_template=True, num_fewshot=None, limit=None, include_path=tasks_of)
    names = (GROUP, *LOCAL)
    results = {}
    for backend, lm in (
        ("ours", EabfLM(str(model), dtype="float32", window=WINDOW)),
        ("hf", HFLM(pretrained=str(model), device="cpu", dtype="float32", max_length=WINDOW)),
    ):
        tasks = load_tasks(names, tasks_of, "tests/evaluation/longbench")
        found = evaluate(lm, tasks, arguments)
        results[backend] = {
            task: (figures, samples)
            for result in found
            for task, figures, samples in (
                (task, result["results"][task], result["samples"][task]) for task in result["samples"]
            )
        }
    rows = [_compared(task, results["ours"][task], results["hf"][task]) for task in results["hf"]]
    return {
        "model": model.name,
        "dtype": "float32",
        "window": WINDOW,
        "equal": all(row["equal"] for row in rows),
        "versions": {"lm-eval": lm_eval.__version__, "transformers": transformers.__version__},
        "tasks": rows,
    }


def _compared(
    task: str, ours: tuple[dict[str, Any], list[Any]], theirs: tuple[dict[str, Any], list[Any]]
) -> dict[str, Any]:
    metrics = {
        key.removesuffix(",none"): (ours[0][key], value)
        for key, value in theirs[0].items()
        if key.endswith(",none") and "_stderr" not in key
    }
    answers = [
        (mine, reference)
        for own, other in zip(ours[1], theirs[1], strict=True)
        for (mine,), (reference,) in zip(own["resps"], other["resps"], strict=True)
    ]
    same_requests = all(own["arguments"] == other["arguments"] for own, other in zip(ours[1], theirs[1], strict=True))
    row: dict[str, Any] = {"task": task, "requests": len(answers), "same_requests": same_requests}
    if isinstance(answers[0][0], str):
        row["same_texts"] = sum(mine == reference for mine, reference in answers)
        row["equal"] = same_requests and row["same_texts"] == len(answers)
    else:
        pairs = [
            (mine, reference) if isinstance(mine, tuple) else ((mine,), (reference,)) for mine, reference in answers
        ]
        row["largest_difference"] = max(abs(mine[0] - reference[0]) for mine, reference in pairs)
        row["log_likelihoods"] = [reference[0] for _, reference in pairs]
        # The tolerance covers float32 sums over up to a few hundred tokens in different order.
        row["equal"] = same_requests and all(
            mine[1:] == reference[1:] and abs(mine[0] - reference[0]) <= 2e-5 * max(1, abs(reference[0]))
            for mine, reference in pairs
        )
    row["scores"] = {name: {"ours": mine, "hf": reference} for name, (mine, reference) in metrics.items()}
    print(f"{'equal' if row['equal'] else 'DIFFERENT'}: {task}, {len(answers)} requests", flush=True)
    return row


def main() -> None:
    from eabf_jax.interop.directory import write_json
    from eabf_jax.parallel.mesh import use_every_core

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    json = arguments.json and arguments.json.absolute()
    use_every_core()
    figures = measure(arguments.model.absolute())
    if json:
        write_json(json, figures)
    if not figures["equal"]:
        sys.exit("the answers differ")


if __name__ == "__main__":
    from eabf_jax.cli import run

    run(main)
