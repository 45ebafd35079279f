"""Chooses a rotary scheme for a model and a target window, by the held-out loss far beyond the pretrained window.

Candidates are scored without training first; the best are trained for a few steps, and the best of these for all
(successive halving).
"""

import contextlib
import dataclasses
import functools
import gc
import io
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from eabf_jax.analysis.attention_entropy import Matched, matched
from eabf_jax.errors import InputError
from eabf_jax.evaluation.intervals import Mean, student
from eabf_jax.evaluation.perplexity import position_losses
from eabf_jax.evaluation.scorer import evaluation_mesh, filled, on_mesh, token_scores
from eabf_jax.inference import placement
from eabf_jax.interop.loading import load
from eabf_jax.model.llama import Llama
from eabf_jax.parallel.rules import batch_ways
from eabf_jax.rope import Scheme, compose
from eabf_jax.rope.frequencies import default
from eabf_jax.rope.schemes import Rule
from eabf_jax.training.recipe import RopeConfig, TrainConfig
from eabf_jax.training.trainer import Diverged, Preempted, base_config, settle, train

# Bases to try, as multiples of the model's own; the paper's is 50.
MULTIPLES = (2, 5, 10, 20, 50)
# Growth of entropy inside the window, nats per factor of e in position, from which a layer counts as attending nearly
# evenly; even attention has 1.
_EVEN = 0.75
# Candidates of each family in the short round, and of all in the last.
_EACH, _LAST = 3, 2
# Documents that slopes are fitted on.
_FITTED = 4

# Opens a progress bar with a name and a total; returns a function that sets the amount done.
Progress = Callable[[str, float], Callable[[float], None]]


def least_base(window: int) -> float:
    """Returns the base that a window of this many tokens needs for near tokens to differ from random ones.

    Source: Xu et al. 2024, "Base of RoPE Bounds Context Length" (arXiv 2405.14591), the power law of its lower bounds.
    """
    return float(0.0424 * window**1.628)


def far_start(window: int) -> int:
    """Returns the first position of the far band, the last quarter of the target window."""
    return window - window // 4


class Candidate(NamedTuple):
    """A scheme and its losses on the validation documents; rounds in which its training diverged are missing."""

    scheme: Scheme
    # By optimizer steps [documents, 2], nats per token: inside the pretrained window, and in the far band.
    losses: dict[int, Float[np.ndarray, "documents 2"]]

    @property
    def steps(self) -> int:
        """Most optimizer steps that the candidate was trained for."""
        return max(self.losses)

    def near(self, steps: int) -> Mean:
        """Returns the loss inside the pretrained window, with the interval over documents."""
        return student(self.losses[steps][:, 0])

    def far(self, steps: int) -> Mean:
        """Returns the loss in the far band, with the interval over documents."""
        return student(self.losses[steps][:, 1])

    def behind(self, other: "Candidate", steps: int) -> Mean:
        """Returns the loss in the far band minus another candidate's, paired by document."""
        return student(self.losses[steps][:, 1] - other.losses[steps][:, 1])


class Suggestion(NamedTuple):
    """The result of `suggest`."""

    candidates: list[Candidate]  # the best first: those of the last round, then of the one before
    rounds: tuple[int, ...]  # optimizer steps of each round, the first of which are 0
    entropies: dict[Scheme, Matched]  # by the frequencies that they were measured with


