"""Exported models in transformers: forward, cache and generate agree with our logits (as they do in 4.46)."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family import FULL, SAME
from safetensors.torch import load_file
from torch import nn
from transformers.models.llama.modeling_llama import eager_attention_forward

from eabf_jax.interop.export import modeling_eabf_llama
from eabf_jax.rope import Scheme, import_schemes, registry, scheme, scheme_names, to_hf
from eabf_jax.rope.exported import FORMULAS, exported_data
from eabf_jax.rope.registry import parameters_of_rule

DYNAMIC = scheme("dynamic_ntk", factor=2.0, pretrained_window=16)
EABF = scheme("eabf", base=50_000.0, pretrained_window=16, unscaled_layers=0)
TOKENS = torch.arange(3, 43)[None]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_entries", dict(registry._entries))
        runpy.run_path(str(HERE / "write_export_references.py"))["write"](root)
    return root


@pytest.mark.shows("EABF export", [*FULL, *SAME])
def test_every_scheme_in_the_installed_transformers(exported: Path) -> None:
    # In a separate process, because transformers caches remote code by file name, and torch its number of threads.
    command = [sys.executable, str(HERE / "check_export_in_transformers.py"), str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path.parent.name: json.loads(path.read_text()) for path in exported.glob("*/config.json")}
    own = {name for name, config in written.items() if "eabf_scheme" in config}
    assert written.keys() > {*scheme_names(), *(f"{kind}_eabf" for kind in (*FULL, *SAME))} and own > {
        "slow_half",
        "sharp_slow_half",
        "widening",
    }
    assert (done.stdout.count("eager"), done.stdout.count("sdpa")) == (len(own), len(written))


def test_the_checks_can_fail(exported: Path) -> None:
    """The checks must detect another window in the config."""
    config = exported / "eabf" / "config.json"
    original = config.read_text()
    config.write_text(original.replace('"pretrained_window": 16', '"pretrained_window": 17'))
    check = runpy.run_path(str(HERE / "check_export_in_transformers.py"))["check"]
    try:
        with pytest.raises(AssertionError, match="logits differ by"):
            check(exported / "eabf", "eager")
    finally:
        config.write_text(original)


@pytest.mark.parametrize("cached", [False, True])
def test_ministral3_of_transformers_computes_eabf_stair(exported: Path, cached: bool) -> None:
    """The weights of the export, with the keys that need no remote code."""
    directory = exported / "eabf_stair"
    written, references = json.loads((directory / "config.json").read_text()), np.load(directory / "references.npz")
    keys = to_hf(Scheme.from_dict(written["eabf_scheme"]), spelling="rope_parameters", model_type="ministral3")
    shared = set(transformers.Ministral3Config().to_dict()) - {"rope_parameters", "architectures", "model_type"}
    values = {name: value for name, value in written.items() if name in shared} | keys
    assert written["max_position_embeddings"] > 2 * keys["rope_parameters"]["original_max_position_embeddings"]
    model = transformers.Ministral3ForCausalLM(transformers.Ministral3Config(**values)).eval()
    model.load_state_dict(load_file(directory / "model.safetensors"))
    tokens = torch.tensor(references["tokens"])
    with torch.no_grad():
        if cached:
            begun = model(tokens[:, :21], use_cache=True)
            found = model(tokens[:, 21:], cache=begun.cache).logits
        else:
            found = model(tokens).logits
    np.testing.assert_allclose(found, references["logits"][:, -found.shape[1] :], atol=1e-4)  # as in the checks


def keys_of(s: Scheme, head_dim: int) -> dict[str, Any]:
    """Returns the keys of a scheme in config.json, for a model of one layer and 64 tokens."""
    return {"eabf_scheme": s.to_dict(), "eabf_rotary": exported_data(s, head_dim, 1, 64)}


def tiny(s: Scheme, bias: bool = False, attention: str = "sdpa", change: dict[str, Any] | None = None) -> nn.Module:
    """Builds a model of one layer with the exported code, without a directory."""
    torch.manual_seed(0)
    keys = keys_of(s, 8)
    config = modeling_eabf_llama.EabfLlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, attention_bias=bias, attn_implementation=attention,
        **{**keys, "eabf_rotary": {**keys["eabf_rotary"], **(change or {})}},
    )  # fmt: skip
    model = modeling_eabf_llama.EabfLlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def changed_attention(self, hidden_states, position_embeddings=None, attention_mask=None, memory=None, **kwargs):
    """An attention whose cache argument has a name of no known release."""


def louder_attention(self, hidden_states, cache=None, loudness=1.0, **kwargs):
    """An attention with an argument of no known release."""


@pytest.mark.parametrize("scheme", [DYNAMIC, EABF], ids=["dynamic_ntk", "eabf"])
def test_another_attention_is_an_error(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    for forward, message in (
        (changed_attention, f"transformers {transformers.__version__}: .*cache or past_key_values or"),
        (louder_attention, "expected attention with the arguments .*, found loudness too"),
    ):
        monkeypatch.setattr(attention, "forward", forward)
        with pytest.raises(RuntimeError, match=message):
            tiny(scheme)
    monkeypatch.undo()
    built = attention.__init__

    def with_norm(self: nn.Module, *arguments: Any, **options: Any) -> None:
        built(self, *arguments, **options)
        self.q_norm = nn.LayerNorm(8)

    monkeypatch.setattr(attention, "__init__", with_norm)
    with pytest.raises(RuntimeError, match=r"made of k_proj, o_proj, q_proj, v_proj, found .*q_norm"):
        tiny(scheme)


def test_arguments_of_attention() -> None:
    model = tiny(DYNAMIC)
    attention, x = model.model.layers[0].self_attn, torch.rand(1, 40, 16)
    rotation = model.model.rotary_emb(x, torch.arange(40)[None])
    by_name = attention(hidden_states=x, position_embeddings=rotation, attention_mask=None)[0]
    assert torch.equal(attention(x, rotation, None)[0], by_name)
    for wrong in ({}, {"position_embeddings": rotation[:2]}):
        with pytest.raises(RuntimeError, match="expected attention to get position_embeddings"):
            attention(x, attention_mask=None, **wrong)
    with pytest.raises(RuntimeError, match=r"expected one cache in attention's arguments .*, found 0"):
        attention(x, rotation, None, use_cache=True)
    with pytest.raises(RuntimeError, match="expected a transformers Cache, found dict"):
        attention(x, rotation, None, cache={})


@pytest.mark.parametrize("bias", [False, True])
def test_the_multiplier_is_on_the_query_that_attention_compares(bias: bool) -> None:
    """The attention function gets the plain model's query, with bias and rotation, times ln i / ln c."""
    seen: list[torch.Tensor] = []

    def spy(module: nn.Module, query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(query)
        return eager_attention_forward(module, query, *arguments, **options)

    transformers.AttentionInterface.register("spy", spy)
    transformers.AttentionMaskInterface.register("spy", transformers.masking_utils.eager_mask)
    plain, ours = tiny(scheme("default", base=50_000.0), bias, "spy"), tiny(EABF, bias, "spy")
    ours.load_state_dict(plain.state_dict())
    for model in (plain, ours):
        model(TOKENS)
    expected = np.maximum(np.log(np.arange(1, 41)) / np.log(16), 1.0)
    torch.testing.assert_close(seen[1], seen[0] * torch.tensor(expected, dtype=torch.float32)[:, None])


def test_texts_packed_into_a_row_have_no_length_to_follow() -> None:
    model, positions = tiny(DYNAMIC), torch.cat((torch.arange(20), torch.arange(20)))[None]
    with pytest.raises(ValueError, match="give each text its own row"):
        model(TOKENS, position_ids=positions)
    assert torch.isfinite(tiny(EABF)(TOKENS, position_ids=positions).logits).all()


class Adapted(nn.Module):
    """A projection with an added term, such as adapters insert into a built model."""

    def __init__(self, base: nn.Linear, added: torch.Tensor):
        super().__init__()
        self.base, self.added = base, added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.added.T


@pytest.mark.parametrize("scheme", [DYNAMIC, EABF], ids=["dynamic_ntk", "eabf"])
def test_projections_replaced_after_the_model_was_built(scheme: Scheme) -> None:
    """The multiplier and the rotation apply to the added term, as they do with merged weights."""
    adapted, merged = tiny(scheme), tiny(scheme)
    for name, features in (("q_proj", 16), ("k_proj", 8)):
        added = torch.rand(features, 16)
        attention = adapted.model.layers[0].self_attn
        setattr(attention, name, Adapted(getattr(attention, name), added))
        getattr(merged.model.layers[0].self_attn, name).weight.data += added
    torch.testing.assert_close(adapted(TOKENS).logits, merged(TOKENS).logits, atol=1e-4, rtol=0)  # order of sums


def test_the_export_knows_what_the_exported_file_computes() -> None:
    for table in (modeling_eabf_llama.FREQUENCIES, modeling_eabf_llama.LOGIT_SCALES):
        for rule, name in FORMULAS.items():
            if name in table:
                assert {*table[name][1]} == {*parameters_of_rule(rule)}
    known = modeling_eabf_llama.FREQUENCIES.keys() | modeling_eabf_llama.LOGIT_SCALES.keys()
    assert known == {*FORMULAS.values(), "fixed", "by_length", "by_position"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frequencies": {"kind": "longrope"}}, "the frequencies 'longrope'; .* knows fixed, by_length, dynamic_ntk"),
        (
            {"logit_scale": {"kind": "louder"}},
            "the logit_scale 'louder'; .* knows none, entropy_aware, layer_temperature",
        ),
        ({"frequencies": None}, "the frequencies None"),
        ({"logit_scale": {"kind": "none", "cap": 2.0}}, "'none' has the parameters cap; .* needs none"),
        (
            {"logit_scale": {"kind": "entropy_aware", "pretrained_window": 4}},
            "needs pretrained_window, unscaled_layers",
        ),
        ({"temperature": {}}, "has temperature, which this modeling file does not know"),
        ({"scheme": {"type": "abf", "base": 1e5}}, "has the data of the scheme .*'abf'.* but eabf_scheme is"),
    ],
    ids=str,
)
def test_the_exported_file_refuses_what_it_does_not_know(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(EABF, change=change)


def test_a_model_without_its_data_is_refused() -> None:
    with pytest.raises(ValueError, match="eabf_rotary has the data of the scheme None"):
        modeling_eabf_llama.rules(modeling_eabf_llama.EabfLlamaConfig(eabf_scheme={"type": "abf"}))


def test_past_the_end_of_a_table(user_schemes: Path) -> None:
    import_schemes(str(user_schemes))
    for s in (scheme("sharp_slow_half", factor=4, pretrained_window=16), scheme("widening", pretrained_window=16)):
        model = tiny(s)
        assert torch.isfinite(model(TOKENS).logits).all()
        with pytest.raises(ValueError, match=r"65 tokens: the table of .* ends at 64; export it with a longer window"):
            model(torch.arange(3, 68)[None] % 64)


@pytest.mark.parametrize("truncate", [False, True])
def test_the_exported_file_computes_our_dynamic_yarn(truncate: bool) -> None:
    """Covers settings that the models above lack; tests/rope compares our own scheme with its formula."""
    s = scheme("dynamic_yarn", pretrained_window=512, truncate=truncate)
    rule = modeling_eabf_llama.rules(modeling_eabf_llama.EabfLlamaConfig(**keys_of(s, 64)))[0]
    frequencies, scale = rule(64, torch.full((1, 1), 2048.0, dtype=torch.float64))
    np.testing.assert_allclose(frequencies[0].numpy(), s.inverse_frequencies(64, 2048), rtol=2.0**-23)  # float32
    assert float(scale) == pytest.approx(s.rotation_scale(2048), rel=1e-15, abs=0)  # float64
