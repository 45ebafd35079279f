"""What a study measures on a model: a table of measures, each by window and by document or prompt.

A new measure is one entry of `MEASURES`: its settings, its quantities, and two functions.
"""

import dataclasses
import functools
import gc
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eabf_jax.analysis.attention_entropy import Entropies, entropies, near_and_far
from eabf_jax.errors import InputError
from eabf_jax.evaluation import line_retrieval, passkey
from eabf_jax.evaluation.key_tokens import key_tokens
from eabf_jax.evaluation.perplexity import band_means, check_edges, position_losses, sliding_losses
from eabf_jax.evaluation.retrieval import Prompt, answers
from eabf_jax.evaluation.scorer import evaluation_mesh
from eabf_jax.interop.loading import load, parse_entry
from eabf_jax.interop.tokenizer import Tokenizer
from eabf_jax.model.llama import Llama


class Quantity(NamedTuple):
    """A figure that a measure gives for each document or prompt."""

    unit: str
    higher_is_better: bool
    bounds: tuple[float, float] | None = None  # least and greatest value, for shares of hits


class Column(NamedTuple):
    """What a list of values is about."""

    quantity: str
    window: int  # tokens that the model reads
    band: tuple[int, int] | None = None  # positions start <= position < end; None for a whole prompt


class Values(NamedTuple):
    """A model's results in one column."""

    column: Column
    values: list[float]  # by unit


class Inputs(NamedTuple):
    """What measures read; the same for every model of a study."""

    documents: Int[np.ndarray, "documents T"]  # int32 [documents, the longest window]
    names: Sequence[str]  # of the documents
    tokenizer: Tokenizer | None
    windows: Sequence[int]  # ascending, tokens
    batch_size: int  # rows that each device reads at a time


class Prepared(NamedTuple):
    """A measure that has its inputs."""

    units: Mapping[str, Sequence[str]]  # names of documents or prompts by quantity
    tokens: int  # that a model reads
    run: Callable[[Llama], list[Values]]
    digest: str = ""  # of inputs that neither settings nor documents decide


class Measure(NamedTuple):
    """One kind of measurement."""

    settings: Any  # dataclass of its keys in a study's file
    quantities: Mapping[str, Quantity]
    # Takes settings and windows; of a quantity's columns for a window, the last one stands for the window.
    columns: Callable[[Any, Sequence[int]], list[Column]]
    prepare: Callable[[Any, Inputs], Prepared]  # both raise InputError for settings or inputs that do not fit


@dataclass(frozen=True)
class LossSettings:
    """Keys of the measure `loss`."""

    bands: tuple[int, ...] | None = None  # edges of the position bands, the windows among them; null: 0 and the windows


def loss_columns(settings: LossSettings, windows: Sequence[int]) -> list[Column]:
    """Lists the bands inside each window: the whole window first, then the bands in order."""
    edges = _edges(settings, windows)
    columns = []
    for window in windows:
        bands = [band for band in itertools.pairwise(edges) if band[1] <= window]
        columns += [Column("loss", window, band) for band in dict.fromkeys([(0, window), *bands])]
    return columns


def _edges(settings: LossSettings, windows: Sequence[int]) -> list[int]:
    edges = list(settings.bands or (0, *windows))
    check_edges(edges, windows[-1])
    if edges[1] < 2:
        raise InputError(
            f"measure loss: the band {edges[0]}-{edges[1]} has no token with a loss: begin with a longer one"
        )
    for window in windows:
        if window not in edges:
            raise InputError(
                f"measure loss: bands {','.join(map(str, edges))} have no edge at the window {window}; add it"
            )
    return edges


