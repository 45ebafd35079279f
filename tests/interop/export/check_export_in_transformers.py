"""Checks exported models in the installed transformers: forward, cache, left padding, generate.

Needs only torch and transformers. Run `python check_export_in_transformers.py DIR` on the output of
write_export_references.py. Prints one line per model, and fails on the first difference.
"""

import inspect
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

TOLERANCE = 1e-4  # the project's promise for float32 logits


def check(directory: Path, attention: str) -> float:
    """Runs every check on one exported model; returns the largest difference from the reference logits."""
    references = np.load(directory / "references.npz")
    tokens = torch.tensor(references["tokens"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    # Neither dtype nor torch_dtype: no release takes both, and float32 is what is stored.
    model = load(directory, trust_remote_code=True, attn_implementation=attention).eval()
    assert model.dtype == torch.float32, model.dtype
    ours = hasattr(model.config, "eabf_scheme")
    assert type(model).__name__ == ("EabfLlamaForCausalLM" if ours else "LlamaForCausalLM"), type(model)
    worst = 0.0
    with torch.no_grad():
        # The short text first: from 5.0 to at least 5.12, transformers' `dynamic` keeps frequencies of a longer one.
        for key in ("short_logits", "logits"):
            if key in references:
                ids = tokens[:, : references[key].shape[1]]
                worst = max(worst, difference(model(ids).logits, references[key]))
                worst = max(worst, difference(model(ids, use_cache=False).logits, references[key]))
        # Compares cached decoding with our full forward, if both compute the same.
        follows_length = "short_logits" in references
        if follows_length and not ours:
            return worst  # transformers' dynamic scheme keeps old rotations in its cache, and follows the longest row
        if not follows_length or model.config.num_hidden_layers == 1:
            cached_difference(model, tokens, None if follows_length else references["logits"])
        padded_difference(model, tokens)
        generated(model, tokens, follows_length)
    return worst


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    """Returns the largest absolute difference, which must be within the tolerance."""
    worst = float(np.abs(found.float().numpy() - np.asarray(expected)).max())
    assert worst < TOLERANCE, f"logits differ by {worst:.3g}"
    return worst


def cached_difference(model: torch.nn.Module, tokens: torch.Tensor, logits: np.ndarray | None) -> None:
    """Feeds a prompt, then alternately one and three tokens; all logits must equal those of a full forward."""
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # renamed in 5.24
    out = model(tokens[:, :11], use_cache=True)
    for start in range(11, tokens.shape[1], 4):  # beyond the window
        for chunk in (tokens[:, start : start + 1], tokens[:, start + 1 : start + 4]):
            if chunk.shape[1]:
                out = model(chunk, **{name: getattr(out, name)}, use_cache=True)
        if logits is not None:
            difference(out.logits[:, -1], logits[:, min(start + 4, tokens.shape[1]) - 1])
    difference(out.logits[:, -1], model(tokens, use_cache=False).logits[:, -1].numpy())


def padded_difference(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Generates from a left-padded batch; each row must continue as it does alone."""
    short, long = tokens[0, :13], tokens[1, :29]
    batch = torch.full((2, 29), 2)
    batch[0, 16:], batch[1] = short, long
    mask = torch.ones_like(batch)
    mask[0, :16] = 0
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    together = model.generate(batch, attention_mask=mask, **settings)
    for row, alone in enumerate((short, long)):
        single = model.generate(alone[None], attention_mask=torch.ones_like(alone)[None], **settings)
        assert together[row, 29:].tolist() == single[0, len(alone) :].tolist(), f"row {row} differs when padded"


def generated(model: torch.nn.Module, tokens: torch.Tensor, follows_length: bool) -> None:
    """Compares greedy generation with the repeated argmax of full forwards (static schemes or a single layer)."""
    if follows_length and model.config.num_hidden_layers > 1:
        return
    prompt = tokens[:1, :10]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": 2}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    expected = prompt
    for _ in range(12):
        logits = model(expected, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # min_new_tokens forbids the end
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    assert found.tolist() == expected.tolist(), "generate differs from repeated full forwards"
    if follows_length:  # other schemes use transformers' cache as it is
        settings["cache_implementation"] = "static"
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert found.tolist() == expected.tolist(), "generate with a static cache differs from repeated full forwards"


def main(root: Path) -> None:
    """Checks every exported model under a directory."""
    directories = sorted(path.parent for path in root.glob("*/references.npz"))
    torch.set_num_threads(1)  # in such small models, threads only wait for each other
    assert directories, f"no references.npz under {root}"
    old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 51)
    for directory in directories:
        config = json.loads((directory / "config.json").read_text())
        if old and any(kind in str(config["rope_scaling"]) for kind in ("yarn", "longrope")):
            continue  # these releases compute YaRN's ramp from the extended window, and keep one of LongRoPE's lists
        for attention in ("eager", "sdpa") if "eabf_scheme" in config else ("sdpa",):
            worst = check(directory, attention)
            print(f"transformers {transformers.__version__} {directory.name} {attention}: {worst:.2g}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
