"""Pictures are drawn whole, with a line for every model."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import imread

from eabf_jax.analysis.figures import loss_by_position


def test_lines_hold_the_binned_means_and_the_file_is_a_picture(tmp_path: Path, monkeypatch) -> None:
    drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    plot = Axes.plot

    def record(self: Axes, x, y, **options):
        drawn[options["label"]] = (np.asarray(x), np.asarray(y))
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", record)
    # 64 positions with a loss, in 4 bins of 16: the means are known by hand.
    rising = np.tile(np.arange(64, dtype=np.float32), (3, 1))
    path = tmp_path / "loss.png"
    loss_by_position({"rising": rising, "flat": np.ones((2, 64))}, path, pretrained_window=32, title="t", bins=4)
    np.testing.assert_allclose(drawn["rising"][0], [8.5, 24.5, 40.5, 56.5])
    np.testing.assert_allclose(drawn["rising"][1], [7.5, 23.5, 39.5, 55.5])
    np.testing.assert_allclose(drawn["flat"][1], np.ones(4))
    assert imread(path).std() > 0.01
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]
