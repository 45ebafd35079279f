"""The configuration of a run: typed, read from YAML, every key open to `--dotted.key value` on the command line.

The defaults are the recipe of the paper (arXiv 2401.07004, section 4.1, the runs with fewer than 3.5k samples).
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import draccus
import yaml

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.model.config import LlamaConfig
from eabf_jax.parallel.mesh import MeshConfig
from eabf_jax.rope import Scheme
from eabf_jax.rope.schemes import SCHEMES, parameters_of


class RopeConfig(draccus.ChoiceRegistry):
    """A rotary scheme by `type`; each scheme's parameters are those of `eabf_jax.rope.scheme`."""


def _register_schemes() -> None:
    for name in SCHEMES:
        parameters = parameters_of(name)
        fields: list[Any] = [
            (key, kind) if default is dataclasses.MISSING else (key, kind, dataclasses.field(default=default))
            for key, (kind, default) in parameters.items()
        ]
        fields.sort(key=len)  # dataclasses want the fields without a default first
        RopeConfig.register_subclass(name, dataclasses.make_dataclass(f"{name}_rope", fields, bases=(RopeConfig,)))


_register_schemes()


@RopeConfig.register_subclass("compose")
@dataclasses.dataclass
class ComposeConfig(RopeConfig):
    """The frequencies of one scheme with the logit multiplier of another."""

    frequencies: dict[str, Any]  # a scheme as {type: ..., parameters}; its frequencies are taken
    logit_scale: dict[str, Any]  # a scheme as {type: ..., parameters}; its logit multiplier is taken


@dataclasses.dataclass
class ModelConfig:
    """Where the parameters come from."""

    path: str | None = None  # HF directory or native checkpoint to start from; null: random initialisation of `shape`
    shape: dict[str, Any] | None = None  # fields of LlamaConfig (HF names); with `path` they must agree with it
    tokenizer: str | None = None  # directory with the tokenizer to keep beside the model; null: the one in `path`


@dataclasses.dataclass
class DataConfig:
    """What is trained on: a dataset written by `eabf prepare`."""

    directory: str = "data"  # the dataset's directory
    split: str = "train"  # its split


@dataclasses.dataclass
class RecipeConfig:
    """What is optimised and how."""

    # extend: the loss is on the assistant's tokens, one conversation a row; pretrain: on every token, rows packed
    objective: Literal["extend", "pretrain"] = "extend"
    epochs: int = 2  # paper
    steps: int | None = None  # optimizer steps; null: epochs x floor(samples / batch_size), as in the paper
    batch_size: int = 32  # sequences a step over all devices; paper: 32 below 3.5k samples, 128 at 3.5k
    learning_rate: float = 2e-5  # peak; paper
    warmup_steps: int = 0  # linear; paper: none below 3.5k samples, 10 at 3.5k
    schedule: Literal["cosine", "constant"] = "cosine"  # after warm-up, to zero at the last step; paper: cosine
    beta1: float = 0.9  # paper
    beta2: float = 0.95  # paper
    epsilon: float = 1e-8  # AdamW's own default
    weight_decay: float = 0.1  # paper; norms and biases are exempt
    clip_norm: float = 1.0  # global gradient norm
    seed: int = 0  # order of the data and random initialisation


@dataclasses.dataclass
class ComputeConfig:
    """How it is computed; none of these changes what is computed."""

    # of the matrix products; parameters, gradients and moments are float32
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attention: str = "auto"  # auto, reference, chunked, cudnn or splash
    # what the backward pass keeps of a layer: none (all of it), full (nothing), attention, qkv or dots
    remat: str = "full"
    microbatch_size: int = 1  # sequences a device computes at a time; gradients are accumulated in float32
    loss_chunk: int = 1024  # tokens of a row whose logits exist at a time


@dataclasses.dataclass
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int | None = 1  # null: at the end (and when preempted) only
    keep: int = 1  # newest checkpoints kept


