"""The model card of an exported model: README.md with what was done to it, how to run it, and how well it does."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from eabf_jax.errors import InputError
from eabf_jax.interop.directory import read_json_object
from eabf_jax.interop.layout import shapes
from eabf_jax.interop.native import CONFIG_FILE, DATASET_FILE, EVALUATION, METRICS_FILE
from eabf_jax.model.config import LlamaConfig
from eabf_jax.rope import needs_remote_code, to_hf


def model_card(source: Path, config: LlamaConfig, step: int) -> str:
    """Writes the card of a model.

    Args:
      source: the native directory or run that it comes from. Of a run, `config.yaml`, `dataset.json` and
        `metrics.jsonl` tell of the training, and `evaluation/*.json` (reports of `eabf evaluate --json`) of the result.
      config: its shape and rotary scheme.
      step: the checkpoint that it is of.

    Returns:
      Markdown with the front matter that the Hugging Face Hub reads.
    Raises:
      InputError: one of those files is damaged.
    """
    own_code = needs_remote_code(to_hf(config.rope, head_dim=config.head_dim))
    facts = {
        "parameters": f"{sum(math.prod(shape) for shape in shapes(config).values()):,}",
        "context window": f"{config.max_position_embeddings:,} tokens",
        "rotary scheme": _settings(config.rope.to_dict()),
    }
    # A converted model's only checkpoint is step 0, and it has no run's configuration beside it.
    if step and (source / CONFIG_FILE).is_file():
        facts |= _training(source, step)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["long-context", "llama"]}
    if own_code:
        front["tags"].append("custom_code")  # type: ignore[attr-defined]  # the values are not of one type
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {source.absolute().name}", ""]
    lines += _table(["", ""], [[name, value] for name, value in facts.items()])
    code = ", trust_remote_code=True" if own_code else ""
    lines += ["## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f'model = AutoModelForCausalLM.from_pretrained("DIRECTORY"{code})']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")']
    lines += ['inputs = tokenizer("The history of", return_tensors="pt")']
    lines += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))", "```", ""]
    if own_code:
        lines += [
            "The directory brings the code of its rotary scheme, which transformers does not have. Software that knows",
            "only `llama` models refuses it rather than leave the scheme out.",
            "",
        ]
    evaluation = [line for path in sorted((source / EVALUATION).glob("*.json")) for line in _evaluation(path)]
    lines += ["## Evaluation", "", *evaluation] if evaluation else []
    return "\n".join(lines).rstrip() + "\n"


def _evaluation(path: Path) -> list[str]:
    """The table of a report; nothing of a file that has none."""
    table = read_json_object(path).get("table")
    if table is None:
        return []
    try:
        return [f"{table['title']}:", "", *_table(table["header"], table["rows"])]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its table is not that of a report of `eabf evaluate` ({error!r:.100})") from error


def _training(run: Path, step: int) -> dict[str, str]:
    """What a run's files tell of how the model was made."""
    try:
        config = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
        model, data, recipe = config["model"], config["data"], config["recipe"]
        facts = {
            "made from": str(model["path"]),
            "data": str(data["directory"]),
            "training": f"{step} optimizer steps, batch {recipe['batch_size']}, AdamW "
            f"({recipe['beta1']}, {recipe['beta2']}), weight decay {recipe['weight_decay']}, peak learning rate "
            f"{recipe['learning_rate']:g}, {recipe['schedule']}",
        }
        if config.get("lora"):
            facts["training"] += f"; adapters of rank {config['lora']['rank']}, merged"
        split = data["split"]
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{run / CONFIG_FILE}: not the configuration of a run ({error!r:.100})") from error
    facts["data"] += _counts(run / DATASET_FILE, split)
    loss = _loss(run / METRICS_FILE, step)
    if loss is not None:
        facts["loss of the last step"] = f"{loss:.3f} nats per token"
    return facts


def _counts(path: Path, split: str) -> str:
    """What a dataset tells of the split that was trained on; runs from before it was kept tell nothing."""
    if not path.is_file():
        return ""
    try:
        found = read_json_object(path)["splits"][split]
        return f": {found['records']:,} conversations, {found['tokens']:,} tokens, loss on {found['response_tokens']:,}"
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not what a dataset tells of its split {split!r} ({error!r:.100})") from error


def _loss(path: Path, step: int) -> float | None:
    """The loss that a run's metrics have for a step."""
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was cut off
        if entry.get("step") == step:
            return float(entry["loss"])
    return None


def _settings(values: dict[str, Any]) -> str:
    """A scheme's dictionary as people read it."""

    def shown(value: Any) -> str:
        if isinstance(value, dict):
            return f"({_settings(value)})"
        return f"{int(value) if value == int(value) else value:,}"

    rest = (f"{name} {shown(value)}" for name, value in values.items() if name != "type" and value is not None)
    return ": ".join(filter(None, (values["type"], ", ".join(rest))))


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(map(_cell, row)) + " |" for row in cells), ""]


def _cell(text: str) -> str:
    """Text that stays in its cell: a table's row is one line, and a bar ends a cell."""
    return " ".join(str(text).split()).replace("|", r"\|")
