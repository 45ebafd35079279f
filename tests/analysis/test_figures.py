"""Pictures are drawn whole, with a line for every model."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import imread

from eabf_jax.analysis.figures import heat_maps, loss_by_position, perplexity_by_window, share_by_length
from eabf_jax.evaluation.intervals import Share
from eabf_jax.evaluation.perplexity import WindowPerplexity
from eabf_jax.evaluation.retrieval import Cell


def test_lines_hold_the_binned_means_and_the_file_is_a_picture(tmp_path: Path, monkeypatch) -> None:
    drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    plot = Axes.plot

    def record(self: Axes, x, y, **options):
        drawn[options["label"]] = (np.asarray(x), np.asarray(y))
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", record)
    bands: list[tuple[np.ndarray, np.ndarray]] = []
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, low, high, **_: bands.append((low, high)))
    # 64 positions with a loss, in 4 bins of 16: the means are known by hand.
    rising = np.tile(np.arange(64, dtype=np.float32), (3, 1))
    path = tmp_path / "loss.png"
    loss_by_position({"rising": rising, "flat": np.ones((2, 64))}, path, pretrained_window=32, title="t", bins=4)
    np.testing.assert_allclose(drawn["rising"][0], [8.5, 24.5, 40.5, 56.5])
    np.testing.assert_allclose(drawn["rising"][1], [7.5, 23.5, 39.5, 55.5])
    np.testing.assert_allclose(drawn["flat"][1], np.ones(4))
    # All documents of a model are alike here: the interval has no width.
    np.testing.assert_allclose(bands[0], [drawn["rising"][1]] * 2)
    assert imread(path).std() > 0.01
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]


def test_bands_hold_the_intervals(tmp_path: Path, monkeypatch) -> None:
    bands: dict[tuple[float, ...], tuple[list[float], list[float]]] = {}
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, low, high, **_: bands.update({tuple(x): (low, high)}))
    windows = [WindowPerplexity(n, 64, 0.0, 0.0, 3.0 + n, 2.0 + n, 5.0 + n) for n in (128, 256)]
    perplexity_by_window({"a": windows}, tmp_path / "windows.png")
    assert bands.pop((128, 256)) == ([130.0, 258.0], [133.0, 261.0])
    share_by_length({"a": {1024: Share(1, 4, 0.125, 0.5)}}, tmp_path / "shares.png", pretrained_window=512)
    assert bands.pop((1024,)) == ([12.5], [50.0])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["shares.png", "windows.png"]


def test_heat_maps_show_each_cell_in_its_place(tmp_path: Path, monkeypatch) -> None:
    shown: list[np.ndarray] = []
    draw = Axes.imshow

    def record(self: Axes, values, **options):
        shown.append(np.asarray(values))
        return draw(self, values, **options)

    monkeypatch.setattr(Axes, "imshow", record)
    cells = [
        Cell(n, d, hits, 4, 0.0, 1.0, 0.5) for n, d, hits in ((256, 0, 4), (256, 90, 3), (512, 0, 1), (512, 90, 0))
    ]
    heat_maps({f"model {n}": cells for n in range(6)}, tmp_path / "maps.png", pretrained_window=256, title="t")
    assert len(shown) == 6
    np.testing.assert_array_equal(shown[0], [[100, 25], [75, 0]])  # depths down, lengths across
    assert imread(tmp_path / "maps.png").std() > 0.01