@dataclasses.dataclass
class TrainConfig:
    """One training run."""

    output: str  # directory of the run: model.json, tokenizer, checkpoints, metrics; itself a native model directory
    window: int  # tokens a row; the target window
    rope: RopeConfig
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    recipe: RecipeConfig = dataclasses.field(default_factory=RecipeConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    overwrite: bool = False  # start afresh where the output directory holds something else
    distributed: bool = False  # true on every host of a pod: the processes find each other (jax.distributed)

    @property
    def scheme(self) -> Scheme:
        """The rotary scheme that `rope` describes."""
        return Scheme.from_dict({"type": RopeConfig.get_choice_name(type(self.rope)), **dataclasses.asdict(self.rope)})


def load_config(arguments: Sequence[str], prog: str | None = None) -> TrainConfig:
    """Reads a run's configuration.

    Args:
      arguments: `--config_path FILE` and any `--dotted.key value`.
      prog: the command's name in its help.

    Returns:
      The configuration, every value checked by itself (not yet against the model and the data).
    Raises:
      InputError: unreadable file, unknown or missing key, wrong type, unknown scheme, value out of range.
    """
    _check_arguments(arguments)
    try:
        config = draccus.parse(TrainConfig, args=list(arguments), prog=prog, exit_on_error=False)
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
    except (draccus.ParsingError, draccus.utils.DraccusException, argparse.ArgumentError, yaml.YAMLError) as error:
        raise InputError(" ".join(str(error).split())) from error
    _check_values(config)
    return config


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return draccus.dump(config)


def config_differences(written: Path, config: TrainConfig) -> list[str]:
    """Names the keys in which a run's configuration differs from the one that its directory was begun with.

    Args:
      written: the run's `config.yaml`.
      config: the configuration now.

    Returns:
      Top-level and second-level keys; those that change nothing of the result (`overwrite`, `checkpoint`) are left out.
    """
    before, now = (
        {
            f"{key}.{inner}" if isinstance(value, dict) else key: (value[inner] if isinstance(value, dict) else value)
            for key, value in yaml.safe_load(text).items()
            for inner in (value if isinstance(value, dict) else [""])
        }
        for text in (written.read_text(), dump_config(config))
    )
    keys = sorted({*before, *now})
    return [
        key
        for key in keys
        if before.get(key) != now.get(key) and key != "overwrite" and not key.startswith("checkpoint.")
    ]


def _check_arguments(arguments: Sequence[str]) -> None:
    """Names the nearest key for one that does not exist, in the file and on the command line."""
    if "--help" in arguments or "-h" in arguments:
        return
    raw: dict[str, Any] = {}
    pairs = [argument for argument in arguments if argument.startswith("--")]
    paths = [
        argument.partition("=")[2] or following
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=True)
        if argument.partition("=")[0] == "--config_path"
    ]
    if paths:
        path = paths[-1]
        try:
            with open(path, encoding="utf-8") as file:
                raw = draccus.cfgparsing.load_config(file, file=path) or {}
        except OSError as error:
            raise InputError(f"cannot read the configuration {path!r}: {error.strerror}") from error
        except (yaml.YAMLError, draccus.utils.DraccusException) as error:
            raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(raw, dict):
            raise InputError(f"{path} holds a {type(raw).__name__}; a mapping of configuration keys is needed")
    for argument in pairs:
        key = argument[2:].partition("=")[0]
        if key == "config_path":
            continue
        level = raw
        *parents, leaf = key.split(".")
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise InputError(f"--{key}: {parent!r} holds a value, not keys")
        if leaf == "type":  # the value decides which keys are right
            level[leaf] = dict(zip(arguments, [*arguments[1:], ""], strict=True)).get(argument, "")
        else:
            level.setdefault(leaf, None)
    _check_keys(raw, TrainConfig, "")


