"""Exported models in transformers: forward, cache and generate give our logits (the same checks run in 4.46)."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    runpy.run_path(str(HERE / "write_export_references.py"))["write"](root)
    return root


def test_every_scheme_in_the_installed_transformers(exported: Path) -> None:
    # A process of its own: transformers caches remote code by file name, and torch its number of threads.
    command = [sys.executable, str(HERE / "check_export_in_transformers.py"), str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("eager") == done.stdout.count("sdpa") == 10


def test_the_checks_can_fail(exported: Path) -> None:
    """Another window in the config must be noticed."""
    config = exported / "eabf" / "config.json"
    original = config.read_text()
    config.write_text(original.replace('"pretrained_window": 16', '"pretrained_window": 17'))
    check = runpy.run_path(str(HERE / "check_export_in_transformers.py"))["check"]
    try:
        with pytest.raises(AssertionError, match="logits differ by"):
            check(exported / "eabf", "eager")
    finally:
        config.write_text(original)
