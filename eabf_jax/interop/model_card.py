"""Writes the model card (README.md) of an exported model: its origin and training, its use, and its evaluation."""

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from eabf_jax.errors import InputError
from eabf_jax.interop.architectures import rotary_keys
from eabf_jax.interop.directory import read_json_object
from eabf_jax.interop.native import CARD_FILE, CONFIG_FILE, DATASET_FILE, EVALUATION, METRICS_FILE
from eabf_jax.interop.tokenizer import has_tokenizer
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import parameter_count
from eabf_jax.reading import parse_json, parse_yaml, read_text, reading
from eabf_jax.rope import needs_remote_code

# Front matter that a card inherits from the source model's card; base_model may also come from the Hub's cache.
_PASSED_ON = ("license", "license_name", "license_link", "language", "datasets", "base_model")


def origin(directory: Path) -> dict[str, Any]:
    """Reads the origin of a model from its directory, under the keys of a card's front matter.

    Args:
      directory: of a Hugging Face or a native model.

    Returns:
      Those of license, languages, datasets and base model that its README.md names. If the directory lies in the Hub's
      cache, the base model is instead its name on the Hub.
    """
    try:
        text = read_text(directory / CARD_FILE)
        front = REGEX_YAML_BLOCK.search(text)
        told = parse_yaml(front[2], directory / CARD_FILE) if front else {}
        known = {key: told[key] for key in _PASSED_ON if _is_name(told.get(key))} if isinstance(told, dict) else {}
    except (OSError, InputError):
        known = {}  # no card, or some other README
    name = _hub_name(directory)
    return known | ({"base_model": name} if name else {})


def _is_name(value: Any) -> bool:
    """Returns whether a value of a card's front matter is text or a list of texts, and not empty."""
    return bool(value) and all(isinstance(part, str) for part in (value if isinstance(value, list) else [value]))


def _hub_name(directory: Path) -> str | None:
    """Returns the name of a model on the Hub if this is its directory in the Hub's cache."""
    found = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/[^/]+$", directory.absolute().as_posix())
    return f"{found[1]}/{found[2]}" if found else None


def write_origin(source: Path, destination: Path) -> None:
    """Writes the `origin` of a model to a converted model's directory, as the front matter of a README.md."""
    known = origin(source)
    if known:
        text = f"---\n{ModelCardData(**known).to_yaml()}\n---\n"
        (destination / CARD_FILE).write_text(text, encoding="utf-8")