def _check_keys(raw: Mapping[str, Any], kind: Any, path: str) -> None:
    if isinstance(kind, type) and issubclass(kind, RopeConfig):
        choices = RopeConfig.get_known_choices()
        if "type" not in raw:
            raise InputError(
                f"{path.rstrip('.')} has no key 'type': one of {', '.join(RopeConfig.get_known_choices())}"
            )
        if raw["type"] not in choices:
            raise unknown_name("rotary scheme", str(raw["type"]), choices)
        kind = RopeConfig.get_choice_class(raw["type"])
        raw = {key: value for key, value in raw.items() if key != "type"}
    hints = typing.get_type_hints(kind)
    known = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    for key, value in raw.items():
        if key not in known:
            raise unknown_name("configuration key", f"{path}{key}", [f"{path}{name}" for name in known])
        if dataclasses.is_dataclass(known[key]) or known[key] is RopeConfig:
            if not isinstance(value, Mapping):
                raise InputError(f"configuration key '{path}{key}' takes a mapping, not {value!r}")
            _check_keys(value, known[key], f"{path}{key}.")
        elif value is not None:
            _check_type(f"{path}{key}", value, known[key])


def _check_type(key: str, value: Any, kind: Any) -> None:
    """YAML knows the types already: what draccus would convert silently (a string to a number) is a mistake."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if any(typing.get_origin(k) is Literal for k in kinds):
        choices = [str(c) for k in kinds for c in typing.get_args(k)]
        if value not in choices:
            raise unknown_name(f"value of '{key}'", str(value), choices)
        return
    plain = tuple(typing.get_origin(k) or k for k in kinds)
    # YAML 1.1 reads 2e-5 as a string; it is a number all the same.
    if float in plain and _is_number(value):
        return
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        names = " or ".join("null" if k is types.NoneType else k.__name__ for k in plain)
        raise InputError(f"configuration key '{key}' takes {names}, not {value!r}")


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _check_values(config: TrainConfig) -> None:
    recipe, compute = config.recipe, config.compute
    positive = {
        "window": config.window,
        "recipe.epochs": recipe.epochs,
        "recipe.batch_size": recipe.batch_size,
        "recipe.learning_rate": recipe.learning_rate,
        "recipe.clip_norm": recipe.clip_norm,
        "compute.microbatch_size": compute.microbatch_size,
        "compute.loss_chunk": compute.loss_chunk,
        "recipe.steps": recipe.steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise InputError(f"configuration key '{key}' is {value}; a positive number is needed")
    for key, beta in {"recipe.beta1": recipe.beta1, "recipe.beta2": recipe.beta2}.items():
        if not 0 <= beta < 1:
            raise InputError(f"configuration key '{key}' is {beta}; a number in [0, 1) is needed")
    if recipe.warmup_steps < 0 or recipe.weight_decay < 0:
        raise InputError("recipe.warmup_steps and recipe.weight_decay cannot be negative")
    config.scheme  # noqa: B018 - building it checks the scheme's own values


def total_steps(recipe: RecipeConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run.

    Args:
      recipe: the recipe.
      steps_per_epoch: floor(samples / batch_size): the last incomplete batch of an epoch is dropped.

    Returns:
      `recipe.steps` where that is set, else epochs x steps_per_epoch.
    Source: paper, section 4.1: 100 samples, batch 32, 2 epochs: 6 steps.
    """
    return recipe.steps or recipe.epochs * steps_per_epoch


def check_window(config: TrainConfig, base: LlamaConfig) -> None:
    """Refuses an extension that extends nothing.

    Args:
      config: the run.
      base: the model that the run starts from.

    Raises:
      InputError: the window is not larger than the model's, or the scheme was told of a larger pretrained window.
    """
    if config.recipe.objective == "extend" and config.window <= base.max_position_embeddings:
        raise InputError(
            f"window {config.window} is not larger than the model's own window {base.max_position_embeddings}: "
            "nothing to extend"
        )
    told = config.scheme.to_dict().get("pretrained_window", 0)
    if told > base.max_position_embeddings:
        raise InputError(
            f"rope.pretrained_window {told} is larger than the model's own window {base.max_position_embeddings}"
        )
