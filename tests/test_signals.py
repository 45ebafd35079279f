"""SIGTERM and Ctrl-C while a command runs, each in a process of its own."""

import signal
import subprocess
import sys
import time

import pytest

# Writes a partial directory, says so, and computes.
COMMAND = """
import hashlib, sys, time
from eabf_jax.cli import run
from eabf_jax.interop.directory import new_directory

def wait():
    time.sleep(60)

def compute():  # one call of C code, during which no Python handler runs
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def command():
    with new_directory(sys.argv[1]) as partial:
        (partial / "weights").write_text("half")
        print("begun", flush=True)
        {work}()

run(command)
"""


def _heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def started(tmp_path):
    """Starts the command in a process whose destination is `tmp_path / "x"`, and waits until it works."""
    processes = []

    def start(work):
        command = [sys.executable, "-c", COMMAND.format(work=work), str(tmp_path / "x")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # Where a shell runs the tests in the background, they ignore Ctrl-C.
        process = subprocess.Popen(command, **pipes, text=True, preexec_fn=_heed_interrupts)
        processes.append(process)
        assert process.stdout.readline() == "begun\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "status", "line"), [(signal.SIGTERM, 143, "terminated\n"), (signal.SIGINT, 130, "interrupted\n")]
)
def test_a_signal_ends_the_command_and_leaves_nothing(started, tmp_path, number, status, line):
    process = started("wait")
    process.send_signal(number)
    if number == signal.SIGTERM:
        process.send_signal(number)  # as `timeout` does
    assert process.communicate(timeout=30)[1] == line
    assert process.returncode == status
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(started, number):
    process = started("compute")
    time.sleep(0.3)
    process.terminate()
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=5) == 128 + number


def test_what_a_killed_process_left_is_removed_by_the_next_and_not_while_it_lives(started, tmp_path):
    first = started("wait")
    second = started("wait")
    assert len(list(tmp_path.iterdir())) == 2
    first.kill()
    first.wait()
    assert len(list(tmp_path.iterdir())) == 2
    third = started("wait")
    assert len(list(tmp_path.iterdir())) == 2  # those of the second and the third
    for process in (second, third):
        process.terminate()
        process.wait(timeout=30)
    assert list(tmp_path.iterdir()) == []