def model_card(source: Path, name: str, config: LlamaConfig, step: int) -> str:
    """Makes the card of an exported model.

    Args:
      source: the exported native directory or run. The training is described from a run's `config.yaml`,
        `dataset.json` and `metrics.jsonl`, the evaluation from `evaluation/*.json` (reports of `eabf evaluate --json`).
      name: of the exported directory.
      config: the model's shape and rotary scheme.
      step: the exported checkpoint.

    Returns:
      Markdown with the front matter that the Hugging Face Hub reads.

    Raises:
      InputError: one of those files is damaged.
    """
    own_code = needs_remote_code(rotary_keys(config))
    facts = {
        "parameters": f"{parameter_count(config):,}",
        "context window": f"{config.max_position_embeddings:,} tokens",
        "rotary scheme": _settings(config.rope.to_dict()),
    }
    known = origin(source)
    # A converted model has only a checkpoint of step 0 and no configuration of a run.
    if step and (source / CONFIG_FILE).is_file():
        told, known = _training(source, step)
        facts |= told
    tags = ["long-context", config.model_type, config.rope.name, *(["custom_code"] if own_code else [])]
    front = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags, **known)
    lines = ["---", front.to_yaml(), "---", "", f"# {name}", ""]
    lines += _table(["", ""], [[fact, value] for fact, value in facts.items()])
    code = ", trust_remote_code=True" if own_code else ""
    lines += ["## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f"directory = {json.dumps(name)}  # the path of this directory, or its name on the Hub"]
    lines += [f"model = AutoModelForCausalLM.from_pretrained(directory{code})"]
    if has_tokenizer(source):
        configured = ", config=model.config" if own_code else ""  # otherwise transformers 5 asks about the code again
        lines += [f"tokenizer = AutoTokenizer.from_pretrained(directory{configured})"]
        lines += ['inputs = tokenizer("The history of", return_tensors="pt")']
        lines += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"]
    lines += ["```", ""]
    if own_code:
        lines += [
            "The directory includes the code of its rotary scheme, because transformers lacks it. Software that knows",
            "only `llama` models refuses this model instead of ignoring the scheme.",
            "",
        ]
    evaluation = [line for path in sorted((source / EVALUATION).glob("*.json")) for line in _evaluation(path)]
    lines += ["## Evaluation", "", *evaluation] if evaluation else []
    return "\n".join(lines).rstrip() + "\n"


def _evaluation(path: Path) -> list[str]:
    """Returns the lines of a report's table; none if it has no table."""
    table = read_json_object(path).get("table")
    if table is None:
        return []
    with reading(path, "its table is not one of an `eabf evaluate` report"):
        return [f"{table['title']}:", "", *_table(table["header"], table["rows"])]


def _training(run: Path, step: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns facts about the training from a run's files, and the front matter that follows from them."""
    with reading(run / CONFIG_FILE, "not the configuration of a run"):
        config = parse_yaml(read_text(run / CONFIG_FILE), run / CONFIG_FILE)
        model, data, recipe = config["model"], config["data"], config["recipe"]
        known = {} if model["path"] is None else origin(Path(model["path"]))
        rows = step * recipe["batch_size"]
        facts = {
            "made from": "random parameters" if model["path"] is None else _name(model["path"]),
            "data": _name(data["directory"]),
            "trained on": f"{_count(rows, 'row')} of at most {config['window']:,} tokens",
            "training": f"{_count(step, 'optimizer step')}, batch {recipe['batch_size']}, AdamW "
            f"({recipe['beta1']}, {recipe['beta2']}), weight decay {recipe['weight_decay']}, peak learning rate "
            f"{recipe['learning_rate']:g}, {recipe['schedule']}",
        }
        if config.get("lora"):
            facts["training"] += f"; adapters of rank {config['lora']['rank']}, merged"
        split = data["split"]
    size, language = _dataset(run / DATASET_FILE, split)
    facts["data"] += size
    steps = _steps(run / METRICS_FILE, step)
    with reading(run / METRICS_FILE, "not the metrics of a run"):
        trained = [found["trained_tokens"] for found in steps.values() if "trained_tokens" in found]
        if len(trained) == step:
            facts["trained on"] += f", with the loss on {_count(sum(trained), 'token')}"
        if step in steps:
            facts["loss of the last step"] = f"{steps[step]['loss']:.3f} nats per token"
    return facts, language | known


def _name(path: str) -> str:
    """Returns a directory's own name, so that a card does not publish paths of the training machine."""
    return _hub_name(Path(path)) or Path(os.path.abspath(path)).name


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _dataset(path: Path, split: str) -> tuple[str, dict[str, Any]]:
    """Returns the size and sources of a dataset's training split, and the language; empty if there is no file."""
    if not path.is_file():
        return "", {}
    with reading(path, f"not a dataset's metadata with a split {split!r}"):
        values = read_json_object(path)
        found = values["splits"][split]
        size = f": {_count(found['records'], 'record')} of {_count(found['tokens'], 'token')} in all"
        sources = values.get("sources") or []
        more = f" and {_count(len(sources) - 3, 'other')}" if len(sources) > 3 else ""
        size += f", from {', '.join(sources[:3])}{more}" if sources else ""
        language = values.get("language", "any")
        return size, {} if language == "any" else {"language": str(language)}


def _steps(path: Path, last: int) -> dict[int, dict[str, Any]]:
    """Returns a run's metrics by step, up to the last step."""
    if not path.is_file():
        return {}
    steps = {}
    for line in read_text(path).splitlines():
        try:
            entry = parse_json(line, path)
        except InputError:
            continue  # the last line of an interrupted run may be incomplete
        step = entry.get("step") if isinstance(entry, dict) else None
        if type(step) is int and 1 <= step <= last:
            steps[step] = entry
    return steps


def _settings(values: dict[str, Any]) -> str:
    """Formats a scheme's dictionary for people."""

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return f"({_settings(value)})"
        if isinstance(value, list):
            return f"[{', '.join(map(shown, value))}]"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{int(value) if value == int(value) else value:,}"

    rest = (f"{name} {shown(value)}" for name, value in values.items() if name != "type" and value is not None)
    return ": ".join(filter(None, (values["type"], ", ".join(rest))))


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(map(_cell, row)) + " |" for row in cells), ""]


def _cell(text: str) -> str:
    """Makes text safe for a cell: on one line, with escaped bars."""
    return " ".join(str(text).split()).replace("|", r"\|")
