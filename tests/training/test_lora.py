"""Adapter training against torch layers written out below, one executor against the other, and whole runs."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers

import eabf_jax
from eabf_jax.errors import InputError
from eabf_jax.interop.huggingface import to_hf
from eabf_jax.interop.native import save_params, write_model_json
from eabf_jax.model.llama import Llama
from eabf_jax.model.lora import Lora, split_trained
from eabf_jax.model.parameters import PROJECTIONS, flatten
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.training.backward import merge
from eabf_jax.training.checkpoint import Checkpoints
from eabf_jax.training.layerwise import Layerwise
from eabf_jax.training.optimizer import make_optimizer
from eabf_jax.training.recipe import ComputeConfig, RecipeConfig
from eabf_jax.training.step import Program, build_model, microbatch_sharding
from eabf_jax.training.trainer import place_batch, train

STEPS, BATCH, LENGTH = 3, 8, 24
# As in test_step, epsilon is much larger than the rounding of a gradient, so rounding errors stay small.
RECIPE = RecipeConfig(learning_rate=1e-2, batch_size=BATCH, epsilon=1e-3)
COMPUTE = {"dtype": "float32", "attention": "reference", "remat": "none", "loss_chunk": 7, "executor": "program"}
ALL = Lora(rank=3, alpha=4.5, targets=PROJECTIONS, train_embeddings=True, train_norms=True)
SOME = Lora(rank=2, alpha=4.0, targets=("v_proj", "q_proj", "down_proj"))


@pytest.fixture(scope="module")
def batches(yarn):
    rng = np.random.default_rng(5)
    shape = (BATCH, LENGTH)
    return [
        {
            "tokens": rng.integers(0, yarn.vocab_size, shape).astype(np.int32),
            "loss_mask": rng.random(shape) < 0.4,
            "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
            "segment_ids": np.ones(shape, np.int32),
        }
        for _ in range(STEPS)
    ]


def whole(config, params, lora):
    """Adds adapters to the base model's parameters; B is random, because A has no gradient while B is zero."""
    rng = np.random.default_rng(11)
    if lora is None:
        return params
    drawn = Llama.abstract(config, lora=lora).parameters()
    adapters, _ = split_trained(drawn, dataclasses.replace(lora, train_embeddings=False, train_norms=False))
    return merge(params, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), adapters))


@pytest.fixture(scope="module")
def tune(yarn, params):
    """Trains adapters for some steps; returns metrics, what a checkpoint would hold, the state and the step."""

    def run(batches, lora=ALL, *, config=yarn, params=params, mesh=None, microbatches=2, **compute):
        mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
        settings = ComputeConfig(**{**COMPUTE, **compute})
        placed = [place_batch(batch, mesh, microbatches, every_token=False) for batch in batches]
        at = microbatch_sharding(mesh)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), placed[0])
        kind = {"program": Program, "layerwise": Layerwise}[settings.executor]
        model = build_model(config, settings, mesh, lora)
        step = kind(model, make_optimizer(RECIPE, STEPS), settings, mesh, clip_norm=1.0, batch=shapes)
        step.compile()
        start, frozen = split_trained(whole(config, params, lora), lora)

        def put(leaf, like):
            return jax.device_put(leaf.astype(like.dtype), like.sharding)

        state = step.begin(jax.tree.map(put, start, step.abstract.params), jax.tree.map(put, frozen, step.frozen))
        metrics = []
        for batch in placed:
            state, found = step(state, batch)
            metrics.append(jax.tree.map(float, found._asdict()))
        return metrics, jax.device_get(step.saved(state)), state, step

    return run


class TorchLora(torch.nn.Module):
    """Hu et al. 2021, section 4.1: h = W x + alpha / rank B A x."""

    def __init__(self, linear, a, b, scale):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a, self.b = (torch.nn.Parameter(torch.from_numpy(np.array(x))) for x in (a, b))

    def forward(self, x):
        return self.linear(x) + (x @ self.a) @ self.b * self.scale


