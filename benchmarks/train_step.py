"""Measures the optimizer step of a configuration, and Hugging Face transformers' step with the same work.

Weights and tokens are random. The step is the one that train.py runs: microbatches, accumulation, clipping, update. The
stacks run one after the other in separate processes, and each has the whole device. README.md beside this file explains
the figures.

    python benchmarks/train_step.py --config_path configs/llama2_7b_eabf_16k.yaml --sequences 2 --json OUT.json

In addition to the options below, it takes every key of the configuration, like train.py: --compute.remat full
"""

import argparse
import dataclasses
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from peer_settings import Setting, matching
from provenance import record

from eabf_jax.cli import ArgumentParser, run
from eabf_jax.errors import InputError
from eabf_jax.hardware import GIB, device_at_hand, device_of_kind
from eabf_jax.interop.directory import write_json
from eabf_jax.model.config import LlamaConfig
from eabf_jax.training.recipe import RopeConfig, TrainConfig, dump_config, load_config
from eabf_jax.training.tracking import flops_per_token

PAPER_STEPS = 6  # paper: floor(100 / 32) x 2


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line.

    Args:
      arguments: without the program's name.

    Returns:
      The benchmark's own options, and the configuration's arguments.
    Raises:
      InputError: an option has an invalid value.
    """
    # Abbreviations are off, because they would take keys of the configuration for options.
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config_path", required=True, help="the configuration, as for train.py")
    parser.add_argument("--sequences", type=int, help="rows of a step over all devices; default: recipe.batch_size")
    parser.add_argument(
        "--lengths", type=integers, default=[], help="measure at these windows, separated by commas", metavar="N,N"
    )
    parser.add_argument("--warmup", type=int, default=1, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    parser.add_argument("--recipe", action="store_true", help="time the paper's whole run: every step, no warm-up")
    parser.add_argument(
        "--multiplier-cost",
        type=int,
        default=0,
        metavar="PAIRS",
        help="after that, time this many pairs of steps with the configuration's scheme and with `default`",
    )
    parser.add_argument(
        "--peers",
        default="*/*/*/*/bfloat16",
        metavar="SETTINGS",
        help="which settings of the peer to try, * for every choice; '' for none (default: %(default)s)",
    )
    parser.add_argument(
        "--search-microbatches",
        type=int,
        default=2,
        metavar="N",
        help="microbatches of a step while settings are tried; the strongest then takes as many as we do",
    )
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--own-process", action="store_true", help=argparse.SUPPRESS)  # for its own subprocesses
    options, rest = parser.parse_known_args(arguments)
    try:
        options.peers = matching(options.peers)
    except ValueError as error:
        raise InputError(f"--peers: {error}") from None
    if options.steps < 1 or options.warmup < 0:
        raise InputError(f"--steps {options.steps}, --warmup {options.warmup}: at least 1 and 0 are needed")
    if not options.json.absolute().parent.is_dir():
        raise InputError(f"--json {options.json}: there is no directory {options.json.parent}; make it")
    return options, ["--config_path", options.config_path, *rest]


def integers(text: str) -> list[int]:
    """Parses comma-separated integers."""
    return [int(number) for number in text.split(",")]


def configure(arguments: Sequence[str], options: argparse.Namespace, length: int | None) -> TrainConfig:
    """Builds the configuration of one measurement.

    Args:
      arguments: `--config_path FILE` and any `--dotted.key value`.
      options: from `parse`.
      length: the window to measure at; None for the configuration's own.

    Returns:
      The configuration with random weights instead of `model.path`. At a length within the model's window there is
      nothing to extend, so the window of the model and the scheme is set to half the length. This changes neither
      shapes nor the amount of work.
    Raises:
      InputError: the configuration has no model shape.
    """
    config = load_config(arguments)
    if config.model.shape is None:
        raise InputError("the configuration has no model.shape, which a benchmark with random weights needs")
    steps = (config.recipe.steps or PAPER_STEPS) if options.recipe else options.warmup + options.steps
    recipe = dataclasses.replace(
        config.recipe, batch_size=options.sequences or config.recipe.batch_size, steps=steps, warmup_steps=0
    )
    window = length or config.window
    shape, rope = dict(config.model.shape), config.rope
    if window <= shape["max_position_embeddings"]:
        shape["max_position_embeddings"] = window // 2
        rope = rope_config(_with_window(config.scheme.to_dict(), window // 2))
    model = dataclasses.replace(config.model, path=None, tokenizer=None, shape=shape)
    return dataclasses.replace(config, window=window, rope=rope, model=model, recipe=recipe)


def _with_window(values: dict[str, Any], window: int) -> dict[str, Any]:
    """Limits every `pretrained_window` in a scheme's dictionary to the window."""
    return {
        key: _with_window(value, window)
        if isinstance(value, dict)
        else min(value, window)
        if key == "pretrained_window"
        else value
        for key, value in values.items()
    }


