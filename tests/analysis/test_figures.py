"""Pictures are complete, with a line for every model."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from eabf_jax.analysis.figures import (
    heat_maps,
    line_style,
    loss_by_position,
    means_by,
    perplexity_by_window,
    share_by_length,
)
from eabf_jax.evaluation.intervals import Share
from eabf_jax.evaluation.perplexity import WindowPerplexity, band_losses
from eabf_jax.evaluation.retrieval import Cell


def test_lines_hold_the_bands_means_and_the_file_is_a_picture(tmp_path: Path, monkeypatch) -> None:
    drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    plot = Axes.plot

    def record(self: Axes, x, y, **options):
        drawn[options["label"]] = (np.asarray(x), np.asarray(y))
        return plot(self, x, y, **options)

    monkeypatch.setattr(Axes, "plot", record)
    bands: list[tuple[np.ndarray, np.ndarray]] = []
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, low, high, **_: bands.append((low, high)))
    # 64 positions with a loss, in 4 bins of 16, whose means are known.
    losses = {"rising": np.tile(np.arange(64, dtype=np.float32), (3, 1)), "flat": np.ones((2, 64))}
    curves = {label: band_losses(table, [1, 17, 33, 49, 65]) for label, table in losses.items()}
    path = tmp_path / "loss.png"
    loss_by_position(curves, path, pretrained_window=32, title="t")
    np.testing.assert_allclose(drawn["rising"][0][::3], [1, 17, 33, 49])
    np.testing.assert_allclose(drawn["rising"][0][2::3], [17, 33, 49, 65])
    np.testing.assert_allclose(drawn["rising"][1], np.repeat([7.5, 23.5, 39.5, 55.5], 3))
    np.testing.assert_allclose(drawn["flat"][1], np.ones(12))
    # All documents of a model are equal here, so the interval has no width.
    np.testing.assert_allclose(bands[0], [drawn["rising"][1]] * 2)
    assert imread(path).std() > 0.01
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]


def test_bands_hold_the_intervals(tmp_path: Path, monkeypatch) -> None:
    bands: dict[tuple[float, ...], tuple[list[float], list[float]]] = {}
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, low, high, **_: bands.update({tuple(x): (low, high)}))
    windows = [WindowPerplexity(n, 64, 0.0, 0.0, 3.0 + n, 2.0 + n, 5.0 + n) for n in (128, 256)]
    perplexity_by_window({"a": windows}, tmp_path / "windows.png")
    assert bands.pop((128, 256)) == ([130.0, 258.0], [133.0, 261.0])
    bars: dict[str, tuple[list[float], np.ndarray]] = {}
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, x, y, reach, label, **_: bars.update({label: ([*x, *y], np.asarray(reach))})
    )
    monkeypatch.setattr("eabf_jax.analysis.figures._legend", lambda *_: None)
    share_by_length({"a": {1024: Share(1, 4, 0.125, 0.5)}}, tmp_path / "shares.png", pretrained_window=512)
    assert bars["a"][0] == [1024, 25.0]
    np.testing.assert_allclose(bars["a"][1], [[12.5], [25.0]])  # from 12.5 to 50
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["shares.png", "windows.png"]


def test_a_single_cell_is_drawn_without_an_interval(tmp_path: Path) -> None:
    share_by_length({"a": {1024: Share(1, 4, np.nan, np.nan), 2048: Share(0, 4, 0.0, 0.5)}}, tmp_path / "shares.png")
    assert imread(tmp_path / "shares.png").std() > 0.01


@pytest.mark.parametrize("count", range(1, 13))
def test_no_two_of_a_dozen_lines_look_alike(count: int) -> None:
    styles = [line_style(number, count) for number in range(count)]
    assert len({(style["color"], style.get("linestyle", "-")) for style in styles}) == count
    assert len({style["marker"] for style in styles}) == count
    # No line hides another: the thick one is below.
    assert [style["zorder"] for style in styles] == sorted((style["zorder"] for style in styles), reverse=True)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collects the saved figures with their layout."""
    kept: list[Figure] = []
    monkeypatch.setattr("eabf_jax.analysis.figures.save", lambda figure, _: kept.append(figure))
    return kept


