"""The table of LongBench's tasks against lm-evaluation-harness' own files, and their mean."""

import re
from pathlib import Path

import lm_eval.tasks

from eabf_jax.evaluation import longbench

FILES = Path(lm_eval.tasks.__file__).parent / "longbench"


def values(text: str, key: str) -> list[str]:
    return re.findall(rf"^ *(?:- )?{key}: *['\"]?(\w+)", text, re.MULTILINE)


def test_tasks_are_the_harness_files_of_english_text() -> None:
    """They are all of its English tasks, except code and synthetic ones."""
    kinds = {kind: f"longbench_{kind}_tasks" for kind in ("single", "multi", "summarization", "fewshot")}
    chinese = {"multifieldqa_zh", "dureader", "vcsum", "lsht"}
    found, few_shot = {}, set()
    for path in FILES.glob("[!_]*.yaml"):
        text = path.read_text()
        (task,), (name,) = values(text, "task"), values(text, "dataset_name")
        if name not in chinese and any(f"- {tag}\n" in text for tag in kinds.values()):
            found[task] = name
            assert longbench.METRIC in values(text, "metric")
            if f"- {kinds['fewshot']}\n" in text:
                few_shot.add(task)
    assert found == longbench.TASKS
    assert few_shot == set(longbench.FEW_SHOT)


def test_the_mean_is_over_all_twelve() -> None:
    scores = {task: 2.0**number for number, task in enumerate(longbench.TASKS)}
    assert longbench.macro_average({**scores, "another": 1e9}) == (2**12 - 1) / 12
    for task in longbench.TASKS:
        assert longbench.macro_average({name: score for name, score in scores.items() if name != task}) is None


def test_the_papers_tables_agree_where_they_overlap() -> None:
    """Both have 3,500 samples at 16,384 tokens; YaRN is 35.7 in one and 35.5 in the other."""
    for method, by_samples in longbench.PAPER_BY_SAMPLES.items():
        assert abs(by_samples[3500] - longbench.PAPER[method][16384]) < (0.21 if method == "YaRN" else 1e-9)
        assert list(by_samples) == [32, 100, 1000, 3500]
    assert max(longbench.PAPER_BY_SAMPLES, key=lambda method: longbench.PAPER_BY_SAMPLES[method][100]) == "EABF"