def rope_config(values: dict[str, Any]) -> Any:
    """Turns a scheme's dictionary into the configuration's `rope`."""
    return RopeConfig.get_choice_class(values["type"])(**{k: v for k, v in values.items() if k != "type"})


def rotary_base(values: dict[str, Any]) -> float:
    """Returns the base in a scheme's dictionary; for a composition, that of its frequencies."""
    return values["base"] if "base" in values else rotary_base(values["frequencies"])


def random_batch(generator: np.random.Generator, rows: int, length: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Makes rows without padding, one document each, with loss on every token.

    Args:
      generator: source of the tokens.
      rows: rows per batch.
      length: tokens per row.
      vocab_size: exclusive bound of the tokens.

    Returns:
      A batch as from `data.loader`: arrays [rows, length].
    """
    size = (rows, length)
    return {
        "tokens": generator.integers(vocab_size, size=size, dtype=np.int32),
        "loss_mask": np.ones(size, np.bool_),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), size).copy(),
        "segment_ids": np.ones(size, np.int32),
    }


def model_flops_utilisation(tokens_per_second: float, config: LlamaConfig, length: int, device: str) -> float | None:
    """Computes the MFU: model FLOPs, without recomputation, as a share of the dense bfloat16 peak.

    Args:
      tokens_per_second: of one device.
      config: the model's shape.
      length: tokens per row.
      device: its kind, as JAX or PyTorch names it.

    Returns:
      The share, or None for a device whose peak is unknown.
    """
    known = device_of_kind(device)
    return tokens_per_second * flops_per_token(config, length) / known.flops if known else None


def own_figures(config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Measures our step in this process.

    Args:
      config: from `configure`.
      options: from `parse`.

    Returns:
      The figures that README.md describes, except those of the peers and the ratios to them.
    """
    # Imported only here, because the process that starts the others must not use the device.
    from eabf_jax.parallel.mesh import gpu_defaults, make_mesh

    gpu_defaults()
    import jax

    from eabf_jax.training.plan import choose, settle_mesh
    from eabf_jax.training.trainer import extended_config

    mesh = make_mesh(settle_mesh(config, shape_of(config), jax.device_count(), device_at_hand()))
    device = mesh.devices.flat[0]
    figures: dict[str, Any] = {"device": device.device_kind, "platform": device.platform, "devices": mesh.size}
    try:
        # A step that the planner considers too large is still tried, which also tests the planner.
        planned = choose(config, extended_config(config), mesh.shape, device_at_hand())
        figures |= {"compute": dataclasses.asdict(planned.config.compute), "planned_gib": planned.total / GIB}
        return figures | _measure(planned, options, mesh)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if not any(sign in message for sign in ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ut of memory")):
            raise
        return figures | {"out_of_memory": True, "error": message.splitlines()[0]}
    except InputError as error:
        return figures | {"error": str(error)}


def _measure(planned: Any, options: argparse.Namespace, mesh: Any) -> dict[str, Any]:
    import jax

    from eabf_jax.training.trainer import place_batch, prepare_step, random_params

    started = time.perf_counter()
    config, model, microbatches = planned.config, planned.model_config, planned.microbatches
    generator = np.random.default_rng(config.recipe.seed)
    prepared = prepare_step(planned, mesh, config.recipe.steps or 1)
    compile_seconds = prepared.compile()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, prepared.abstract.params)
    state = prepared.begin(random_params(model, config.recipe.seed, shardings))
    every_token = config.recipe.objective == "pretrain"

    def placed(rows: dict[str, np.ndarray]) -> Any:
        return place_batch(rows, mesh, microbatches, every_token=every_token)

    def step(prepared: Any, state: Any) -> tuple[Any, float, Any]:
        rows = random_batch(generator, config.recipe.batch_size, config.window, model.vocab_size)
        began = time.perf_counter()
        # Waits for the state too: a step is over when the last parameter is written, not when the loss is known.
        state, metrics = jax.block_until_ready(prepared(state, placed(rows)))
        return state, time.perf_counter() - began, metrics

    warmup, count = (0, config.recipe.steps or 0) if options.recipe else (options.warmup, options.steps)
    seconds, losses, norms = [], [], []
    for _ in range(warmup + count):
        state, taken, metrics = step(prepared, state)
        seconds.append(taken)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.gradient_norm))
    total = time.perf_counter() - started
    median = statistics.median(seconds[warmup:])
    memory = [device.memory_stats() or {} for device in mesh.local_devices]
    rate = config.recipe.batch_size * config.window / median
    figures = {
        "out_of_memory": False,
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / mesh.size,
        "mfu": model_flops_utilisation(rate / mesh.size, model, config.window, mesh.devices.flat[0].device_kind),
        "peak_gib": _most(memory, "peak_bytes_in_use"),
        "limit_gib": _most(memory, "bytes_limit"),
        "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "compile_seconds": compile_seconds,
        "seconds": seconds[warmup:],
        "warmup_seconds": seconds[:warmup],
        "sequences": config.recipe.batch_size,
        "microbatches": microbatches,
        "microbatch_size": config.compute.microbatch_size,
        "losses": losses,
        "gradient_norms": norms,
    }
    if options.recipe:
        figures["recipe"] = {
            "steps": count,
            "total_seconds": total,
            "total_seconds_without_compile": total - compile_seconds,
        }
    if options.multiplier_cost:
        plain_rope = rope_config({"type": "default", "base": rotary_base(config.scheme.to_dict())})
        plain_model = dataclasses.replace(model, rope=dataclasses.replace(config, rope=plain_rope).scheme)
        plain = prepare_step(dataclasses.replace(planned, model_config=plain_model), mesh)
        plain.compile()
        pairs = []
        for _ in range(options.multiplier_cost + 1):  # the first pair is the warm-up
            state, without, _ = step(plain, state)
            state, with_multiplier, _ = step(prepared, state)
            pairs.append((with_multiplier, without))
        figures["multiplier_cost"] = multiplier_cost(pairs[1:])
    return figures


