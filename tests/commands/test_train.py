"""`eabf train`: its help and errors; tests/training tests the training."""

import pytest

from eabf_jax import cli


def test_help_lists_the_configurations_keys(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: train.py --config_path FILE")
    assert "--recipe.learning_rate" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config_path", "nowhere.yaml"), "cannot read the configuration 'nowhere.yaml'"),
        (("--windw", "3"), "unknown configuration key 'windw': did you mean 'window'"),
        ((), "configuration key 'output' is missing"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *arguments])
    shown = capsys.readouterr()
    assert (stop.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert shown.err.startswith("error: ") and message in shown.err
