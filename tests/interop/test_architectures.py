"""Every architecture against transformers: logits, files, decoding, training and adapters."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from family import FULL, SAME, SIZES, TOKENS, in_transformers, logits_of
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from weights import random_params

from eabf_jax import load
from eabf_jax.errors import InputError
from eabf_jax.inference import Generator
from eabf_jax.interop import huggingface, native
from eabf_jax.interop.architectures import ARCHITECTURES, OWN_TYPE, architecture_of
from eabf_jax.model import Llama, LlamaConfig
from eabf_jax.model.lora import Lora
from eabf_jax.model.parameters import PROJECTIONS, parameter_count
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.rope import scheme
from eabf_jax.training.backward import Microbatch
from eabf_jax.training.layerwise import Layerwise
from eabf_jax.training.optimizer import make_optimizer
from eabf_jax.training.recipe import ComputeConfig, RecipeConfig
from eabf_jax.training.step import build_model, microbatch_sharding

# The cache of each model_type in decoding; of the others, it has the model's dtype.
CACHES = {"ministral": "int8", "iquestcoder": "int8"}


class Case(NamedTuple):
    """One architecture: transformers' model, its directory, and ours in float32."""

    kind: str
    reference: Any
    directory: Path
    model: Llama


@pytest.fixture(scope="module", params=[*FULL, *SAME])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp(request.param)
    reference = in_transformers(request.param, **(FULL | SAME)[request.param])
    reference.save_pretrained(directory / "hf")
    model, _ = load(directory / "hf", dtype="float32")
    return Case(request.param, reference, directory, model)


def test_every_architecture_is_tested() -> None:
    assert FULL.keys() | SAME.keys() == ARCHITECTURES.keys() - {OWN_TYPE}


@pytest.mark.shows("import")
def test_logits_and_count_are_transformers(case: Case) -> None:
    np.testing.assert_allclose(case.model(TOKENS), logits_of(case.reference, TOKENS), atol=1e-4)
    assert parameter_count(case.model.config) == case.reference.num_parameters()