@pytest.fixture(scope="module")
def in_torch(yarn, params, batches, in_transformers):
    """Trains in torch, each global batch in one piece; returns losses, gradient norms and the trained parameters."""
    model = in_transformers(yarn, params).train()
    model.requires_grad_(False)
    layers = whole(yarn, params, ALL)["layers"]
    trained = {"embed_tokens.embedding": model.model.embed_tokens.weight, "norm.scale": model.model.norm.weight}
    for number, layer in enumerate(model.model.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            trained[f"layers.{norm}.scale.{number}"] = getattr(layer, norm).weight
        for block, name in [("self_attn", n) for n in PROJECTIONS[:4]] + [("mlp", n) for n in PROJECTIONS[4:]]:
            a, b = (layers[block][name][leaf][number] for leaf in ("lora_a", "lora_b"))
            module = TorchLora(getattr(getattr(layer, block), name), a, b, 4.5 / 3)
            setattr(getattr(layer, block), name, module)
            trained[f"layers.{block}.{name}.lora_a.{number}"] = module.a
            trained[f"layers.{block}.{name}.lora_b.{number}"] = module.b
    for tensor in trained.values():
        tensor.requires_grad_(True)
    groups = [{"params": [t for n, t in trained.items() if ("scale" in n) == norm], "weight_decay": 0.1 * (not norm)}
              for norm in (False, True)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses, norms = [], []
    for batch in batches:
        ids = torch.from_numpy(batch["tokens"]).long()
        logits = model(ids).logits[:, :-1]
        by_token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = by_token[torch.from_numpy(batch["loss_mask"][:, 1:])].mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, norms, {name: tensor.detach().numpy() for name, tensor in trained.items()}


@pytest.fixture(scope="module")
def single(tune, batches):
    return tune(batches)


def named(tree):
    return {".".join(path): leaf for path, leaf in flatten(tree)}


def test_training_of_adapters_is_torchs(single, in_torch, yarn, params):
    metrics, saved, *_ = single
    losses, norms, expected = in_torch
    # Tolerances as in test_step, for two float32 implementations over a few steps.
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-5)
    np.testing.assert_allclose([m["gradient_norm"] for m in metrics], norms, rtol=1e-4)
    assert max(norms) > 1  # clipping took effect
    found = named(saved.params)
    before = named(whole(yarn, params, ALL))
    assert {name.rsplit(".", 1)[0] if name[-1].isdigit() else name for name in expected} == found.keys()
    for name, tensor in expected.items():
        stem, _, number = name.rpartition(".")
        array = found[stem][int(number)] if number.isdigit() else found[name]
        # Per step, rate x gradient's rounding / epsilon = 1e-2 x 1e-6 / 1e-3, on entries of order one.
        np.testing.assert_allclose(array, tensor, rtol=0, atol=3e-5, err_msg=name)
    assert min(np.abs(found[name] - before[name]).max() for name in found) > 1e-3


def agree(found, expected):
    """Compares sums in another order, with the tolerances of the test above."""
    for name, rtol in {"loss": 1e-5, "gradient_norm": 1e-4, "tokens": 0}.items():
        np.testing.assert_allclose([m[name] for m in found[0]], [m[name] for m in expected[0]], rtol=rtol, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5), found[1].params, expected[1].params)


@pytest.mark.parametrize("remat", ["full", "dots:1,attention:1,qkv"])
@pytest.mark.parametrize("executor", ["program", "layerwise"])
def test_neither_recomputation_nor_the_executor_changes_the_curve(tune, batches, single, remat, executor):
    agree(tune(batches, remat=remat, executor=executor), single)


@pytest.mark.parametrize("executor", ["program", "layerwise"])
def test_adapters_alone_under_either_executor(tune, batches, executor):
    """Embedding, norms and head are frozen, so the executors compute no gradients for them."""
    metrics, saved, *_ = tune(batches, SOME, executor=executor, remat="full")
    expected, others, *_ = tune(batches, SOME, microbatches=4)
    agree((metrics, saved), (expected, others))
    assert metrics[-1]["loss"] != metrics[0]["loss"]
    leaves = {name.rsplit(".", 1)[1] for name in named(saved.params)}
    assert leaves == {"lora_a", "lora_b"}
    assert len(named(saved.params)) == 6


