"""The picture of docs/multipliers.md shows the formulas, and the page names every rule."""

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from eabf_jax.rope import registry

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program(load_program):
    return load_program("plot_multipliers")


def test_the_lines_are_the_formulas(program):
    c, s = program.WINDOW, program.FACTOR
    i = np.array([c // 4, c, c + 1, 2 * c, 3 * c + 7, s * c])
    log = np.log(np.maximum(i / c, 1))
    stair = np.log(1 + (i - 1) // c)
    expected = {
        f"YaRN, factor {s}": np.full(len(i), (0.1 * math.log(s) + 1) ** 2),
        "dynamic YaRN, at the end of a text": (0.1 * log + 1) ** 2,
        f"LongRoPE, factor {s}": np.full(len(i), 1 + math.log(s) / math.log(c)),
        "llama4_temperature, beta 0.1 (Llama 4, Ministral 3)": 1 + 0.1 * stair,
        "smooth_temperature, beta 0.1": 1 + 0.1 * log,
        "ssmax, scaling 1 / ln c": np.log(i) / math.log(c),
        "eabf_stair": 1 + stair / math.log(c),
        "EABF, logn": 1 + log / math.log(c),
    }
    found = program.curves(i)
    assert found.keys() == expected.keys()
    for label, values in expected.items():
        np.testing.assert_allclose(found[label], values, rtol=1e-6, err_msg=label)  # float32


def test_the_picture_is_drawn(program, tmp_path, monkeypatch, capsys):
    path = tmp_path / "multipliers.png"
    monkeypatch.setattr(program, "curves", lambda i: {name: np.sqrt(i + k) for k, name in enumerate("abc")})
    monkeypatch.setattr("sys.argv", ["plot", "--out", str(path)])
    program.main()
    assert matplotlib.image.imread(path).std() > 0.01 and capsys.readouterr().out == f"wrote {path}\n"


@pytest.mark.document_check
def test_the_page_names_every_multiplier(program):
    page = (ROOT / "docs/multipliers.md").read_text()
    assert [name for name in registry._MULTIPLIERS if name != "none" and f"`{name}`" not in page] == []
    assert "](multipliers.png)" in page and program.PICTURE.is_file()
    for beta, window in (("0.120", 4096), ("0.111", 8192), ("0.103", 16_384)):
        assert f"{1 / math.log(window):.3f}" == beta and beta in page
    assert f"{1 / math.log(4096)!r}" in page
    assert f"{math.log(2) / math.log(4096):.3f}" == "0.083"
