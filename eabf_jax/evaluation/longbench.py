"""LongBench as the paper runs it: its twelve tasks, and the averages that it reports."""

from collections.abc import Mapping
from statistics import fmean

# Name in lm-evaluation-harness -> name in LongBench, also that of its file. The order is the paper's.
TASKS = {
    "longbench_narrativeqa": "narrativeqa",
    "longbench_qasper": "qasper",
    "longbench_multifieldqa_en": "multifieldqa_en",
    "longbench_hotpotqa": "hotpotqa",
    "longbench_2wikimqa": "2wikimqa",
    "longbench_musique": "musique",
    "longbench_gov_report": "gov_report",
    "longbench_qmsum": "qmsum",
    "longbench_multi_news": "multi_news",
    "longbench_trec": "trec",
    "longbench_triviaqa": "triviaqa",
    "longbench_samsum": "samsum",
}
# Name of all twelve on the command line.
GROUP = "longbench12"
# Their metric, from 0 to 1; LongBench and the paper give it times 100.
METRIC = "score"
# Their prompts are lists of examples, which LongBench's own program never wraps in a chat template.
FEW_SHOT = ("longbench_trec", "longbench_triviaqa", "longbench_samsum")

# Macro averages of LLaMA-2-7B-Chat after 3,500 samples at 16,384 tokens, by window at evaluation: Zhang, Li and Liu,
# "Extending LLMs' Context Window with 100 Samples", arXiv 2401.07004. The paper has no figures by task for these.
PAPER = {
    "PI": {4096: 36.2, 8192: 36.9, 16384: 36.3, 32768: 28.4},
    "NTK-by-parts": {4096: 35.2, 8192: 36.6, 16384: 34.7, 32768: 28.5},
    "YaRN": {4096: 36.1, 8192: 36.6, 16384: 35.7, 32768: 28.6},
    "ABF": {4096: 36.5, 8192: 37.9, 16384: 38.6, 32768: 37.6},
    "EABF": {4096: 36.3, 8192: 38.1, 16384: 39.1, 32768: 39.1},
    "untouched": {4096: 33.0},
}
SOURCE = "LLaMA-2-7B-Chat, 3,500 samples at 16k: arXiv 2401.07004"
# The same by number of training samples, evaluated at 16,384 tokens; YaRN after 3,500 differs from the table above.
PAPER_BY_SAMPLES = {
    "PI": {32: 29.7, 100: 33.8, 1000: 36.1, 3500: 36.3},
    "NTK-by-parts": {32: 24.5, 100: 31.9, 1000: 34.5, 3500: 34.7},
    "YaRN": {32: 25.0, 100: 30.9, 1000: 35.2, 3500: 35.5},
    "ABF": {32: 26.4, 100: 35.1, 1000: 37.2, 3500: 38.6},
    "EABF": {32: 31.3, 100: 37.4, 1000: 38.3, 3500: 39.1},
}
# The paper's curricula, with EABF: scores on GovReport and on LongChat's line retrieval, for short and for long inputs.
PAPER_CURRICULA = {
    "chat model": {"GovReport, short": 30.84, "GovReport, long": 0.0, "lines, short": 76.0, "lines, long": 0.0},
    "1,000 of ShareGPT": {
        "GovReport, short": 34.10, "GovReport, long": 31.14, "lines, short": 88.0, "lines, long": 48.0,
    },
    "1,000 of ShareGPT, then long ones of the task": {
        "GovReport, short": 38.93, "GovReport, long": 35.56, "lines, short": 92.0, "lines, long": 66.0,
    },
}  # fmt: skip


def macro_average(scores: Mapping[str, float]) -> float | None:
    """Returns the mean over the twelve tasks, with equal weights; None if one of them is missing.

    Args:
      scores: by name in lm-evaluation-harness; other tasks are ignored.
    """
    return fmean(scores[task] for task in TASKS) if TASKS.keys() <= scores.keys() else None