@pytest.mark.parametrize(
    ("sizes", "compute"),
    [
        ({"fsdp": 8}, {}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"remat": "full"}),
        ({"fsdp": 2, "tensor": 2, "context": 2}, {"remat": "attention"}),
        ({"fsdp": 2, "tensor": 2, "context": 2}, {"executor": "layerwise", "remat": "qkv"}),
        ({"fsdp": 4, "tensor": 2}, {"executor": "layerwise", "optimizer_memory": "host", "remat": "offload:2,dots"}),
        ({"fsdp": 8}, {"executor": "layerwise", "remat": "full", "gather": "step"}),
    ],
    ids=str,
)
def test_eight_devices_give_the_curve_of_one(tune, batches, single, sizes, compute):
    ways = sizes.get("data", 1) * sizes["fsdp"]
    found = tune(batches, mesh=make_mesh(MeshConfig(**sizes)), microbatches=BATCH // ways, **compute)
    agree(found, single)


@pytest.mark.parametrize("executor", ["program", "layerwise"])
def test_the_base_is_frozen_narrow_and_has_neither_moments_nor_gradients(tune, batches, yarn, params, executor):
    _, saved, state, _ = tune(batches[:1], SOME, dtype="bfloat16", executor=executor, remat="full")
    assert jax.tree.structure(state.mu) == jax.tree.structure(state.nu) == jax.tree.structure(state.params)
    assert jax.tree.structure(saved.params) == jax.tree.structure(saved.optimizer["mu"])
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    # q and v: (32 + 32) and (32 + 16), down: (48 + 32); times rank and layers.
    assert trained == (64 + 48 + 80) * 2 * 3
    assert sum(leaf.size for leaf in jax.tree.leaves(state.frozen)) == sum(x.size for x in jax.tree.leaves(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen)} == {jnp.dtype("bfloat16")}
    # The kernels of the second layer are unchanged, bit for bit.
    layers = state.frozen["layers"]
    found = layers[1]["mlp"]["up_proj"]["kernel"] if executor == "layerwise" else layers["mlp"]["up_proj"]["kernel"][1]
    np.testing.assert_array_equal(found, params["layers"]["mlp"]["up_proj"]["kernel"][1].astype(jnp.bfloat16))


def test_gradients_of_the_base_are_not_computed(tune, batches):
    """The compiler's count of operations, which counts a loop's body once, shows it."""

    def flops(lora):
        *_, step = tune(batches[:1], lora, microbatches=1, loss_chunk=LENGTH)
        return step.lower().compile().cost_analysis()["flops"]

    tokens = BATCH * LENGTH
    kernels = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 32 * 96  # of one layer and the head
    adapters = 6 * tokens * 2 * 32
    saved = flops(None) - flops(Lora(rank=1, targets=("q_proj",)))
    # Two operations per number and token, and the update of the base, which adds little.
    assert saved == pytest.approx(2 * kernels * tokens - adapters, rel=0.2)


def test_tied_embeddings_are_trained_as_input_and_output(tune, batches, yarn, params):
    """Compares with JAX's own derivative of the model's loss."""
    tied = dataclasses.replace(yarn, tie_word_embeddings=True)
    params = {name: tree for name, tree in params.items() if name != "lm_head"}
    lora = dataclasses.replace(SOME, train_embeddings=True)
    trained, frozen = split_trained(whole(tied, params, lora), lora)
    batch = batches[0]

    def loss(trained):
        model = Llama.from_params(tied, merge(trained, frozen), attention="reference", lora=lora)
        scores = jax.nn.log_softmax(model(jnp.asarray(batch["tokens"]))[:, :-1])
        chosen = jnp.take_along_axis(scores, jnp.asarray(batch["tokens"])[:, 1:, None], axis=-1)[..., 0]
        return -(chosen * batch["loss_mask"][:, 1:]).sum() / batch["loss_mask"][:, 1:].sum()

    expected, gradients = jax.jit(jax.value_and_grad(loss))(trained)
    norm = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(gradients)))
    for executor in ("program", "layerwise"):
        (found,), saved, *_ = tune([batch], lora, config=tied, params=params, executor=executor)
        # Float32 sums in another order: about ten roundings of 6e-8.
        np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(found["gradient_norm"], norm, rtol=1e-5)
        # The first moment after one step is (1 - beta1) of the clipped gradient.
        moment = 0.1 * gradients["embed_tokens"]["embedding"] * min(1.0, 1.0 / norm)
        # Both are float32 sums over the tokens in different order, whose rounding depends on the largest terms.
        largest = float(np.abs(moment).max())
        np.testing.assert_allclose(saved.optimizer["mu"]["embed_tokens"]["embedding"], moment, atol=5e-5 * largest)


