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
    reports = [read_json_object(path) for path in sorted((source / EVALUATION).glob("*.json"))]
    tables = [report["table"] for report in reports if isinstance(report.get("table"), dict)]
    for number, table in enumerate(tables):
        lines += [*(["## Evaluation", ""] if number == 0 else []), f"{table['title']}:", ""]
        lines += _table(table["header"], table["rows"])
    return "\n".join(lines).rstrip() + "\n"


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
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{run / CONFIG_FILE}: not the configuration of a run ({error!r:.100})") from error
    if config.get("lora"):
        facts["training"] += f"; adapters of rank {config['lora']['rank']}, merged"
    if (run / DATASET_FILE).is_file():
        found = read_json_object(run / DATASET_FILE)
        split = found.get("splits", {}).get(data["split"], {})
        if split:
            facts["data"] += f": {split['records']:,} conversations, {split['tokens']:,} tokens, loss on"
            facts["data"] += f" {split['response_tokens']:,}"
    if loss := _loss(run / METRICS_FILE, step):
        facts["loss of the last step"] = f"{loss:.3f} nats per token"
    return facts


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
    return [*("| " + " | ".join(map(str, row)) + " |" for row in cells), ""]