def _most(memory: Sequence[dict[str, int]], key: str) -> float | None:
    """Returns the largest value over the devices, in GiB; None if the backend has no statistics (CPU)."""
    return max((stats[key] / GIB for stats in memory if key in stats), default=None)


def multiplier_cost(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Computes the cost of the logit multiplier.

    Args:
      pairs: seconds of a step with the configuration's scheme, and of the step with `default` just before it.

    Returns:
      The seconds, and the relative slowdown of the first: the median over pairs, whose steps run at the same device
      clock.
    """
    return {
        "seconds_with": [pair[0] for pair in pairs],
        "seconds_without": [pair[1] for pair in pairs],
        "ratio": statistics.median(ours / plain for ours, plain in pairs) - 1,
    }


def shape_of(config: TrainConfig) -> LlamaConfig:
    """Returns the shape of the model that a configuration from `configure` trains."""
    return LlamaConfig.from_fields({**(config.model.shape or {}), "rope": config.scheme})


def run_own(arguments: Sequence[str], length: int, scratch: Path) -> dict[str, Any]:
    """Runs `own_figures` in a separate process.

    Args:
      arguments: this program's command line.
      length: the window.
      scratch: directory for the process's result.

    Returns:
      Its figures, or only `error`.
    """
    result = scratch / "own.json"
    own = ["--own-process", "--lengths", str(length), "--json", str(result)]
    return _run_process([sys.executable, __file__, *arguments, *own], result)


def run_peers(
    config: TrainConfig, options: argparse.Namespace, own: dict[str, Any], scratch: Path
) -> Iterator[dict[str, Any]]:
    """Tries the peer settings on the shapes of our measured step, then measures the strongest setting.

    Args:
      config: from `configure`.
      options: from `parse`.
      own: our figures, for the microbatches.
      scratch: directory for the process's result.

    Yields:
      The figures so far, by setting. At the end, the strongest setting has run with our number of microbatches per
      step, and so has the same setting with float32 parameters and moments (`autocast`). The others have run with at
      most `--search-microbatches`. Where float32 state has no room for all activations, it runs with checkpointing.
    """
    ours = own.get("microbatches", options.search_microbatches)
    few = min(options.search_microbatches, ours)
    peers: dict[str, Any] = {}
    for kernels in dict.fromkeys(one.kernels for one in options.peers):
        tried = [one for one in options.peers if one.kernels == kernels]
        yield (peers := peers | _run_peer(config, options, own, tried, few, scratch))
    best = strongest(peers, ours)
    if best is not None:
        winner = Setting(*best.split("/"))
        masters = winner._replace(precision="autocast")
        again = [winner] * (few < ours) + [masters] * (str(masters) not in peers)
        yield (peers := peers | _run_peer(config, options, own, again, ours, scratch))
        smaller = masters._replace(checkpointing="checkpointed")
        if "tokens_per_second" not in peers[str(masters)] and str(smaller) not in peers:
            yield peers | _run_peer(config, options, own, [smaller], ours, scratch)


def _run_peer(
    config: TrainConfig,
    options: argparse.Namespace,
    own: dict[str, Any],
    tried: Sequence[Setting],
    microbatches: int,
    scratch: Path,
) -> dict[str, Any]:
    """Measures peer settings in a separate process; returns the figures by setting."""
    model, result = shape_of(config), scratch / "peers.json"
    ignored = ("rope", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    shape = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ignored}
    arguments = {
        "shape": json.dumps({**shape, "max_position_embeddings": config.window}),
        "rope-theta": rotary_base(config.scheme.to_dict()),
        "length": config.window,
        "microbatches": microbatches,
        "microbatch-size": own.get("microbatch_size", 1),
        "warmup": options.warmup,
        "warmup-most": options.search_microbatches,
        "steps": options.steps,
        "settings": ",".join(map(str, tried)),
        "json": result,
    }
    if "platform" in own:
        # The peer never runs on another kind of device than ours, even if PyTorch has no build for ours.
        arguments["device"] = {"gpu": "cuda"}.get(own["platform"], own["platform"])
    command = [sys.executable, str(Path(__file__).with_name("peer_train_step.py"))]
    found = _run_process([*command, *(f"--{key}={value}" for key, value in arguments.items())], result)
    peers = {}
    for name in map(str, tried):
        peer = found.get(name) or {"error": found.get("error", "no result")}
        if "tokens_per_second" in peer:
            peer["mfu"] = model_flops_utilisation(peer["tokens_per_second"], model, config.window, found["device"])
        peers[name] = {**peer, "device": found.get("device")}
    return peers


def _run_process(command: Sequence[str], result: Path) -> dict[str, Any]:
    """Runs a program that writes its result as JSON; keeps what it wrote before a failure."""
    result.unlink(missing_ok=True)
    status = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    found = json.loads(result.read_text()) if result.exists() else {}
    return {**found, "error": f"exit status {status}"} if status else found


def strongest(peers: dict[str, Any], microbatches: int, precision: str = "bfloat16") -> str | None:
    """Returns the fastest setting of the peer.

    Args:
      peers: figures by setting.
      microbatches: of our step. The rate of a setting measured with fewer is extrapolated to this number, so that the
        update weighs equally in each. A setting measured with this number goes before all others.
      precision: of the settings to choose from.

    Returns:
      The setting, or None if none of them ran.
    """
    ran = {
        name: figures
        for name, figures in peers.items()
        if "tokens_per_second" in figures and figures["precision"] == precision
    }

    def rank(name: str) -> tuple[bool, float]:
        figures = ran[name]
        if figures["microbatches"] == microbatches:
            return True, figures["tokens_per_second"]
        seconds = microbatches * figures["microbatch_seconds"] + figures["update_seconds"]
        return False, microbatches * figures["microbatch_size"] / seconds

    return max(ran, key=rank, default=None)


def ratio_to(own: dict[str, Any], peer: dict[str, Any] | None) -> float | None:
    """Divides our tokens per second per device by the peer's on one device; None if one of the two did not run."""
    if "tokens_per_second" not in own or peer is None or "tokens_per_second" not in peer:
        return None
    return own["tokens_per_second_per_device"] / peer["tokens_per_second"]


def measure_at(
    config: TrainConfig, arguments: Sequence[str], options: argparse.Namespace, scratch: Path
) -> Iterator[dict[str, Any]]:
    """Yields the figures at one length as they grow: first ours, then with the peer's."""
    own = run_own(arguments, config.window, scratch)
    microbatches = own.get("microbatches", options.search_microbatches)
    for peers in itertools.chain([{}], run_peers(config, options, own, scratch)):
        best, masters = (strongest(peers, microbatches, precision) for precision in ("bfloat16", "autocast"))
        yield {
            "length": config.window,
            **own,
            "flops_per_token": flops_per_token(shape_of(config), config.window),
            "strongest_peer": best,
            "ratio_to_strongest_peer": ratio_to(own, peers.get(best or "")),
            "strongest_float32_peer": masters,
            "ratio_to_strongest_float32_peer": ratio_to(own, peers.get(masters or "")),
            "peers": peers,
        }


def headline(entries: Sequence[dict[str, Any]], window: int) -> dict[str, Any]:
    """Returns the entry that represents the run: the one at the configuration's window, else the longest that ran."""
    ran = [entry for entry in entries if "tokens_per_second" in entry] or list(entries)
    return next((entry for entry in ran if entry["length"] == window), max(ran, key=lambda entry: entry["length"]))


def summary(entry: dict[str, Any]) -> str:
    """Formats a line for us, and one for each setting of the peer."""
    lines = []
    for name, figures in (("ours", entry), *entry["peers"].items()):
        if "tokens_per_second" in figures:
            mfu, peak = figures["mfu"], figures["peak_gib"]
            told = f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['microbatches']} microbatches"
            told += f", MFU {mfu:.1%}" if mfu is not None else ""
            told += f", {peak:.1f} GiB" if peak is not None else ""
        else:
            told = "out of memory" if figures.get("out_of_memory") else figures.get("error", "failed")
        mark = f" (the strongest; ours {entry['ratio_to_strongest_peer'] or 0:.2f} x)" * (
            name == entry["strongest_peer"]
        )
        lines.append(f"{entry['length']:,} tokens: {name}: {told}{mark}")
    return "\n".join(lines)