# Whole runs.


def adapter_config(run_config, output, **changes):
    lora = changes.pop("lora", Lora(rank=2, targets=("q_proj", "o_proj", "up_proj"), train_norms=True))
    return dataclasses.replace(run_config(output, **{"recipe": {"steps": 4, "epsilon": 1e-3}, **changes}), lora=lora)


@pytest.fixture(scope="module")
def finished(run_config, tmp_path_factory):
    """A finished run on eight devices, and its configuration."""
    config = adapter_config(run_config, tmp_path_factory.mktemp("lora") / "run")
    return train(config), config


def stored(run, step=4):
    """Reads the checkpoint's folder of parameters with Orbax alone."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((run / "checkpoints" / str(step) / "params").absolute())


def test_a_run_holds_what_it_trained_and_names_its_base(finished, base_model):
    run, config = finished
    held = named(stored(run))
    stems = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    assert held.keys() == {f"layers.{stem}.{leaf}" for stem in stems for leaf in ("lora_a", "lora_b")} | {
        "norm.scale",
        "layers.input_layernorm.scale",
        "layers.post_attention_layernorm.scale",
    }
    told = json.loads((run / "model.json").read_text())["adapter"]
    assert told.pop("base") == str(base_model.resolve())
    assert len(told.pop("base_digest")) == 16
    assert {**told, "targets": tuple(told["targets"])} == dataclasses.asdict(config.lora)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_the_merged_model_is_base_and_adapters(finished, base_model, params, extended):
    run, config = finished
    tokens = np.random.default_rng(2).integers(0, 96, (2, 48))
    held = stored(run)
    apart = merge(held, split_trained(params, config.lora)[1])
    expected = Llama.from_params(extended, apart, attention="reference", lora=config.lora)(tokens)
    model, tokenizer = eabf_jax.load(run, dtype="float32")
    assert tokenizer is None
    # (W + AB) x against W x + A (B x): float32 sums in another order, through three layers and a head; logits are ~10.
    np.testing.assert_allclose(model(tokens), expected, atol=2e-4)
    untouched = Llama.from_params(extended, params, attention="reference")(tokens)
    assert np.abs(untouched - expected).max() > 0.1  # the adapters change the logits


def test_the_export_is_the_same_in_transformers(finished, tmp_path):
    run, _ = finished
    to_hf(run, tmp_path / "hf")
    tokens = np.random.default_rng(3).integers(0, 96, (1, 60))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    for directory in (run, tmp_path / "hf"):
        model, _ = eabf_jax.load(directory, dtype="float32")
        # As above: float32 sums in another order, through three layers and a head; logits are about 10.
        np.testing.assert_allclose(model(tokens), expected, atol=2e-4)
    # Step and dtype can be chosen.
    to_hf(run, tmp_path / "narrow", step=4, dtype="bfloat16")
    assert json.loads((tmp_path / "narrow/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_base_that_has_moved_is_named_and_may_be_named_anew(finished, base_model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    told = json.loads((run / "model.json").read_text())
    told["adapter"]["base"] = str(tmp_path / "gone")
    (run / "model.json").write_text(json.dumps(told))
    for action in (eabf_jax.load, lambda directory: to_hf(directory, tmp_path / "hf")):
        with pytest.raises(InputError, match=r"is not in .*gone: name its directory with .*--base DIR") as error:
            action(run)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "hf").exists()
    to_hf(run, tmp_path / "hf", base=base_model)
    np.testing.assert_array_equal(
        eabf_jax.load(run, dtype="float32", base=base_model)[0].parameters()["layers"]["mlp"]["up_proj"]["kernel"],
        eabf_jax.load(tmp_path / "hf", dtype="float32")[0].parameters()["layers"]["mlp"]["up_proj"]["kernel"],
    )
    # The same base in a Hugging Face directory is accepted.
    to_hf(base_model, tmp_path / "base_hf")
    to_hf(run, tmp_path / "again", base=tmp_path / "base_hf")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()
    with pytest.raises(InputError, match="is a whole model and takes no base"):
        to_hf(base_model, tmp_path / "x", base=base_model)


def test_another_base_is_refused(finished, run_config, base_model, params, model_config, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_model_json(other, model_config)
    save_params(other, {**params, "norm": {"scale": params["norm"]["scale"] * 1.01}})
    with pytest.raises(InputError, match=r"is not the one that the adapters in .* were trained on: its digest is"):
        eabf_jax.load(finished[0], base=other)
    # The model in the directory is replaced between two starts of a run.
    mutable = tmp_path / "base"
    shutil.copytree(base_model, mutable)
    config = adapter_config(run_config, tmp_path / "run", model={"path": str(mutable)}, recipe={"steps": 1})
    train(config)
    shutil.rmtree(mutable)
    shutil.copytree(other, mutable)
    with pytest.raises(InputError, match=r"is not the one that the run in .* began with .* --overwrite true"):
        train(config)


def test_adapters_of_an_adapted_model(finished, run_config, tmp_path):
    """The base of a run may be another run of adapters, which is merged."""
    config = adapter_config(
        run_config, tmp_path / "second", model={"path": str(finished[0])}, recipe={"steps": 1, "objective": "pretrain"}
    )
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, train_norms=False))
    run = train(config)
    first, second = (eabf_jax.load(directory, dtype="float32")[0].parameters() for directory in (finished[0], run))
    np.testing.assert_array_equal(first["norm"]["scale"], second["norm"]["scale"])
    moved = second["layers"]["mlp"]["up_proj"]["kernel"] - first["layers"]["mlp"]["up_proj"]["kernel"]
    assert 0 < np.abs(moved).max() < 0.1


@pytest.mark.parametrize("executor", ["program", "layerwise"])
def test_a_run_that_was_cut_off_ends_with_the_same_adapters(finished, run_config, tmp_path, monkeypatch, executor):
    """The results are equal bit for bit under the same executor, and up to the order of sums under the other."""
    config = adapter_config(run_config, tmp_path / "run", compute={"executor": executor})
    save = Checkpoints.save

    class Killed(Exception):
        pass

    def save_and_die(self, step, *rest):
        save(self, step, *rest)
        self._manager.wait_until_finished()
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(Killed):
            train(config)
    assert not (tmp_path / "run/checkpoints/4").exists()
    expected, found = named(stored(finished[0])), named(stored(train(config)))
    assert found.keys() == expected.keys()
    for name in expected:
        atol = 0 if executor == "program" else 3e-5  # as in `agree`
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


def test_adapters_start_at_the_base_and_by_the_seed(run_config, base_model, tmp_path):
    """With a learning rate that rounds to nothing, A keeps its initial values and B stays at zero."""
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        recipe = {"steps": 1, "learning_rate": 1e-30, "seed": seed}
        drawn.append(named(stored(train(adapter_config(run_config, tmp_path / str(number), recipe=recipe)), 1)))
    name = "layers.self_attn.q_proj.lora_a"
    np.testing.assert_array_equal(drawn[0][name], drawn[1][name])
    assert np.abs(drawn[0][name] - drawn[2][name]).max() > 0.01
    # The standard deviation of 3 x 32 x 2 numbers is off by about 5 %.
    np.testing.assert_allclose(drawn[0][name].std(), 32**-0.5, rtol=0.2)
    assert np.abs(drawn[0]["layers.self_attn.q_proj.lora_b"]).max() < 1e-25


def test_adapters_without_a_model_are_refused(run_config, shape, tmp_path):
    config = adapter_config(run_config, tmp_path / "run", model={"path": None, "shape": shape})
    with pytest.raises(InputError, match=r"lora trains adapters of a model: set model\.path"):
        train(config)
    assert not (tmp_path / "run").exists()