def prepare_loss(settings: LossSettings, inputs: Inputs) -> Prepared:
    """Prepares the mean loss of each document in each band.

    A scheme that does not follow the length gives a token the same loss in every window, so one pass over the longest
    window has all.
    """
    columns = loss_columns(settings, inputs.windows)
    longest = inputs.windows[-1]

    def run(model: Llama) -> list[Values]:
        windows = inputs.windows if model.config.rope.depends_on_length else [longest]
        losses = {
            window: position_losses(model, inputs.documents[:, :window], batch_size=inputs.batch_size)
            for window in windows
        }
        if not all(np.isfinite(found).all() for found in losses.values()):
            raise InputError("the loss is not finite; check the weights, or use compute.dtype float32")
        found = []
        for column in columns:
            assert column.band is not None
            [means] = band_means(losses.get(column.window, losses[longest]), column.band).values()
            found.append(Values(column, means.tolist()))
        return found

    return Prepared({"loss": inputs.names}, inputs.documents.shape[0] * longest, run)


@dataclass(frozen=True)
class KeyTokenSettings:
    """Keys of the measure `key_tokens`; see `eabf evaluate perplexity --key-tokens`."""

    evaluator: str = ""  # the model that finds the key tokens, DIR or DIR@{scheme}; it must read the longest window
    short_context: int = 1024  # tokens
    short_stride: int = 256  # tokens
    dtype: str = "float32"  # of the evaluator


def key_token_columns(settings: KeyTokenSettings, windows: Sequence[int]) -> list[Column]:
    """Lists the windows that are longer than the short context."""
    found = [window for window in windows if window > settings.short_context + settings.short_stride]
    if not found or not settings.evaluator or settings.short_context < 2 or settings.short_stride < 1:
        raise InputError(
            f"measure key_tokens: an evaluator, and a window longer than short_context {settings.short_context} and "
            f"short_stride {settings.short_stride} together, are needed"
        )
    return [Column("key_tokens", window, (0, window)) for window in found]


def prepare_key_tokens(settings: KeyTokenSettings, inputs: Inputs) -> Prepared:
    """Finds the key tokens, and prepares the mean loss of each document's key tokens inside each window.

    Documents without a key token inside the shortest of the windows are left out.
    """
    columns = key_token_columns(settings, inputs.windows)
    entry = parse_entry(settings.evaluator)
    mesh = evaluation_mesh(entry.config, settings.dtype)
    evaluator = load(entry.directory, entry.rope, settings.dtype, mesh)[0]
    first, longest, size = columns[0].window, inputs.windows[-1], inputs.batch_size
    window = settings.short_context + settings.short_stride
    long = position_losses(evaluator, inputs.documents, batch_size=size)
    short = sliding_losses(evaluator, inputs.documents, window, settings.short_stride, batch_size=size)
    del evaluator
    gc.collect()  # its arrays are part of a cycle
    keys = key_tokens(long, short, window)
    kept = np.flatnonzero(keys[:, : first - 1].any(1)).tolist()
    if not kept:
        raise InputError(f"measure key_tokens: no document has a key token in its first {first} tokens")
    documents, keys = inputs.documents[kept], keys[kept]

    def run(model: Llama) -> list[Values]:
        losses: dict[int, Any] = {}
        for window in [c.window for c in columns] if model.config.rope.depends_on_length else [longest]:
            losses[window] = position_losses(model, documents[:, :window], batch_size=size)
        found = []
        for column in columns:
            table, end = losses.get(column.window, losses[longest]), column.window - 1
            means = np.average(table[:, :end].astype(np.float64), axis=1, weights=keys[:, :end])
            if not np.isfinite(means).all():
                raise InputError("the loss is not finite; check the weights, or use compute.dtype float32")
            found.append(Values(column, means.tolist()))
        return found

    return Prepared({"key_tokens": [inputs.names[row] for row in kept]}, documents.size, run, _digest(keys))


@dataclass(frozen=True)
class EntropySettings:
    """Keys of the measure `entropy`; see `eabf entropy`."""

    pretrained_window: int = 0  # tokens
    first_layer: int = 2  # layers before it are left out; the paper's method does not scale the first two


