"""Exported models in transformers: forward, cache and generate give our logits (the same checks run in 4.46)."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from eabf_jax.interop.export import modeling_eabf_llama
from eabf_jax.rope import schemes

DYNAMIC = {"type": "dynamic_ntk", "base": 10_000.0, "factor": 2.0, "pretrained_window": 16}
EABF = {"type": "eabf", "base": 50_000.0, "pretrained_window": 16, "unscaled_layers": 0}
TOKENS = torch.arange(3, 43)[None]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    runpy.run_path(str(HERE / "write_export_references.py"))["write"](root)
    return root


def test_every_scheme_in_the_installed_transformers(exported: Path) -> None:
    # A process of its own: transformers caches remote code by file name, and torch its number of threads.
    command = [sys.executable, str(HERE / "check_export_in_transformers.py"), str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path.parent.name: json.loads(path.read_text()) for path in exported.glob("*/config.json")}
    own = {name for name, config in written.items() if "eabf_scheme" in config}
    assert written.keys() > {*scheme_names()} and own > {"slow_half", "sharp_slow_half", "widening"}
    assert (done.stdout.count("eager"), done.stdout.count("sdpa")) == (len(own), len(written))


def test_the_checks_can_fail(exported: Path) -> None:
    """Another window in the config must be noticed."""
    config = exported / "eabf" / "config.json"
    original = config.read_text()
    config.write_text(original.replace('"pretrained_window": 16', '"pretrained_window": 17'))
    check = runpy.run_path(str(HERE / "check_export_in_transformers.py"))["check"]
    try:
        with pytest.raises(AssertionError, match="logits differ by"):
            check(exported / "eabf", "eager")
    finally:
        config.write_text(original)


def tiny(scheme: dict[str, Any]) -> nn.Module:
    """A model of one layer with the exported code, built without a directory."""
    torch.manual_seed(0)
    config = modeling_eabf_llama.EabfLlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, eabf_scheme=scheme,
    )  # fmt: skip
    return modeling_eabf_llama.EabfLlamaForCausalLM(config).eval()


def renamed(self, hidden_states, position_embeddings=None, attention_mask=None, memory=None, **kwargs):
    """An attention whose cache has a name that no release has given it."""


def test_an_unknown_name_of_the_cache_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", renamed)
    with pytest.raises(RuntimeError, match=rf"transformers {transformers.__version__}: .*cache or past_key_values or"):
        tiny(DYNAMIC)
    tiny(EABF)  # leaves the cache to transformers


class Idle(nn.Module):
    """An attention that calls none of its projections, as with a fused one; or only some of them, and no cache."""

    def __init__(self, *called: nn.Module):
        super().__init__()
        self.called = called

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        for projection in self.called:
            projection(hidden_states)
        return hidden_states, None


@pytest.mark.parametrize("scheme", [DYNAMIC, EABF], ids=["dynamic_ntk", "eabf"])
def test_an_attention_that_passes_the_hooks_by_is_an_error(scheme: dict[str, Any]) -> None:
    model = tiny(scheme)
    attention = model.model.layers[0].self_attn
    attention.forward = Idle().forward
    with pytest.raises(RuntimeError, match="expected attention to call its q_proj"):
        model(TOKENS, use_cache=False)
    del attention.q_proj
    with pytest.raises(RuntimeError, match="expected attention with a projection q_proj"):
        model(TOKENS)


def test_an_attention_that_rotates_no_key_is_an_error() -> None:
    model = tiny(DYNAMIC)
    attention = model.model.layers[0].self_attn
    attention.forward = Idle(attention.q_proj).forward
    with pytest.raises(RuntimeError, match="expected attention to call its k_proj"):
        model(TOKENS, use_cache=False)
    with pytest.raises(RuntimeError, match="expected attention to call the update of the cache"):
        model(TOKENS, use_cache=True)


def test_arguments_of_attention() -> None:
    model = tiny(DYNAMIC)
    attention, x = model.model.layers[0].self_attn, torch.rand(1, 40, 16)
    rotation = model.model.rotary_emb(x, torch.arange(40)[None])
    by_name = attention(hidden_states=x, position_embeddings=rotation, attention_mask=None)[0]
    assert torch.equal(attention(x, rotation, None)[0], by_name)
    for wrong in ({}, {"position_embeddings": rotation[:2]}):
        with pytest.raises(RuntimeError, match="expected attention to be given position_embeddings"):
            attention(x, attention_mask=None, **wrong)
    with pytest.raises(RuntimeError, match=r"expected a cache in one of attention's arguments .*, found none"):
        attention(x, rotation, None, use_cache=True)
    with pytest.raises(RuntimeError, match="expected a transformers Cache, found dict"):
        attention(x, rotation, None, cache={})


def test_texts_packed_into_a_row_have_no_length_to_follow() -> None:
    model, positions = tiny(DYNAMIC), torch.cat((torch.arange(20), torch.arange(20)))[None]
    with pytest.raises(ValueError, match="give each text a row of its own"):
        model(TOKENS, position_ids=positions)
    assert torch.isfinite(tiny(EABF)(TOKENS, position_ids=positions).logits).all()


class Adapted(nn.Module):
    """A projection with something added to it, as adapters do after the model was built."""

    def __init__(self, base: nn.Linear, added: torch.Tensor):
        super().__init__()
        self.base, self.added = base, added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.added.T


@pytest.mark.parametrize("scheme", [DYNAMIC, EABF], ids=["dynamic_ntk", "eabf"])
def test_projections_replaced_after_the_model_was_built(scheme: dict[str, Any]) -> None:
    """The multiplier and the rotation reach what the adapter adds: as with weights in which it is merged."""
    adapted, merged = tiny(scheme), tiny(scheme)
    for name, features in (("q_proj", 16), ("k_proj", 8)):
        added = torch.rand(features, 16)
        attention = adapted.model.layers[0].self_attn
        setattr(attention, name, Adapted(getattr(attention, name), added))
        getattr(merged.model.layers[0].self_attn, name).weight.data += added
    torch.testing.assert_close(adapted(TOKENS).logits, merged(TOKENS).logits, atol=1e-4, rtol=0)  # order of sums


def test_the_export_knows_what_the_exported_file_computes() -> None:
    for known, table in (
        (schemes.EXPORTED_FREQUENCIES, modeling_eabf_llama.FREQUENCIES),
        (schemes.EXPORTED_LOGIT_SCALES, modeling_eabf_llama.LOGIT_SCALES),
    ):
        assert dict(known) == {name: parameters for name, (_, parameters) in table.items()}
    assert {*schemes.SCHEMES} - {*schemes.EXPORTED_FREQUENCIES} == {"eabf"}  # its parts are in the tables


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"type": "longrope", "base": 1e4}, "has the type 'longrope'; .* knows default, abf, pi"),
        ({"type": "compose", "frequencies": {"type": "longrope"}}, "has the type 'longrope'"),
        ({"type": "compose", "frequencies": EABF, "logit_scale": {"type": "louder"}}, "the logit_scale 'louder'"),
        ({"type": "compose", "frequencies": EABF, "temperature": {}}, "'compose' has no parameter temperature"),
        ({**EABF, "cap": 2.0}, "'eabf' has no parameter cap"),
        ({**DYNAMIC, "beta": 2.0}, "'dynamic_ntk' has no parameter beta"),
        ({"base": 1e4}, "has the type None"),
    ],
    ids=str,
)
def test_the_exported_file_refuses_what_it_does_not_know(scheme: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(scheme)


@pytest.mark.parametrize(
    "s",
    [
        schemes.scheme("ntk_by_parts", factor=4, pretrained_window=512, truncate=False),
        schemes.scheme("yarn", factor=0.5, pretrained_window=512, truncate=False),
        schemes.scheme("dynamic_yarn", pretrained_window=512, truncate=False),
    ],
    ids=str,
)
def test_the_exported_file_computes_our_frequencies(s: schemes.Scheme) -> None:
    """Ours are compared with transformers in tests/rope; here only what the models above do not have."""
    length = (torch.full((1, 1), 2048.0, dtype=torch.float64),) if s.depends_on_length else ()
    frequencies, scale = modeling_eabf_llama.rules(s.to_dict())[0](64, *length)
    np.testing.assert_allclose(frequencies[0].numpy(), s.inverse_frequencies(64, 2048), rtol=2.0**-23)  # float32
    assert float(scale) == pytest.approx(s.rotation_scale(2048), rel=1e-15)
