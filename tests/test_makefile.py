import shlex
import subprocess
from pathlib import Path


def test_clean_removes_only_what_can_be_made_again():
    root = Path(__file__).parents[1]
    told = subprocess.run(["make", "-n", "clean"], cwd=root, capture_output=True, text=True, check=True).stdout
    removed = {word for line in told.splitlines() if line.startswith("rm ") for word in shlex.split(line)[2:]}
    assert {".venv", "demo", ".pytest_cache"} <= removed
    kept = {"runs", "data", "models", "exported", "/", ".", "*"}
    kept |= {"assets", "benchmarks", "configs", "convert", "docs", "eabf_jax", "tests", ".git"}
    assert removed.isdisjoint(kept)