@pytest.mark.parametrize("kind", FULL)
@settings(max_examples=2, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_logits_of_random_shapes_are_transformers(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw = data.draw
    heads, groups, size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([4, 8]))
    keys = {
        "num_key_value_heads": heads, "num_attention_heads": heads * groups, "hidden_size": heads * groups * size,
        "intermediate_size": draw(st.sampled_from([8, 24])), "num_hidden_layers": draw(st.integers(1, 4)),
        "tie_word_embeddings": draw(st.booleans()), "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "head_dim": size, "rope_theta": draw(st.sampled_from([100.0, 1e6])),
    }  # fmt: skip
    if kind == "ministral3":
        keys["rope_parameters"] = {**FULL[kind]["rope_parameters"], "rope_theta": keys.pop("rope_theta")}
    features = {
        "attention_bias": draw(st.booleans()), "attention_out_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([None, 1, 4, 100])), "use_sliding_window": draw(st.booleans()),
        "max_window_layers": draw(st.integers(0, 3)), "no_rope_layer_interval": draw(st.integers(1, 3)),
        "partial_rotary_factor": draw(st.sampled_from([0.5, 1.0])),
        **{name: draw(st.sampled_from([0.5, 1.0, 3.0])) for name in FULL["granite"] if name != "mlp_bias"},
    }  # fmt: skip
    known = transformers.AutoConfig.for_model(kind).to_dict()
    if kind == "phi3":
        known["partial_rotary_factor"] = None
    own = {name: value for name, value in features.items() if name in known}
    if kind == "ministral":
        own["sliding_window"] = own["sliding_window"] or 3  # transformers' model needs one
    reference = in_transformers(kind, seed=1, **keys, **own)
    directory = tmp_path_factory.mktemp(kind)
    reference.save_pretrained(directory)
    model, _ = load(directory, dtype="float32")
    np.testing.assert_allclose(model(TOKENS[:, :11]), logits_of(reference, TOKENS[:, :11]), atol=1e-4)


def test_absent_keys_have_transformers_values(case: Case) -> None:
    """A config.json without optional keys is the model that transformers makes of it."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys = {"model_type": case.kind, **{name: 32 * SIZES[name] for name in needed}, "num_hidden_layers": 4}
    ours, theirs = huggingface.config_from_hf(keys), transformers.AutoConfig.for_model(**keys)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                 "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"):  # fmt: skip
        expected = getattr(theirs, name)
        assert getattr(ours, name) == (tuple(expected) if isinstance(expected, list) else expected), name
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or keys["hidden_size"] // keys["num_attention_heads"])
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None))
    assert dict(ours.rope.frequencies.parameters)["base"] == theirs.rope_parameters["rope_theta"]


@pytest.mark.shows("export")
def test_files_return_bit_for_bit(case: Case) -> None:
    huggingface.from_hf(case.directory / "hf", case.directory / "native")
    huggingface.to_hf(case.directory / "native", case.directory / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(case.directory / "again", attn_implementation="eager")
    assert type(again) is type(case.reference)
    before, after = case.reference.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert np.array_equal(logits_of(again, TOKENS), logits_of(case.reference, TOKENS))


@pytest.mark.shows("decode")
def test_decoding_is_the_full_forward(case: Case) -> None:
    """Prompts in chunks of 4 tokens, so that windows reach into the cache; then token by token."""
    cache = CACHES.get(case.kind, "model")
    generator = Generator(case.model, cache=cache, prefill_chunk=4)
    prompts = [TOKENS[0, :10].tolist(), TOKENS[1, :13].tolist()]
    for prompt, found in zip(prompts, generator.generate(prompts, 6, stop_tokens=[]), strict=True):
        logits = logits_of(case.reference, np.array([prompt + found.tokens]))[0]
        ahead = logits[len(prompt) - 1 : -1].max(-1) - np.take_along_axis(
            logits[len(prompt) - 1 : -1], np.array(found.tokens)[:, None], -1
        ).squeeze(-1)
        # An int8 cache rounds keys and values to 1 in 254 of their largest, which may turn a near tie.
        assert ahead.max() <= (0.1 if cache == "int8" else 1e-4)


@pytest.mark.shows("train")
def test_a_training_step_on_eight_devices_is_torchs(case: Case) -> None:
    rows = np.random.default_rng(1).integers(1, 40, (4, 17)).astype(np.int32)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    remat = "full" if case.kind in SAME else "qkv:1,full"
    compute = ComputeConfig(dtype="float32", attention="chunked", remat=remat, loss_chunk=8, microbatch_size=1)
    compute = dataclasses.replace(compute, optimizer_memory="device", gather="layer")
    at = microbatch_sharding(mesh)
    inside = np.ones((4, 16), np.bool_)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), inside.shape)
    arrays = (rows[:, :-1], rows[:, 1:], inside, positions)
    batch = Microbatch(*(jax.device_put(array[None], at) for array in arrays), None)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), batch)
    made = build_model(case.model.config, compute, mesh)
    step = Layerwise(made, make_optimizer(RecipeConfig(), 4), compute, mesh, clip_norm=1e9, batch=shapes)
    step.compile()
    own = jax.tree.map(
        lambda x, like: jax.device_put(np.array(x), like.sharding), case.model.parameters(), step.abstract.params
    )
    _, metrics = step(step.begin(own), batch)
    case.reference.zero_grad()
    logits = case.reference(torch.from_numpy(rows[:, :-1]).long()).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 40), torch.from_numpy(rows[:, 1:]).long().reshape(-1))
    loss.backward()
    norm = torch.sqrt(sum((parameter.grad**2).sum() for parameter in case.reference.parameters()))
    # Float32 sums of 64 tokens in another order.
    np.testing.assert_allclose(metrics.loss, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_norm, norm.item(), rtol=1e-4)


def test_gradients_are_torchs(case: Case) -> None:
    """Every parameter's gradient, under the names of an export."""

    def loss(params: Any) -> jax.Array:
        chosen = jax.nn.log_softmax(case.model.with_parameters(params)(TOKENS[:, :-1]))
        return -jnp.take_along_axis(chosen, TOKENS[:, 1:, None], -1).mean()

    case.reference.zero_grad()
    logits = case.reference(torch.from_numpy(TOKENS[:, :-1])).logits
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 40), torch.from_numpy(TOKENS[:, 1:].copy()).reshape(-1)
    )
    expected.backward()
    value, found = jax.value_and_grad(loss)(case.model.parameters())
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    theirs = {name: parameter.grad.numpy() for name, parameter in case.reference.named_parameters()}
    for names, entries in huggingface.files_of(case.model.config):
        for layer, name in enumerate(names):
            parts = []
            for entry in entries:
                leaf = found
                for key in entry.path:
                    leaf = leaf[key]
                own = np.asarray(leaf if entry.layers is None else leaf[layer])
                parts.append(own.T if entry.transposed else own)
            np.testing.assert_allclose(np.concatenate(parts), theirs.pop(name), atol=2e-5, err_msg=name)
    assert not theirs