def suggest(
    config: TrainConfig,
    documents: Int[np.ndarray, "documents T"],
    scratch: Path,
    *,
    bases: Sequence[float] = (),
    batch_size: int = 1,
    progress: Progress = lambda name, total: lambda done: None,
) -> Suggestion:
    """Searches frequencies and multiplier for a run.

    Args:
      config: the run: model, target window, data and recipe; its own scheme plays no part.
      documents: int32 [documents, target window], held out from training.
      scratch: a directory for the training runs.
      bases: bases to try; none means `MULTIPLES` of the model's own, and `least_base`.
      batch_size: documents that each device reads at a time.

    Raises:
      InputError: as for `load`, `own_base` and `train`.
    """
    steps = settle(config).steps
    short = max(1, steps // 3)
    found, fits = untrained(config, documents, bases, batch_size, progress)
    pretrained = base_config(config).max_position_embeddings

    def tried(candidates: Sequence[Candidate], steps: int) -> list[Candidate]:
        advance = progress(f"training, {steps} step{'s' * (steps > 1)}", len(candidates))
        for done, candidate in enumerate(candidates, start=1):
            run = scratch / f"{steps}_steps_{done}"
            with contextlib.suppress(Diverged):
                losses = trained_losses(config, candidate.scheme, run, steps, documents, batch_size)
                if (bands := _bands(losses, pretrained)) is not None:
                    candidate.losses[steps] = bands
            shutil.rmtree(run, ignore_errors=True)
            advance(done)
        return list(candidates)

    # Interpolated frequencies need less training, so untrained losses compare candidates of one family only.
    first = [one for family in families(found) for one in leading(family, 0, _EACH, _EACH - 1)]
    if short < steps:
        first = leading(tried(first, short), short, _LAST, _LAST)
    if not any(steps in one.losses for one in tried(first, steps)):
        raise InputError("the training of every candidate diverged: a lower recipe.learning_rate is the usual cure")
    return Suggestion(sorted(found, key=_rank), tuple(dict.fromkeys((0, short, steps))), fits)


def families(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Splits candidates into those with an adjusted base and those with interpolated frequencies."""
    adjusted = [one for one in candidates if one.scheme.frequencies.function is default]
    return adjusted, [one for one in candidates if one not in adjusted]


def _rank(candidate: Candidate) -> tuple[int, float]:
    return -candidate.steps, candidate.far(candidate.steps).mean


def untrained(
    config: TrainConfig,
    documents: Int[np.ndarray, "documents T"],
    bases: Sequence[float],
    batch_size: int,
    progress: Progress,
) -> tuple[list[Candidate], dict[Scheme, Matched]]:
    """Scores candidates without training: frequencies with the paper's multiplier and with none, then multipliers.

    Args:
      config, documents, bases, batch_size, progress: as for `suggest`.

    Returns:
      The candidates, and the entropies measured with the best frequencies of each family.
    """
    base = base_config(config)
    window, pretrained, own = documents.shape[1], base.max_position_embeddings, own_base(base.rope)
    assert config.model.path is not None  # as `settle` has checked
    mesh = evaluation_mesh(base, config.compute.dtype)
    model = load(config.model.path, dtype=config.compute.dtype, mesh=mesh)[0]
    known: dict[Scheme, Candidate] = {}

    def score(name: str, schemes: Sequence[Scheme]) -> None:
        advance = progress(name, len(schemes))
        for done, scheme in enumerate(schemes, start=1):
            if scheme not in known:
                bands = _bands(scheme_losses(model, scheme, documents, batch_size), pretrained)
                if bands is None:
                    raise InputError("a loss is not finite; check the weights, or use --compute.dtype float32")
                known[scheme] = Candidate(scheme, {0: bands})
            advance(done)

    digits = 10 ** math.floor(math.log10(least_base(window)) - 1)
    bound = float(math.ceil(least_base(window) / digits) * digits)
    tried = sorted(set(bases) or {own * multiple for multiple in MULTIPLES} | {max(bound, own)})
    frequencies = [compose({"type": "abf", "base": found}) for found in tried]
    interpolated = {"base": own, "factor": window / pretrained, "pretrained_window": pretrained}
    frequencies += [compose({"type": kind, **interpolated}) for kind in ("ntk_by_parts", "yarn")]
    paper: list[Mapping[str, Any]] = [{"type": "entropy_aware", "pretrained_window": pretrained}, {"type": "none"}]
    score("frequencies, untrained", [compose(found, rule) for found in frequencies for rule in paper])
    fits = {}
    best = [one for family in families(list(known.values())) for one in leading(family, 0, 1, 1)]
    for number, candidate in enumerate(best, start=1):
        alone = compose(candidate.scheme)  # its frequencies, without its multiplier
        advance = progress(f"attention entropy, {number} of {len(best)}", base.num_hidden_layers)
        fits[alone] = matched(_with_rope(model, alone), documents[:_FITTED], pretrained, advance)
    score(
        "multipliers, untrained",
        [compose(found, rule) for found in fits for rule in _multipliers(pretrained, fits[found])],
    )
    return list(known.values()), fits


def parts_of(scheme: Scheme) -> tuple[str, str]:
    """Describes frequencies and multiplier of a scheme in a few words each."""
    values = compose(scheme).to_dict()
    kind, factor = values.pop("type"), values.get("factor")
    frequencies = f"base {values['base']:,.0f}" if kind == "default" else f"{kind}, factor {factor:g}"
    values = compose({"type": "nope"}, scheme).to_dict().get("logit_scale", {"type": "none"})
    kind = values.pop("type")
    return frequencies, ", ".join([kind, *(_told(name, value) for name, value in values.items())])


def _told(name: str, value: Any) -> str:
    if name == "pretrained_window":
        return f"c {value:,}"
    if name == "unscaled_layers":
        return f"{value} layers exempt"
    if name == "betas":
        return f"betas {min(value):.3f} to {max(value):.3f}"
    return f"{name} {value:.3g}"


def own_base(rope: Scheme) -> float:
    """Returns the base of a model's scheme.

    Raises:
      InputError: it has none.
    """
    found = dict(rope.frequencies.parameters).get("base")
    if found is None:
        raise InputError(f"the model's rotary scheme {rope!r} has no base, so there is none to adjust")
    return float(found)


def _multipliers(window: int, fit: Matched) -> Iterator[Mapping[str, Any]]:
    """Yields multipliers that differ from the paper's in their layers, their window, their growth or their form."""
    wide = int(np.argmin(np.append(fit.growth >= _EVEN, False)))  # leading layers that attend nearly evenly
    for layers in sorted({0, 2, wide}):
        yield {"type": "entropy_aware", "pretrained_window": window, "unscaled_layers": layers}
    yield {"type": "entropy_aware", "pretrained_window": window // 2}
    for share in (0.5, 1.5, 2.0):
        yield {"type": "smooth_temperature", "pretrained_window": window, "beta": share / math.log(window)}
    yield {"type": "llama4_temperature", "pretrained_window": window}
    yield {"type": "layer_temperature", "pretrained_window": window, "betas": fit.betas.round(4).tolist()}


def leading(candidates: Sequence[Candidate], steps: int, count: int, each: int) -> list[Candidate]:
    """Returns the candidates with the lowest loss in the far band after some steps.

    Args:
      steps: candidates that were not trained for as many are left out.
      count: number of candidates at most.
      each: number of candidates with the same frequencies at most.
    """
    found: list[Candidate] = []
    there = [candidate for candidate in candidates if steps in candidate.losses]
    for candidate in sorted(there, key=lambda candidate: candidate.far(steps).mean):
        same = sum(other.scheme.frequencies == candidate.scheme.frequencies for other in found)
        if len(found) < count and same < each:
            found.append(candidate)
    return found


def _bands(
    losses: Float[np.ndarray, "documents T_minus_1"], pretrained: int
) -> Float[np.ndarray, "documents 2"] | None:
    """Averages each document's losses inside the pretrained window and in the far band; None if one is not finite."""
    if not np.isfinite(losses).all():
        return None
    far = far_start(losses.shape[1] + 1)
    wide = losses.astype(np.float64)
    return np.stack([wide[:, : pretrained - 1].mean(1), wide[:, far - 1 :].mean(1)], axis=1)


def trained_losses(
    config: TrainConfig,
    scheme: Scheme,
    run: Path,
    steps: int,
    documents: Int[np.ndarray, "documents T"],
    batch_size: int,
) -> Float[np.ndarray, "documents T_minus_1"]:
    """Trains a run of its own with a scheme, and computes the loss of every token; see `position_losses`."""
    shorter = dataclasses.replace(
        config,
        output=str(run),
        rope=rope_config(scheme),
        # A shorter round has a shorter warm-up.
        recipe=dataclasses.replace(config.recipe, steps=steps, warmup_steps=min(config.recipe.warmup_steps, steps - 1)),
        checkpoint=dataclasses.replace(config.checkpoint, every_steps=None),
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            train(shorter)
    except Preempted as stop:
        raise KeyboardInterrupt from stop
    gc.collect()  # arrays of the trained state are part of cycles
    mesh = evaluation_mesh(base_config(config), config.compute.dtype)
    model = load(run, dtype=config.compute.dtype, mesh=mesh)[0]
    return position_losses(model, documents, batch_size=batch_size)


def rope_config(scheme: Scheme) -> RopeConfig:
    """Returns a scheme in the form of a run's configuration."""
    values = scheme.to_dict()
    kind = RopeConfig.get_choice_class(values.pop("type"))
    made: RopeConfig = kind(**values)
    return made


def scheme_losses(
    model: Llama, scheme: Scheme, documents: Int[np.ndarray, "documents T"], batch_size: int
) -> Float[np.ndarray, "documents T_minus_1"]:
    """Computes what `position_losses` does for the model with another scheme; all schemes share one program.

    Args:
      scheme: with frequencies that do not follow the length.
    """
    mesh, model = on_mesh(model)
    graph, params = nnx.split(model)
    arrays = _arrays(model, scheme, documents.shape[1])
    rows = batch_size * batch_ways(mesh)
    found = []
    for start in range(0, len(documents), rows):
        batch = documents[start : start + rows]
        tokens = jax.device_put(filled(batch, rows), placement.row_sharding(mesh))
        found.append(np.asarray(_losses(graph, params, tokens, arrays))[: len(batch)])
    return np.concatenate(found)


class _Arrays(NamedTuple):
    """What a model computes with a scheme."""

    frequencies: Float[Array, " half"]
    rotation_scale: Float[Array, ""]
    multipliers: Float[Array, "layers T"]


def _arrays(model: Llama, scheme: Scheme, length: int) -> _Arrays:
    positions, layers = jnp.arange(length), jnp.arange(model.config.num_hidden_layers)
    return _Arrays(
        scheme.inverse_frequencies(model.config.rotary_dim),
        jnp.float32(scheme.rotation_scale()),
        jax.lax.map(functools.partial(scheme.logit_scale, positions), layers),
    )


def _with_arrays(model: Llama, arrays: _Arrays) -> Llama:
    """Returns the model with a scheme whose numbers may be traced, so that one program serves all schemes."""
    rotation = Rule(lambda head_dim: (arrays.frequencies, arrays.rotation_scale))
    multiplier = Rule(lambda positions, layer: arrays.multipliers[layer, positions])
    return _with_rope(model, Scheme(rotation, multiplier, "arrays"))


def _with_rope(model: Llama, rope: Scheme) -> Llama:
    changed = nnx.merge(*nnx.split(model))
    changed.config = dataclasses.replace(model.config, rope=rope)
    return changed


@functools.partial(jax.jit, static_argnames="graph")
def _losses(graph: Any, params: Any, tokens: Int[Array, "B T"], arrays: _Arrays) -> Float[Array, "B T_minus_1"]:
    model = _with_arrays(nnx.merge(graph, params), arrays)
    rows, length = tokens.shape
    lengths = jnp.full(rows, length, jnp.int32)
    log_probs, _ = token_scores(model, tokens, lengths, jnp.zeros_like(lengths), tokens[:, 1:])
    return -log_probs
