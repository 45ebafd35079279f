"""The configuration of a run: typed, read from YAML, every key open to `--dotted.key value` on the command line.

The defaults are the recipe of the paper (arXiv 2401.07004, section 4.1, the runs with fewer than 3.5k samples).
"""

import copy
import dataclasses
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import draccus
import yaml
from draccus.parsers.yaml_loader import SafeLoaderWithInclusion

from eabf_jax.destination import check_name
from eabf_jax.errors import InputError
from eabf_jax.fields import Text, build
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.lora import Lora
from eabf_jax.parallel.mesh import MeshConfig
from eabf_jax.reading import parse_yaml, read_text, reading
from eabf_jax.rope import Scheme, parameters_of, scheme_names
from eabf_jax.rope.registry import unknown_scheme

# Keys whose numbers must be positive if they are set.
_POSITIVE = (
    "window", "model.window", "data.samples", "recipe.epochs", "recipe.batch_size", "recipe.learning_rate",
    "recipe.clip_norm", "compute.microbatch_size", "compute.loss_chunk", "recipe.steps",
    "checkpoint.every_steps", "checkpoint.keep",
)  # fmt: skip


class RopeConfig(draccus.ChoiceRegistry):
    """A rotary scheme by `type`; each scheme's parameters are those of `eabf_jax.rope.scheme`."""

    @classmethod
    def get_choice_class(cls, name: str) -> Any:
        """Returns the configuration class of a scheme."""
        choices = cls.get_known_choices()
        if isinstance(name, str) and name not in choices:
            raise unknown_scheme(name)
        return choices[name]

    @classmethod
    def get_known_choices(cls) -> dict[str, Any]:
        """Returns the configuration class of every scheme registered so far."""
        choices: dict[str, Any] = super().get_known_choices()
        for name in scheme_names():
            if name not in choices:
                RopeConfig.register_subclass(name, _rope_config(name))
        return choices


def _rope_config(name: str) -> type:
    fields: list[Any] = [
        (key, kind) if default is dataclasses.MISSING else (key, kind, dataclasses.field(default=default))
        for key, (kind, default) in parameters_of(name).items()
    ]
    fields.sort(key=len)  # dataclasses need the fields without a default first
    return dataclasses.make_dataclass(f"{name}_rope", fields, bases=(RopeConfig,))


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
    # fields of LlamaConfig (HF names); not needed if `path` is a directory, with which they must agree
    shape: dict[str, Any] | None = None
    window: int | None = None  # tokens; makes the model count as one with this smaller window; null: its own
    tokenizer: str | None = None  # directory with the tokenizer to keep beside the model; null: the one in `path`


@dataclasses.dataclass
class DataConfig:
    """The dataset to train on, written by `eabf prepare`."""

    directory: str = "data"  # the dataset's directory
    split: str = "train"  # its split
    samples: int | None = None  # number of the split's records to train on, from the first; null: all


@dataclasses.dataclass
class RecipeConfig:
    """The objective, the schedule and the optimizer."""

    # extend: loss on the assistant's tokens, one conversation per row; pretrain: loss on every token, packed rows
    objective: Literal["extend", "pretrain"] = "extend"
    epochs: int = 2  # paper
    steps: int | None = None  # optimizer steps; null: epochs x floor(samples / batch_size), as in the paper
    batch_size: int = 32  # sequences per step over all devices; paper: 32 below 3.5k samples, 128 at 3.5k
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
    """How the step is computed; none of these settings changes what is computed."""

    # dtype of the matrix products; parameters, gradients and moments are float32
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attention: str = "auto"  # auto, reference, chunked, cudnn or splash
    # program: the step is one program (TPU, CPU); layerwise: one program per layer (GPU); auto: by platform
    executor: Literal["auto", "program", "layerwise"] = "auto"
    # what each layer keeps for the backward pass: full (only its input), attention, qkv, dots (no matrix product is
    # computed twice), offload (as dots, in host memory; layerwise only) or none (everything); dots:12,qkv mixes two
    # (the first 12 layers dots, the others qkv); auto: the fastest that fits (eabf compile shows it)
    remat: str = "auto"
    # where float32 master weights and AdamW moments are kept: device, host (layerwise only) or auto
    optimizer_memory: Literal["auto", "device", "host"] = "auto"
    # sequences that a device computes at a time; gradients are accumulated in float32
    microbatch_size: int | Literal["auto"] = 1
    loss_chunk: int = 4096  # tokens of a row whose logits are in memory at a time
    # when devices that share parameters gather them: for each layer, or (layerwise only) once per step, which takes
    # more memory; auto: once per step if that fits
    gather: Literal["auto", "layer", "step"] = "auto"