@pytest.mark.parametrize(
    ("window", "is_marked"), [(2048, True), (4096, True), (15_000, True), (16_000, True), (512, False), (65_536, False)]
)
def test_the_mark_of_the_pretrained_window_stays_inside_the_axes(
    drawn: list[Figure], window: int, is_marked: bool
) -> None:
    shares = {"a": {length: Share(1, 4, 0.1, 0.5) for length in (2048, 4096, 8192, 16_384)}}
    share_by_length(shares, Path("unused"), pretrained_window=window)
    drawn[0].draw_without_rendering()
    [axes] = drawn[0].axes
    assert bool(axes.texts) == is_marked
    for text in axes.texts:
        box, inside = text.get_window_extent(), axes.get_window_extent()
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    assert axes.get_xlim()[1] < 20_000  # not widened by the mark


def relative_luminance(colour: tuple[float, float, float, float]) -> float:
    """Computes the relative luminance as WCAG 2.1 defines it."""
    channels = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def test_figures_in_heat_maps_can_be_read_on_every_colour(drawn: list[Figure]) -> None:
    cells = [Cell(1024, depth, depth, 100, 0.0) for depth in range(101)]
    heat_maps({"a": cells}, Path("unused"))
    axes = drawn[0].axes[0]
    colours = axes.images[0].cmap(np.arange(101) / 100)
    luminances = [relative_luminance(colour) for colour in colours]
    # Higher values are lighter, so colour vision is not needed.
    assert luminances == sorted(luminances)
    for text, luminance in zip(axes.texts, luminances, strict=True):
        light, dark = sorted((luminance, relative_luminance(matplotlib.colors.to_rgba(text.get_color()))))[::-1]
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.1, level AA


def test_heat_maps_show_each_cell_in_its_place(tmp_path: Path, monkeypatch) -> None:
    shown: list[np.ndarray] = []
    draw = Axes.imshow

    def record(self: Axes, values, **options):
        shown.append(np.asarray(values))
        return draw(self, values, **options)

    monkeypatch.setattr(Axes, "imshow", record)
    cells = [Cell(n, d, hits, 4, 0.5) for n, d, hits in ((256, 0, 4), (256, 90, 3), (512, 0, 1), (512, 90, 0))]
    heat_maps({f"model {n}": cells for n in range(6)}, tmp_path / "maps.png", pretrained_window=256, title="t")
    assert len(shown) == 6
    np.testing.assert_array_equal(shown[0], [[100, 25], [75, 0]])  # depths down, lengths across
    assert imread(tmp_path / "maps.png").std() > 0.01


def test_means_stand_at_their_places_with_their_intervals(tmp_path: Path, monkeypatch) -> None:
    bars: dict[str, tuple[list[float], list[float], list[float]]] = {}

    def record(self: Axes, x, y, reach, label, **_) -> None:
        bars[label] = (list(x), list(y), list(reach))

    monkeypatch.setattr(Axes, "errorbar", record)
    monkeypatch.setattr("eabf_jax.analysis.figures._legend", lambda *_: None)
    rows = {"a": {"32": (2.0, 0.5), "all": (1.5, float("nan"))}, "b": {"all": (1.0, 0.25)}}
    means_by(rows, ["0", "32", "all"], tmp_path / "means.png", label="data", unit="nats per token", title="t")
    assert bars["a"][1:] == ([2.0, 1.5], [0.5, 0.0]) and bars["b"][1:] == ([1.0], [0.25])
    assert np.round(bars["a"][0]).tolist() == [1, 2] and np.round(bars["b"][0]).tolist() == [2]
    assert bars["a"][0][1] != bars["b"][0][0]  # side by side
    assert imread(tmp_path / "means.png").std() > 0.01