def entropy_columns(settings: EntropySettings, windows: Sequence[int]) -> list[Column]:
    """Lists the windows beyond the pretrained one."""
    start = settings.pretrained_window
    found = [window for window in windows if window > start]
    if start < 2 or not found or settings.first_layer < 0:
        raise InputError(
            f"measure entropy: pretrained_window {start} and first_layer {settings.first_layer}; a window of at least "
            f"2 tokens that is shorter than the longest of evaluate.windows, and a layer from 0 are needed"
        )
    return [Column("entropy", window, (start, window)) for window in found]


def prepare_entropy(settings: EntropySettings, inputs: Inputs) -> Prepared:
    """Prepares how far attention entropy beyond the pretrained window is from that in its last half.

    A document's value is the mean over layers of the absolute difference of the layer's means over heads and positions.
    """
    columns = entropy_columns(settings, inputs.windows)
    start = settings.pretrained_window
    longest = inputs.windows[-1]

    def run(model: Llama) -> list[Values]:
        if settings.first_layer >= model.config.num_hidden_layers:
            raise InputError(
                f"measure entropy: the model has {model.config.num_hidden_layers} layers, no layer "
                f"{settings.first_layer}"
            )
        windows = [c.window for c in columns]
        measured: dict[int, Entropies] = {}
        for window in windows if model.config.rope.depends_on_length else [longest]:
            edges = [start // 2, start, *(edge for edge in windows if edge <= window)]
            measured[window] = entropies(model, inputs.documents[:, :window], edges, batch_size=inputs.batch_size)
        found = []
        for column in columns:
            near, far = near_and_far(measured.get(column.window, measured[longest]), start, column.window)
            change = np.abs(far - near)[:, settings.first_layer :].mean(1)
            found.append(Values(column, change.tolist()))
        return found

    return Prepared({"entropy": inputs.names}, 2 * inputs.documents.shape[0] * longest, run)


@dataclass(frozen=True)
class PasskeySettings:
    """Keys of the measure `passkey`; see `eabf evaluate passkey`."""

    depths: tuple[int, ...] = (0, 25, 50, 75, 100)  # percent
    samples: int = 5  # prompts for each window and depth; a depth's value is their mean
    seed: int = 0  # of the prompts
    chat_template: bool = True
    windows: tuple[int, ...] | None = None  # null: all


@dataclass(frozen=True)
class LineSettings:
    """Keys of the measure `line_retrieval`; see `eabf evaluate line-retrieval`."""

    samples: int = 20  # prompts for each window
    seed: int = 0  # of the prompts
    chat_template: bool = True
    windows: tuple[int, ...] | None = None  # null: all


def retrieval_columns(name: str, settings: Any, windows: Sequence[int]) -> list[Column]:
    """Lists the windows of a retrieval measure."""
    return [
        Column(quantity, window) for quantity in (name, f"{name}_loss") for window in _chosen(name, settings, windows)
    ]


def _chosen(name: str, settings: Any, windows: Sequence[int]) -> list[int]:
    chosen = list(windows if settings.windows is None else settings.windows)
    for window in chosen:
        if window not in windows:
            listed = ", ".join(map(str, windows))
            raise InputError(f"measure {name}: windows has {window}; it takes some of evaluate.windows {listed}")
    if not chosen or len(set(chosen)) < len(chosen) or settings.samples < 1 or settings.seed < 0:
        raise InputError(
            f"measure {name}: different windows, positive samples and a seed that is not negative are needed"
        )
    return sorted(chosen)


def prepare_passkey(settings: PasskeySettings, inputs: Inputs) -> Prepared:
    """Prepares the share of passkeys found at each depth, and the loss of the keys."""
    if not settings.depths or not all(0 <= depth <= 100 for depth in settings.depths):
        raise InputError(f"measure passkey: depths {list(settings.depths)}; percentages from 0 to 100 are needed")
    windows = _chosen("passkey", settings, inputs.windows)
    prompts = _prompts(
        "passkey", passkey.prompts, settings, inputs, windows, settings.depths, settings.samples, settings.seed
    )
    return _retrieval("passkey", prompts, [f"depth {depth}" for depth in settings.depths], settings.samples, inputs)


def prepare_lines(settings: LineSettings, inputs: Inputs) -> Prepared:
    """Prepares line retrieval: whether each prompt is answered, and the loss of the answer."""
    windows = _chosen("line_retrieval", settings, inputs.windows)
    prompts = _prompts(
        "line_retrieval", line_retrieval.prompts, settings, inputs, windows, settings.samples, settings.seed
    )
    return _retrieval("line_retrieval", prompts, [f"record {number}" for number in range(settings.samples)], 1, inputs)


def _prompts(
    name: str, make: Callable[..., list[Prompt]], settings: Any, inputs: Inputs, *arguments: Any
) -> list[Prompt]:
    if inputs.tokenizer is None:
        raise InputError(f"measure {name} makes texts, and the model has no tokenizer: set model.tokenizer")
    try:
        return make(inputs.tokenizer, *arguments, chat=settings.chat_template)
    except InputError as error:
        raise InputError(f"measure {name}: {error}") from error


def _retrieval(name: str, prompts: Sequence[Prompt], units: list[str], samples: int, inputs: Inputs) -> Prepared:
    """Prepares prompts ordered by window and unit, with `samples` of each unit."""

    def run(model: Llama) -> list[Values]:
        found = answers(model, prompts, batch_size=inputs.batch_size)
        windows = list(dict.fromkeys(prompt.length for prompt in prompts))
        columns = []
        for part, quantity in (("hit", name), ("loss", f"{name}_loss")):
            figures = np.array([getattr(answer, part) for answer in found], np.float64)
            by_unit = figures.reshape(len(windows), len(units), samples).mean(axis=2)
            if not np.isfinite(by_unit).all():
                raise InputError(f"the loss of {name} is not finite; check the weights, or use compute.dtype float32")
            columns += [
                Values(Column(quantity, window), row.tolist()) for window, row in zip(windows, by_unit, strict=True)
            ]
        return columns

    digest = _digest(*(np.asarray(prompt.tokens) for prompt in prompts))
    return Prepared({name: units, f"{name}_loss": units}, sum(len(prompt.tokens) for prompt in prompts), run, digest)


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]