@dataclasses.dataclass
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int | None = 1  # null: at the end (and when preempted) only
    keep: int = 1  # number of newest checkpoints to keep


@dataclasses.dataclass
class TrainConfig:
    """One training run."""

    output: str  # directory of the run: model.json, tokenizer, checkpoints, metrics; itself a native model directory
    window: int  # tokens per row; the target window
    rope: RopeConfig
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    lora: Lora | None = None  # low-rank adapters, saved alone; null: every parameter is trained
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    recipe: RecipeConfig = dataclasses.field(default_factory=RecipeConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    mesh: MeshConfig | Literal["auto"] = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    overwrite: bool = False  # start over: replace the run in the output directory, but leave other files there
    # true in every process of a pod or cluster; outside of TPU pods, SLURM, Open MPI and Kubernetes, each process needs
    # JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    distributed: bool = False

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
      The configuration; its values are not yet checked against the model and the data.
    Raises:
      InputError: unreadable file, unknown or missing key, wrong type, unknown scheme, value out of range.
      SystemExit: after `--help`.
    """
    if "--help" in arguments or "-h" in arguments:
        _print_help(prog)
    overrides = _overrides(arguments)
    path = overrides.pop("config_path", None)
    return configure(path, {key: Text(text) for key, text in overrides.items()})


def configure(path: str | None, changes: Mapping[str, Any]) -> TrainConfig:
    """Reads a run's configuration from a file, with some of its values replaced.

    Args:
      path: the file; None for a configuration of `changes` alone.
      changes: values by dotted key, as YAML gives them; later ones replace earlier ones.

    Returns:
      The configuration; its values are not yet checked against the model and the data.
    Raises:
      InputError: as for `load_config`.
    """
    values = _read_file(path) if path is not None else {}
    for key, value in changes.items():
        _override(values, key, copy.deepcopy(value))
    _settle_missing(values)
    config = build(TrainConfig, values, "configuration key")
    _check_values(config)
    return config


def dump_config(config: TrainConfig) -> str:
    """Returns the configuration as YAML that `load_config` can read."""
    return draccus.dump(config)


def config_differences(written: Path, config: TrainConfig) -> list[str]:
    """Lists the keys in which a configuration differs from the one written in a run's directory.

    Returns:
      Keys such as "recipe.seed", without those that change only how, where or when something is computed or saved.
    Raises:
      InputError: the file is not a configuration.
    """
    try:
        with reading(written, "not a run's configuration"):
            before = _flat(parse_yaml(read_text(written), written))
    except InputError as error:
        raise InputError(
            f"{written} is not a run's configuration; pass --overwrite true to start over, or name another directory"
        ) from error
    now = lasting_values(config)
    return [key for key in sorted({*before, *now}) if not _is_free(key) and before.get(key) != now.get(key)]


def lasting_values(config: TrainConfig) -> dict[str, Any]:
    """Returns the values of keys such as "recipe.seed", without those that `config_differences` leaves out."""
    values = _flat(parse_yaml(dump_config(config), "the configuration"))
    return {key: value for key, value in values.items() if not _is_free(key)}


def is_written_config(path: Path) -> bool:
    """Returns whether `dump_config` wrote a file, so that it marks a run; handwritten ones lack some section."""
    try:
        found = parse_yaml(read_text(path), path)
    except (OSError, InputError):
        return False
    return isinstance(found, dict) and {field.name for field in dataclasses.fields(TrainConfig)} <= found.keys()


def _is_free(key: str) -> bool:
    """Returns whether a run can be resumed with another value of a key."""
    section = key.partition(".")[0]
    return section in ("checkpoint", "compute", "distributed", "mesh", "overwrite") and key != "compute.dtype"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens sections: their values get keys of the form `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _print_help(prog: str | None) -> NoReturn:
    """Prints every key with its comment, without draccus's options to read a section from a file."""
    parser = draccus.argparsing.ArgumentParser(config_class=TrainConfig, prog=prog).parser
    parser.usage = "%(prog)s --config_path FILE [--import FILE] [--dotted.key VALUE ...]"
    text = "\n".join(line for line in parser.format_help().splitlines() if "Config file for" not in line)
    # draccus lists a section that may be null or a word twice, the first time without its keys.
    print(re.sub(r"^(?:Optional|Union) \[.*\n\n?.*\n\n", "", text, flags=re.MULTILINE))
    raise SystemExit(0)


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Parses `--key value` and `--key=value`; the last value of a repeated key counts."""
    found: dict[str, str] = {}
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--"):
            raise InputError(f"unexpected argument {argument!r}: --config_path FILE or --dotted.key value is needed")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise InputError(f"--{key} has no value: --{key} VALUE is needed")
        found[key] = value
    return found


class _Loader(SafeLoaderWithInclusion):
    """A YAML loader whose `!include FILE` reads a file beside the source, or else one of this package."""


class _Missing(str):
    """The value of a missing included file: the error message, raised only if the value is needed."""


def _read_yaml(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        return parse_yaml(file, path, _Loader)


def _include(loader: Any, node: yaml.ScalarNode) -> Any:
    source, name = Path(loader.stream.name), str(node.value)
    for folder in (source.parent, _PACKAGE):
        if (folder / name).is_file():
            return _read_yaml(folder / name)
    known = ", ".join(sorted(str(path.relative_to(_PACKAGE)) for path in _PACKAGE.glob("shapes/*.yaml")))
    return _Missing(
        f"{source} includes {name}, which is neither beside it nor one of the package's own ({known}); if "
        "model.path is a directory, model.shape can be left out"
    )


_Loader.add_constructor("!include", _include)
_PACKAGE = Path(__file__).parent


def _settle_missing(values: dict[str, Any]) -> None:
    """Drops a missing shape file if `model.path` is a directory; raises InputError for any other missing file."""
    model = values.get("model")
    if isinstance(model, dict) and isinstance(model.get("shape"), _Missing) and Path(str(model.get("path"))).is_dir():
        model["shape"] = None
    remaining = [values]
    while remaining:
        for value in remaining.pop().values():
            if isinstance(value, _Missing):
                raise InputError(value)
            if isinstance(value, dict):
                remaining.append(value)


def _read_file(path: str) -> dict[str, Any]:
    try:
        values = _read_yaml(Path(path))
    except OSError as error:
        raise InputError(f"cannot read the configuration {str(error.filename)!r}: {error.strerror}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {values!r:.60}; a mapping of configuration keys is needed")
    return values


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"--{key}: the configuration's {parent!r} is {values!r}, which has no keys")
    values[leaf] = value


def _check_values(config: TrainConfig) -> None:
    for key in _POSITIVE:
        value = operator.attrgetter(key)(config)
        if value not in (None, "auto") and not value > 0:
            raise InputError(f"configuration key '{key}' is {value}; a positive number is needed")
        if isinstance(value, int) and value >= 2**31:
            raise InputError(f"configuration key '{key}' is {value}; a number below 2**31 is needed")
    check_name(config.output)
    for key in ("recipe.beta1", "recipe.beta2"):
        beta = operator.attrgetter(key)(config)
        if not 0 <= beta < 1:
            raise InputError(f"configuration key '{key}' is {beta}; a number in [0, 1) is needed")
    for key in ("recipe.warmup_steps", "recipe.weight_decay", "recipe.epsilon", "recipe.seed"):
        value = operator.attrgetter(key)(config)
        if value < 0:
            raise InputError(f"configuration key '{key}' is {value}; a number that is not negative is needed")
    if config.recipe.seed >= 2**32:
        raise InputError(f"configuration key 'recipe.seed' is {config.recipe.seed}; a number below 2**32 is needed")
    config.scheme  # noqa: B018 - building it checks the scheme's own values


def total_steps(recipe: RecipeConfig, steps_per_epoch: int) -> int:
    """Returns the optimizer steps of a run: `recipe.steps` if that is set, else epochs x steps_per_epoch.

    Args:
      steps_per_epoch: floor(samples / batch_size): the last incomplete batch of an epoch is dropped.

    Source: paper, section 4.1: 100 samples, batch 32, 2 epochs: 6 steps.
    """
    return recipe.steps or recipe.epochs * steps_per_epoch


def check_window(config: TrainConfig, base: LlamaConfig) -> None:
    """Refuses an extension that does not enlarge the window.

    Raises:
      InputError: the window is not larger than the model's, or the scheme's `pretrained_window` is larger.
    """
    if config.recipe.objective == "extend" and config.window <= base.max_position_embeddings:
        raise InputError(
            f"window {config.window} is not larger than the model's own window {base.max_position_embeddings}: "
            "nothing to extend; set model.window to make the model count as one with a smaller window"
        )
    values = config.scheme.to_dict()
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]  # of a composition, two schemes
    told = max(part.get("pretrained_window", 0) for part in parts)
    if told > base.max_position_embeddings:
        raise InputError(
            f"rope.pretrained_window {told} is larger than the model's own window {base.max_position_embeddings}"
        )
