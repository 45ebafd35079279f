"""Runs of several processes on one machine, which connect and exchange arrays over loopback."""

import re
import shutil
import socket
import time

import jax
import numpy as np
import pytest
import yaml

from eabf_jax.interop.loading import load_parameters
from eabf_jax.training.trainer import train

# As in test_step: with the usual epsilon, Adam takes a full step for a gradient that is only rounding.
RECIPE = {"batch_size": 8, "learning_rate": 1e-2, "epsilon": 1e-3}
STEPS = 6
# A `train.py` that logs the records it reads.
COUNTED = """
import sys
from eabf_jax.cli import main
from eabf_jax.data.dataset import Records

read = Records.__getitem__

def counted(self, index):
    with open(sys.argv[1], "a") as file:
        file.write(f"{index}\\n")
    return read(self, index)

Records.__getitem__ = counted
main(["train", *sys.argv[2:]])
"""


class Group:
    """The processes of one run."""

    def __init__(self, fork, *commands, devices=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.processes = [
            fork(
                *command,
                devices=devices,
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES=str(len(commands)),
                JAX_PROCESS_ID=str(number),
            )
            for number, command in enumerate(commands)
        ]

    def wait(self, condition):
        deadline = time.monotonic() + 200
        while not condition():
            ended = [process for process in self.processes if process.poll() is not None]
            assert not ended and time.monotonic() < deadline, self.ended()
            time.sleep(0.01)

    def ended(self):
        """Returns exit status, output and error output of each process."""
        try:
            told = [process.communicate(timeout=200) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, *texts) for process, texts in zip(self.processes, told, strict=True)]


@pytest.fixture(scope="module")
def trained(config_file, fork, train_py):
    """Starts a training run in several processes."""

    def start(path, output, count, *arguments, devices=1, prefix=None, **changes):
        values = {"recipe": {**RECIPE, "steps": STEPS}, "checkpoint": {"every_steps": None}, **changes}
        config = config_file(path, output, **values)
        command = ("--config_path", config, "--distributed", "true", *arguments)
        prefixes = prefix or (lambda number: (train_py,))
        return Group(fork, *((*prefixes(number), *command) for number in range(count)), devices=devices)

    return start


@pytest.fixture(scope="module")
def alone(run_config, tmp_path_factory):
    """Runs the same training in one process with eight devices."""

    def run(**changes):
        rope = {"type": "eabf", "base": 50_000.0, "pretrained_window": 32}
        values = {"recipe": {**RECIPE, "steps": STEPS}, "checkpoint": {"every_steps": None}, **changes}
        return train(run_config(tmp_path_factory.mktemp("alone") / "run", rope=rope, **values))

    return run


@pytest.fixture(scope="module")
def whole(alone):
    return alone()


@pytest.fixture
def same_run(read_metrics, params):
    def compare(found, expected, steps=STEPS):
        lines, wanted = read_metrics(found), read_metrics(expected)
        assert [line["step"] for line in lines] == [line["step"] for line in wanted] == list(range(1, steps + 1))
        assert [line["trained_tokens"] for line in lines] == [line["trained_tokens"] for line in wanted]
        for name in ("loss", "gradient_norm"):
            # Sums in another order: roundings of 1e-7 in hundreds of sums, carried over the steps.
            np.testing.assert_allclose([m[name] for m in lines], [m[name] for m in wanted], rtol=2e-5, err_msg=name)
        trees = (*(load_parameters(run)[1] for run in (found, expected)), params)
        for leaf, other, start in zip(*map(jax.tree.leaves, trees), strict=True):
            # Per step, rate x gradient's rounding / epsilon = 1e-2 x 1e-6 / 1e-3, on entries of order one.
            np.testing.assert_allclose(leaf, other, rtol=0, atol=steps * 1e-5)
            assert np.abs(leaf - start).max() > 100 * steps * 1e-5

    return compare


