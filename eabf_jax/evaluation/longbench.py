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


def macro_average(scores: Mapping[str, float]) -> float | None:
    """Returns the mean over the twelve tasks, with equal weights; None if one of them is missing.

    Args:
      scores: by name in lm-evaluation-harness; other tasks are ignored.
    """
    return fmean(scores[task] for task in TASKS) if TASKS.keys() <= scores.keys() else None
