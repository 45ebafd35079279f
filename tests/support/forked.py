"""Programs in processes of their own, without the seconds that importing JAX takes."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The program of a process forked after the imports. Such a process would end without the functions registered
# with `atexit`, in which the processes of a run disconnect.
FORKED = """
import atexit, os, sys
for number, path in enumerate(outputs, 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
os.environ.clear()
os.environ.update(environment)
os.chdir(root)
sys.argv = ["train.py", *arguments]
try:
    exec(program, {"__name__": "__main__"})
finally:
    atexit._run_exitfuncs()
"""


class Forked:
    """A process like `subprocess.Popen`, without the seconds that importing JAX takes."""

    def __init__(self, context, folder, program, arguments, environment):
        self.outputs = [folder / "out", folder / "err"]
        told = {"root": ROOT, "program": program, "arguments": arguments, "environment": environment}
        self.process = context.Process(target=exec, args=(FORKED, {"outputs": self.outputs, **told}))
        self.process.start()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def terminate(self):
        self.process.terminate()

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired("train.py", timeout, *(path.read_text() for path in self.outputs))
        return tuple(path.read_text() for path in self.outputs)