@pytest.mark.shows("LoRA")
def test_adapters_on_every_projection_merge(case: Case) -> None:
    lora = Lora(rank=2, alpha=4.0, targets=PROJECTIONS)
    model = Llama(case.model.config, rngs=nnx.Rngs(0), lora=lora)
    params = jax.tree.map(lambda x: x + 0.05, model.parameters())
    merged = jax.tree.map(lambda x: x, params)
    for part in ("self_attn", "mlp"):
        for name, module in merged["layers"][part].items():
            if name in PROJECTIONS:
                delta = jnp.einsum("lir,lro->lio", module.pop("lora_a"), module.pop("lora_b"))
                module["kernel"] = module["kernel"] + lora.scale * delta
    plain = Llama.from_params(case.model.config, merged)
    np.testing.assert_allclose(model.with_parameters(params)(TOKENS), plain(TOKENS), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "has mixture of experts; supported are llama, mistral"),
        ({"model_type": "gemma2"}, "norms with an offset of 1"),
        ({"model_type": "deepseek_v3"}, "mixture of experts"),
        ({"model_type": "qwen_2"}, "did you mean 'qwen2'"),
        ({"model_type": None}, "model_type is None, expected one of llama"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "there is no sliding_window"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "expected 3 of sliding_attention and full"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2, 0]}, "expected 3 of 0 and 1"),
        ({"model_type": "llama", "sliding_window": 8}, "sliding_window is 8, expected null"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4: 3 rotated dimensions"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window 0 is not a positive number"),
        ({"model_type": "eabf_llama", "eabf_features": {"warp": 1}}, "unknown config.json: key 'eabf_features.warp'"),
    ],
)
def test_what_is_not_supported_is_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        huggingface.config_from_hf({**SIZES, **change})


def test_an_architecture_refuses_features_that_it_lacks() -> None:
    config = LlamaConfig(**{**SIZES, "head_dim": 8}, model_type="qwen2", attention_bias=True, qk_norm="head")
    with pytest.raises(InputError, match="model_type 'qwen2' cannot express"):
        huggingface.config_to_hf(config)


def test_eabf_stair_is_served_by_ministral3_without_our_code(tmp_path: Path) -> None:
    config = LlamaConfig(
        **{**SIZES, "head_dim": 8}, rope=scheme("eabf_stair", base=50_000.0, pretrained_window=8), rms_norm_eps=1e-5
    )
    native.save_params(tmp_path / "native", random_params(config))
    native.write_model_json(tmp_path / "native", config)
    huggingface.to_hf(tmp_path / "native", tmp_path / "hf", model_type="ministral3")
    assert [path.name for path in (tmp_path / "hf").glob("*.py")] == []
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert type(served) is transformers.Ministral3ForCausalLM
    model, _ = load(tmp_path / "hf", dtype="float32")
    assert model.config.rope == config.rope
    np.testing.assert_allclose(model(TOKENS), logits_of(served, TOKENS), atol=1e-4)
    own, _ = load(tmp_path / "native", dtype="float32")
    assert np.array_equal(own(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("change", "model_type", "message"),
    [
        ({"rope": scheme("eabf", pretrained_window=8)}, "ministral3", "does not compute the rotary scheme 'eabf'"),
        ({"qk_norm": "head"}, "llama", "'llama' cannot express qk_norm 'head'"),
        ({}, "gemma", "norms with an offset of 1"),
    ],
)
def test_another_architecture_must_compute_the_same(change: dict[str, Any], model_type: str, message: str) -> None:
    config = LlamaConfig(**{**SIZES, "head_dim": 8, **change})
    with pytest.raises(InputError, match=message):
        huggingface.as_architecture(config, model_type)


# What the source of transformers' model shows, if the reason why an architecture is refused is true.
EVIDENCE = {
    "mixture of experts": r"experts",
    "LayerNorm": r"LayerNorm\(|layer_norm\(",
    "layers other than attention": r"[cC]onv1d|A_log|time_decay|mlstm|mamba|Conv1d|short_conv",
    "inputs other than text": r"pixel_values|input_features|audio|patch|vision",
    "offset of 1": r"1\.0 \+ self\.weight|1 \+ self\.weight",
    "norms before and after": r"pre_feedforward_layernorm|post_norm1",
    "of another model": r"shared_kv_states",
    "norms inside": r"attn_sub_norm",
    "norms after rotation": r"apply_rotary_pos_emb[^\n]*\n\s+query_states = self\.query_layernorm",
    "without a gate": r"act_fn\(self\.up_proj\(|self\.fc1\(hidden_states\)\n",
    "interleaved pairs": r"0::2",
    "differ by layer": r"inv_freq.*layer_type|layer_type.*inv_freq",
    "latent attention": r"kv_a_proj",
    "sinks": r"self\.sinks",
    "two softmaxes": r"lambda_q1",
    "learned mask": r"dt_proj",
    "biases by distance": r"position_bias",
    "norm 1": r"L2Norm",
    "several times": r"L_cycles",
    "names of keys": r"",
}


def test_every_architecture_of_transformers_is_read_or_refused_with_a_true_reason() -> None:
    folder = Path(transformers.__file__).parent / "models"
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*/modeling_*.py")]
    sources = {name: text for text in texts for name in re.findall(r"^class (\w+)\(", text, re.MULTILINE)}
    wrong = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if kind in ARCHITECTURES:
            continue
        with pytest.raises(InputError, match="which has") as caught:
            architecture_of({"model_type": kind})
        reason = str(caught.value).partition("; supported are")[0]
        evidence = [pattern for part, pattern in EVIDENCE.items() if part in reason]
        if "\n" in reason or not evidence or not re.search(evidence[0], sources[name]):
            wrong[kind] = reason
    assert wrong == {}
