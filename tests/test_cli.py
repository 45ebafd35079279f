import os
import subprocess
import sys

import pytest

from eabf_jax import cli
from eabf_jax.commands import COMMANDS, EVALUATIONS
from eabf_jax.errors import InputError


def run_fresh(code, **environment):
    """Runs Python code in a separate process."""
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=variables)


def exit_code(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    return stop.value.code


def test_help_names_the_commands_and_loads_neither_jax_nor_torch():
    code = (
        "import sys\n"
        "from eabf_jax.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    print('exit', stop.code)\n"
        "print('loaded', *({'jax', 'flax', 'orbax', 'torch', 'tensorflow_datasets', 'draccus'} & set(sys.modules)))"
    )
    found = run_fresh(code)
    *text, exit_line, loaded = found.stdout.splitlines()
    assert (exit_line, loaded.strip()) == ("exit 0", "loaded")
    for name, summary in COMMANDS.items():
        assert any(name in line and summary in line for line in text)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_a_help_that_describes_it(name, capsys):
    assert exit_code(name, "--help") == 0
    text = capsys.readouterr().out
    assert "usage:" in text
    expected = {"train": ["--recipe.learning_rate", "--config_path"], "prepare": ["--src", "--tokenizer"]}
    for option in expected.get(name, []):
        assert option in text


@pytest.mark.parametrize("name", list(EVALUATIONS))
def test_every_kind_of_evaluation_is_listed_and_has_a_help(name, capsys):
    assert exit_code("evaluate", "--help") == 0
    text = capsys.readouterr().out
    assert f"{name} " in text and EVALUATIONS[name] in text
    assert exit_code("evaluate", name, "--help") == 0
    text = capsys.readouterr().out
    assert f"usage: eabf evaluate {name}" in text
    options = ["FILE" if name == "redraw" else "--model", "--json", "--output" if name == "harness" else "--figure"]
    assert all(option in text for option in options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "paskey"), "unknown evaluation 'paskey': did you mean 'passkey'"),
        ((), "required: COMMAND"),
        (("trian",), "unknown command 'trian': did you mean 'train'?"),
        (("prepare", "--src", "a.json"), "--dst, --tokenizer; `eabf prepare --help` lists the options"),
        (("evaluate", "perplexity", "--model", "nowhere", "--data", "nowhere"), "nowhere"),
        (
            ("evaluate", "redraw", "x.json", "--jsn", "y"),
            "unrecognized arguments: --jsn y; `eabf evaluate redraw",
        ),
        (("evaluate", "redraw", "x.json", "--figure", "x.doc"), "expected one of .png"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert exit_code(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("error: ") and message in line


def test_exit_statuses(capsys):
    def fail(error):
        def command():
            raise error

        with pytest.raises(SystemExit) as stop:
            cli.run(command)
        return stop.value.code, capsys.readouterr().err

    assert fail(InputError("two\nlines")) == (2, "error: two lines\n")
    assert fail(KeyboardInterrupt()) == (130, "interrupted\n")
    code, shown = fail(OSError(28, "No space left on device", "runs/x/metrics.jsonl"))
    assert (code, shown) == (2, "error: no space left on the device that holds runs/x/metrics.jsonl\n")
    code, shown = fail(OSError(122, "Disk quota exceeded"))
    assert (code, shown) == (2, "error: disk quota exceeded on the device that holds the output\n")
    code, shown = fail(NotADirectoryError(20, "Not a directory", "file/run"))
    assert code == 2 and shown.startswith("error: file/run: Not a directory;")
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: None)
    assert stop.value.code == 0
    # An error that is not the user's fault keeps its traceback.
    with pytest.raises(PermissionError):
        cli.run(lambda: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    program = "from eabf_jax.cli import run\nrun(lambda: [print('line', flush=True) for _ in range(100_000)])"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""


def test_module_and_script_are_the_command():
    module = subprocess.run([sys.executable, "-m", "eabf_jax", "--help"], capture_output=True, text=True, check=True)
    assert "commands:" in module.stdout
    script = subprocess.run([sys.executable, "train.py", "--windw", "3"], capture_output=True, text=True, check=False)
    assert script.returncode == 2
    assert "did you mean 'window'" in script.stderr and "Traceback" not in script.stderr