def test_four_processes_stop_together_and_others_go_on(trained, whole, same_run, read_metrics, run_config, tmp_path):
    """Four processes share each row and product; a signal to one stops all. Two resume; one resumes a copy alone.

    They read the checkpoints on other meshes, with other numbers of processes and with the other executor.
    """
    run = tmp_path / "run"
    group = trained(tmp_path / "four.yaml", run, 4, "--mesh.context", "2", "--mesh.tensor", "2")
    metrics = run / "metrics.jsonl"
    group.wait(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
    group.processes[2].terminate()
    ended = group.ended()
    last = [err.splitlines()[-1] for _, _, err in ended]
    stopped = re.fullmatch(r"stopped by a signal after step (\d+) of 6; run it again .*", last[0])
    assert stopped, ended
    assert (set(last), {status for status, *_ in ended}) == ({last[0]}, {3})
    step = stopped[1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [step]
    for number in range(4):
        for item in ("params", "optimizer"):
            written = run / "checkpoints" / step / item / f"ocdbt.process_{number}" / "d"
            assert sum(path.stat().st_size for path in written.iterdir()) > 0
    # Only the first process reports steps; the others only say why they stop.
    assert [len(err.splitlines()) for _, _, err in ended] == [int(step) + 2, 1, 1, 1]
    assert len(read_metrics(run)) == int(step)
    shutil.copytree(run, tmp_path / "copy")

    sizes = ("--mesh.data", "2", "--mesh.fsdp", "2")
    group = trained(tmp_path / "two.yaml", run, 2, *sizes, "--compute.executor", "layerwise", devices=2)
    ended = group.ended()
    assert [status for status, *_ in ended] == [0, 0], ended
    assert [out.count("finished;") for _, out, _ in ended] == [1, 0]
    assert yaml.safe_load((run / "config.yaml").read_text())["mesh"]["context"] == 2  # as when the run began
    same_run(run, whole)

    written = (tmp_path / "copy" / "config.yaml").read_text()
    (tmp_path / "copy" / "config.yaml").write_text(written.replace(str(run), str(tmp_path / "copy")))
    rope = {"type": "eabf", "base": 50_000.0, "pretrained_window": 32}
    train(
        run_config(
            tmp_path / "copy",
            rope=rope,
            recipe={**RECIPE, "steps": STEPS},
            compute={"optimizer_memory": "host", "executor": "layerwise", "remat": "offload:1,qkv"},
            mesh={"fsdp": 4, "tensor": 2},
        )
    )
    same_run(tmp_path / "copy", whole)


def test_each_process_reads_its_own_rows_only(trained, alone, same_run, write_dataset, tmp_path):
    data = {"directory": str(write_dataset(tmp_path / "set", records=96))}
    recipe = {**RECIPE, "steps": 3}

    def noting(number):
        return COUNTED, tmp_path / f"reads{number}"

    group = trained(tmp_path / "config.yaml", tmp_path / "run", 2, prefix=noting, data=data, recipe=recipe)
    ended = group.ended()
    assert [status for status, *_ in ended] == [0, 0], ended
    reads = [(tmp_path / f"reads{number}").read_text().split() for number in range(2)]
    # At least three steps of four rows, and rows read ahead; half an epoch is 48 rows.
    assert all(12 <= len(rows) == len(set(rows)) < 48 for rows in reads)
    assert not set(reads[0]) & set(reads[1])
    same_run(tmp_path / "run", alone(data=data, recipe=recipe), steps=3)


def test_what_is_missing_on_one_is_told_there_and_ends_both(trained, train_py, tmp_path):
    def command(number):
        return (train_py, "--data.directory", "nowhere") if number else (train_py,)

    began = time.monotonic()
    first, second = trained(tmp_path / "config.yaml", tmp_path / "run", 2, prefix=command).ended()
    assert time.monotonic() - began < 100  # JAX alone would wait for five minutes
    assert (first[0], second[0]) == (2, 2)
    assert first[2] == "error: process 0 stops because 1 of 2 cannot start, and says why\n"
    assert re.fullmatch("error: nowhere is not a prepared dataset.*\n", second[2])
    assert not (tmp_path / "run").exists()
