"""Each measure against the evaluation that it stands for; settings that do not fit are one line."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from studies import SHAPE

from eabf_jax.analysis import measures
from eabf_jax.analysis.attention_entropy import attention_entropy
from eabf_jax.analysis.measures import (
    MEASURES,
    QUANTITIES,
    Column,
    EntropySettings,
    Inputs,
    KeyTokenSettings,
    LineSettings,
    LossSettings,
    PasskeySettings,
)
from eabf_jax.errors import InputError
from eabf_jax.evaluation import line_retrieval, passkey, retrieval
from eabf_jax.evaluation.perplexity import position_losses, sliding_losses
from eabf_jax.interop.native import save_params, write_model_json
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
    settings = {"key_tokens": KeyTokenSettings("DIR", 2, 2), "entropy": EntropySettings(8)}
    for name, measure in MEASURES.items():
        columns = measure.columns(settings.get(name) or measure.settings(), WINDOWS)
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
        ("passkey", {"samples": 0}, "measure passkey: different windows, positive samples and a seed"),
        ("passkey", {}, "measure passkey makes texts, and the model has no tokenizer: set model.tokenizer"),
        ("line_retrieval", {"windows": ()}, "measure line_retrieval: different windows, positive samples"),
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


def test_key_token_loss_is_the_mean_over_the_evaluators_key_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, no token is as likely as a key token has to be, so the thresholds are others here."""
    evaluator, measured = (model(scheme("abf", base=base), 61) for base in (20_000.0, 90_000.0))
    directory = tmp_path / "evaluator"
    directory.mkdir()
    write_model_json(directory, evaluator.config)
    save_params(directory, evaluator.parameters())
    random = np.random.default_rng(0)
    documents = random.integers(0, 61, (6, 32)).astype(np.int32)
    given = Inputs(documents, list("abcdef"), None, [16, 24, 32], 1)
    settings = KeyTokenSettings(evaluator=str(directory), short_context=2, short_stride=2)
    long, short = position_losses(evaluator, documents), sliding_losses(evaluator, documents, 4, 2)
    # Three of the six documents have a token above this in the shortest window.
    alpha = np.sort((short - long)[:, 3:15].max(1))[2:4].mean(dtype=np.float64)
    monkeypatch.setattr(measures, "key_tokens", functools.partial(measures.key_tokens, alpha=alpha, beta=-9.0))
    prepared = MEASURES["key_tokens"].prepare(settings, given)
    found = {values.column.window: values.values for values in prepared.run(measured)}
    keys = short.astype(np.float64) - long > alpha
    keys[:, :3] = False
    kept = [row for row in range(6) if keys[row, :15].any()]
    assert len(kept) == 3
    losses = position_losses(measured, documents)
    for window in (16, 24, 32):
        expected = [losses[row, : window - 1][keys[row, : window - 1]].mean() for row in kept]
        assert found[window] == pytest.approx(expected, rel=1e-5)
    assert prepared.units == {"key_tokens": ["abcdef"[row] for row in kept]}


def test_entropy_is_the_absolute_change_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig.from_fields({**SHAPE, "num_hidden_layers": 3, "rope": {"type": "abf", "base": 20_000.0}})
    measured = Llama(config, rngs=nnx.Rngs(0), attention="reference")
    settings = EntropySettings(pretrained_window=8, first_layer=1)
    prepared = MEASURES["entropy"].prepare(settings, inputs())
    found = {values.column: values.values for values in prepared.run(measured)}
    assert list(found) == [Column("entropy", window, (8, window)) for window in WINDOWS]
    for row, document in enumerate(DOCUMENTS):
        each = attention_entropy(measured, document[None]).mean(1)  # [layers, length]
        for window in WINDOWS:
            change = np.abs(each[:, 8:window].mean(1) - each[:, 4:8].mean(1))[1:].mean()
            assert found[Column("entropy", window, (8, window))][row] == pytest.approx(change, abs=1e-5)
    with pytest.raises(InputError, match="the model has 3 layers, no layer 3"):
        MEASURES["entropy"].prepare(EntropySettings(8, 3), inputs()).run(measured)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("key_tokens", KeyTokenSettings(), "measure key_tokens: an evaluator"),
        ("key_tokens", KeyTokenSettings("DIR", 30, 2), "short_context 30 and short_stride 2 together"),
        ("entropy", EntropySettings(), "measure entropy: pretrained_window 0"),
        ("entropy", EntropySettings(32), "shorter than the longest of evaluate.windows"),
    ],
)
def test_windows_that_do_not_fit_these_measures_are_refused(name: str, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MEASURES[name].columns(settings, WINDOWS)