def main() -> None:
    arguments = sys.argv[1:]
    options, rest = parse(arguments)
    if options.own_process:
        [length] = options.lengths
        write_json(options.json, own_figures(configure(rest, options, length), options))
        return
    asked = configure(rest, options, None)
    # All configurations are read first, so that errors appear before any measurement.
    configs = [configure(rest, options, length) for length in options.lengths or [asked.window]]
    report: dict[str, Any] = {
        **record("train_step"),
        "name": Path(options.config_path).stem,
        "timed_steps": asked.recipe.steps if options.recipe else options.steps,
        "config": yaml.safe_load(dump_config(asked)),
    }
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for config in configs:
            done = entries
            for entry in measure_at(config, arguments, options, Path(scratch)):
                entries = [*done, entry]
                swept = {"lengths": entries, "longest": longest(entries)} if options.lengths else {}
                # Written after each process, so that an interrupted run keeps its measurements.
                write_json(options.json, {**report, **headline(entries, asked.window), **swept})
            print(summary(entries[-1]), flush=True)
    print(f"figures: {options.json}")
    failed = [
        f"{name} at {entry['length']}: {figures['error']}"
        for entry in entries
        for name, figures in (("ours", entry), *entry["peers"].items())
        if "error" in figures and not figures.get("out_of_memory")
    ]
    if failed:
        sys.exit("failed: " + "; ".join(failed))


def longest(entries: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """Returns the longest window that ran, for us and for the peer with any setting."""

    def most(ran: Callable[[dict[str, Any]], bool]) -> int | None:
        return max((entry["length"] for entry in entries if ran(entry)), default=None)

    return {
        "ours": most(lambda entry: "tokens_per_second" in entry),
        "peer": most(lambda entry: any("tokens_per_second" in peer for peer in entry["peers"].values())),
    }


if __name__ == "__main__":
    run(main)