def _retrieval_quantities(name: str) -> dict[str, Quantity]:
    return {
        name: Quantity("share answered", True, (0.0, 1.0)),
        f"{name}_loss": Quantity("nats per token of the answer", False),
    }


MEASURES: Mapping[str, Measure] = {
    "loss": Measure(LossSettings, {"loss": Quantity("nats per token", False)}, loss_columns, prepare_loss),
    "key_tokens": Measure(
        KeyTokenSettings,
        {"key_tokens": Quantity("nats per key token", False)},
        key_token_columns,
        prepare_key_tokens,
    ),
    "entropy": Measure(
        EntropySettings,
        {"entropy": Quantity("nats of change beyond the pretrained window", False)},
        entropy_columns,
        prepare_entropy,
    ),
    "passkey": Measure(
        PasskeySettings,
        _retrieval_quantities("passkey"),
        functools.partial(retrieval_columns, "passkey"),
        prepare_passkey,
    ),
    "line_retrieval": Measure(
        LineSettings,
        _retrieval_quantities("line_retrieval"),
        functools.partial(retrieval_columns, "line_retrieval"),
        prepare_lines,
    ),
}
QUANTITIES: Mapping[str, Quantity] = {
    name: quantity for measure in MEASURES.values() for name, quantity in measure.quantities.items()
}


def as_settings(settings: Any) -> dict[str, Any]:
    """Returns a measure's settings as JSON values."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(settings).items()
    }
