"""Each measure against the evaluation that it stands for; settings that do not fit are one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from studies import SHAPE

from eabf_jax.analysis import measures
from eabf_jax.analysis.measures import MEASURES, QUANTITIES, Column, Inputs, LineSettings, LossSettings, PasskeySettings
from eabf_jax.errors import InputError
from eabf_jax.evaluation import line_retrieval, passkey, retrieval
from eabf_jax.evaluation.perplexity import position_losses
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.llama import Llama
from eabf_jax.rope import scheme

WINDOWS = [16, 32]
DOCUMENTS = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (3, 32)).astype(np.int32)


def model(rope: Any, vocabulary: int = SHAPE["vocab_size"]) -> Llama:
    fields = {**SHAPE, "vocab_size": vocabulary, "num_hidden_layers": 1}
    config = LlamaConfig.from_fields({**fields, "rope": rope})
    return Llama(config, rngs=nnx.Rngs(0), attention="reference")


def inputs(tokenizer: Any = None, windows: list[int] = WINDOWS) -> Inputs:
    return Inputs(DOCUMENTS, ["a", "b", "c"], tokenizer, windows, 1)


@pytest.mark.parametrize(
    "rope",
    [scheme("abf", base=20_000.0), scheme("dynamic_ntk", base=1e4, factor=2.0, pretrained_window=8)],
    ids=["fixed", "follows the length"],
)
def test_loss_is_that_of_a_pass_over_each_window(rope: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    def counted(model: Llama, documents: np.ndarray, **options: Any) -> np.ndarray:
        passes.append(documents.shape[1])
        return position_losses(model, documents, **options)

    monkeypatch.setattr(measures, "position_losses", counted)
    measured = model(rope)
    prepared = MEASURES["loss"].prepare(LossSettings(bands=(0, 8, 16, 32)), inputs())
    found = {values.column: values.values for values in prepared.run(measured)}
    bands = {16: [(0, 16), (0, 8), (8, 16)], 32: [(0, 32), (0, 8), (8, 16), (16, 32)]}
    assert list(found) == [Column("loss", window, band) for window in WINDOWS for band in bands[window]]
    assert passes == ([16, 32] if rope.depends_on_length else [32])
    for (_, window, band), values in found.items():
        losses = position_losses(measured, DOCUMENTS[:, :window])
        # Entry t belongs to position t + 1; another length is padded differently.
        assert values == pytest.approx(losses[:, max(band[0] - 1, 0) : band[1] - 1].mean(1), rel=1e-5)
    assert prepared.units == {"loss": ["a", "b", "c"]}


@pytest.mark.parametrize("name", ["passkey", "line_retrieval"])
def test_retrieval_by_unit_sums_up_to_the_evaluations_cells(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows, random = [256, 320], np.random.default_rng(0)

    def answers(_: Any, prompts: list[retrieval.Prompt], **options: Any) -> list[retrieval.Answer]:
        return [retrieval.Answer(bool(random.random() < 0.5), float(random.random())) for _ in prompts]

    for module in (measures, retrieval):
        monkeypatch.setattr(module, "answers", answers)
    if name == "passkey":
        settings: Any = PasskeySettings(depths=(0, 100), samples=3, seed=4)
        prompts = passkey.prompts(tokenizer, windows, [0, 100], 3, 4)
        units = ["depth 0", "depth 100"]
    else:
        settings = LineSettings(samples=3, seed=4)
        prompts = line_retrieval.prompts(tokenizer, windows, 3, 4)
        units = ["record 0", "record 1", "record 2"]
    prepared = MEASURES[name].prepare(settings, inputs(tokenizer, windows))
    assert prepared.tokens == sum(len(prompt.tokens) for prompt in prompts)
    assert prepared.units == {name: units, f"{name}_loss": units}
    found = {values.column: values.values for values in prepared.run(model(scheme("default")))}
    random = np.random.default_rng(0)
    cells = retrieval.measure(model(scheme("default")), prompts)
    for window in windows:
        own = [cell for cell in cells if cell.length == window]
        shares, losses = found[Column(name, window)], found[Column(f"{name}_loss", window)]
        assert len(shares) == len(losses) == len(units)
        assert np.mean(shares) == pytest.approx(sum(c.hits for c in own) / sum(c.total for c in own))
        assert np.mean(losses) == pytest.approx(np.mean([c.loss for c in own]))
        if name == "passkey":
            assert shares == pytest.approx([cell.hits / cell.total for cell in own])


def test_every_column_belongs_to_a_quantity() -> None:
    for measure in MEASURES.values():
        columns = measure.columns(measure.settings(), WINDOWS)
        assert {column.quantity for column in columns} == set(measure.quantities)
    assert [name for name, quantity in QUANTITIES.items() if quantity.higher_is_better] == ["passkey", "line_retrieval"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("loss", {"bands": (0, 32)}, "measure loss: bands 0,32 have no edge at the window 16; add it"),
        ("loss", {"bands": (16, 16, 32)}, "position bands 16,16,32 do not increase"),
        ("loss", {"bands": (0, 16, 32, 64)}, "position band ends at 64, the documents at 32 tokens"),
        ("passkey", {"depths": (101,)}, r"measure passkey: depths \[101\]; percentages from 0 to 100"),
        ("passkey", {"windows": (24,)}, "measure passkey: windows has 24; it takes some of evaluate.windows 16, 32"),
        ("passkey", {"samples": 0}, "measure passkey: windows, positive samples and a seed"),
        ("passkey", {}, "measure passkey makes texts, and the model has no tokenizer: set model.tokenizer"),
        ("line_retrieval", {"windows": ()}, "measure line_retrieval: windows, positive samples"),
    ],
)
def test_settings_that_do_not_fit(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MEASURES[name].prepare(MEASURES[name].settings(**settings), inputs())


def test_prompts_longer_than_the_window_are_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"measure passkey: length 16: the question alone has \d+ tokens"):
        MEASURES["passkey"].prepare(PasskeySettings(), inputs(tokenizer))


def test_a_loss_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(measures, "position_losses", lambda *_, **__: np.full((3, 31), np.inf, np.float32))
    with pytest.raises(InputError, match="the loss is not finite"):
        MEASURES["loss"].prepare(LossSettings(), inputs()).run(model(scheme("default")))
    monkeypatch.setattr(measures, "answers", lambda *_, **__: [retrieval.Answer(False, np.nan)] * 2)
    prepared = MEASURES["line_retrieval"].prepare(LineSettings(samples=1), inputs(tokenizer, [256, 320]))
    with pytest.raises(InputError, match="the loss of line_retrieval is not finite"):
        prepared.run(model(scheme("default")))
