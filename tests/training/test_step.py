import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from weights import torch_state

from eabf_jax.model.parameters import parameter_count
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.training.backward import Microbatch
from eabf_jax.training.layerwise import Layerwise
from eabf_jax.training.optimizer import make_optimizer
from eabf_jax.training.recipe import ComputeConfig, RecipeConfig
from eabf_jax.training.step import Program, build_model, microbatch_sharding
from eabf_jax.training.trainer import place_batch

STEPS, BATCH, LENGTH = 4, 8, 24
# Adam divides by sqrt(v) + epsilon: with the usual 1e-8, a gradient that is only rounding becomes a full step. This
# epsilon is much larger than the rounding of a gradient (1e-7), so rounding errors stay small.
RECIPE = RecipeConfig(learning_rate=1e-2, batch_size=BATCH, epsilon=1e-3)
COMPUTE = {"dtype": "float32", "attention": "reference", "remat": "none", "loss_chunk": 7, "executor": "program"}


@dataclasses.dataclass(unsafe_hash=True)
class Compute(ComputeConfig):
    """A hashable configuration, so that each choice is compiled once."""


@pytest.fixture(scope="module")
def batches(yarn):
    """Draws rows of different lengths; one row and one microbatch have no token with a loss."""
    rng = np.random.default_rng(5)
    made = []
    for _ in range(STEPS):
        lengths = rng.integers(6, LENGTH + 1, BATCH)
        inside = np.arange(LENGTH) < lengths[:, None]
        learned = (rng.random((BATCH, LENGTH)) < 0.4) & inside
        learned[:2] = False
        made.append(
            {
                "tokens": np.where(inside, rng.integers(0, yarn.vocab_size, (BATCH, LENGTH)), 0).astype(np.int32),
                "loss_mask": learned,
                "positions": np.where(inside, np.arange(LENGTH), 0).astype(np.int32),
                "segment_ids": inside.astype(np.int32),
            }
        )
    return made


@pytest.fixture(scope="module")
def fine_tune(yarn, params):
    """Runs the step over batches; returns its metrics and what a checkpoint would hold at the end."""

    @functools.cache
    def plan(compute, mesh, every_token, batch, rate):
        optimizer = make_optimizer(dataclasses.replace(RECIPE, learning_rate=rate), STEPS)
        step = {"program": Program, "layerwise": Layerwise}[compute.executor](
            build_model(yarn, compute, mesh), optimizer, compute, mesh, clip_norm=1.0, batch=batch
        )
        step.compile()
        return step

    def run(batches, *, mesh=None, microbatches=4, every_token=False, rate=1e-2, **compute):
        mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
        at = microbatch_sharding(mesh)
        placed = [place_batch(batch, mesh, microbatches, every_token=every_token) for batch in batches]
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), placed[0])
        step = plan(Compute(**{**COMPUTE, **compute}), mesh, every_token, shapes, rate)
        start = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, step.abstract.params)
        state, metrics = step.begin(start), []
        for batch in placed:
            state, found = step(state, batch)
            metrics.append(jax.tree.map(float, found._asdict()))
        return metrics, jax.device_get(step.saved(state)), state

    return run


@pytest.fixture(scope="module")
def single_device(fine_tune, batches):
    return fine_tune(batches)


@pytest.fixture(scope="module")
def in_torch(yarn, params, batches, in_transformers):
    """Fine-tunes in torch, each global batch in one piece; returns losses, gradient norms and final parameters."""
    model = in_transformers(yarn, params).train()
    decayed = [tensor for name, tensor in model.named_parameters() if not name.endswith("norm.weight")]
    norms = [tensor for name, tensor in model.named_parameters() if name.endswith("norm.weight")]
    assert len(norms) == 2 * yarn.num_hidden_layers + 1
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-3,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses, gradient_norms = [], []
    for batch in batches:
        ids = torch.from_numpy(batch["tokens"]).long()
        attended = torch.from_numpy(batch["segment_ids"])
        logits = model(ids, attention_mask=attended).logits[:, :-1]
        losses_by_token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = losses_by_token[torch.from_numpy(batch["loss_mask"][:, 1:])].mean()
        optimizer.zero_grad()
        loss.backward()
        gradient_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, gradient_norms, {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}


def test_fine_tune_is_torchs(single_device, in_torch, batches, params):
    metrics, saved, state = single_device
    losses, gradient_norms, tensors = in_torch
    assert [m["tokens"] for m in metrics] == [batch["loss_mask"][:, 1:].sum() for batch in batches]
    # Two float32 implementations: roundings of 1e-7 in hundreds of sums, carried over four steps.
    np.testing.assert_allclose([m["loss"] for m in metrics], losses, rtol=1e-5)
    np.testing.assert_allclose([m["gradient_norm"] for m in metrics], gradient_norms, rtol=1e-4)
    assert max(gradient_norms) > 1  # clipping took effect
    for name, array in torch_state(saved.params).items():
        # Per step, rate x gradient's rounding / epsilon = 1e-2 x 1e-6 / 1e-3, on entries of order one.
        np.testing.assert_allclose(array, tensors[name], rtol=0, atol=3e-5, err_msg=name)
    moved = jax.tree.map(lambda before, after: np.abs(before - after).max(), params, saved.params)
    assert min(jax.tree.leaves(moved)) > 1e-3
    assert state.step == STEPS


def test_norms_reported_are_those_of_the_result(single_device):
    metrics, saved, _ = single_device
    squares = sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(saved.params))
    np.testing.assert_allclose(metrics[-1]["parameter_norm"], np.sqrt(squares), rtol=1e-6)


def agree(found, expected):
    """Compares sums in another order, which differ by float32 rounding, as in `test_fine_tune_is_torchs`."""
    for name in ("loss", "gradient_norm", "tokens"):
        np.testing.assert_allclose([m[name] for m in found[0]], [m[name] for m in expected[0]], rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5), found[1].params, expected[1].params)


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "context": 2}],
    ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()),
)
def test_eight_devices_give_the_curve_of_one(fine_tune, batches, single_device, sizes):
    assert jax.device_count() == 8
    mesh = make_mesh(MeshConfig(**sizes))
    ways = sizes.get("data", 1) * sizes["fsdp"]
    agree(fine_tune(batches, mesh=mesh, microbatches=BATCH // ways), single_device)


@pytest.mark.parametrize("microbatches", [1, 8])
def test_microbatches_do_not_change_the_curve(fine_tune, batches, single_device, microbatches):
    agree(fine_tune(batches, microbatches=microbatches), single_device)


# test_backward tests the gradients of each policy.
@pytest.mark.parametrize(
    ("executor", "remat"),
    [
        ("program", "full"),
        ("program", "dots:1,full:1,qkv"),
        ("layerwise", "attention"),
        ("layerwise", "none"),
        ("layerwise", "dots:1,full:1,qkv"),
        ("layerwise", "full:1,offload"),
    ],
)
def test_neither_recomputation_nor_the_executor_changes_the_curve(fine_tune, batches, single_device, remat, executor):
    agree(fine_tune(batches, remat=remat, executor=executor), single_device)


@pytest.mark.parametrize(
    ("sizes", "memory", "remat"),
    [({"fsdp": 8}, "device", "qkv"), ({"data": 2, "fsdp": 2, "tensor": 2}, "host", "offload:2,dots")],
    ids=str,
)
def test_layer_by_layer_on_eight_devices(fine_tune, batches, single_device, sizes, memory, remat):
    mesh = make_mesh(MeshConfig(**sizes))
    ways = sizes.get("data", 1) * sizes["fsdp"]
    found = fine_tune(
        batches, mesh=mesh, microbatches=BATCH // ways, executor="layerwise", optimizer_memory=memory, remat=remat
    )
    agree(found, single_device)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves((found[2].mu, found[2].nu))}
    assert kinds == {"pinned_host" if memory == "host" else "device"}


def test_gradients_are_accumulated_in_float32_under_bfloat16(fine_tune, batches):
    """Repeating the microbatches eight times keeps the gradient; a bfloat16 sum would lose its last bits."""
    rows = {name: array[2:6] for name, array in batches[0].items()}
    (once,), _, state = fine_tune([rows], dtype="bfloat16", microbatches=2)
    repeated = {name: np.tile(array, (8, 1)) for name, array in rows.items()}
    (often,), *_ = fine_tune([repeated], dtype="bfloat16", microbatches=16)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.mu, state.nu))} == {np.dtype(np.float32)}
    assert often["tokens"] == 8 * once["tokens"]
    # Two programs may round bfloat16 differently (about 1e-5); a sum kept in bfloat16 is off by 1e-3 or more.
    for name in ("loss", "gradient_norm", "parameter_norm"):
        np.testing.assert_allclose(often[name], once[name], rtol=5e-5)


@pytest.mark.parametrize("executor", ["program", "layerwise"])
def test_updates_too_small_for_bfloat16_are_not_lost(fine_tune, batches, params, executor):
    """Updates of 1e-4 of a parameter, a fortieth of bfloat16's resolution, add up as in float32."""

    def way(**compute):
        metrics, saved, _ = fine_tune(batches, rate=2e-5, **compute)
        return metrics, jax.tree.map(lambda after, before: after - before, saved.params, params)

    (metrics, found), (wanted, expected) = way(dtype="bfloat16", executor=executor), way()
    for name in ("loss", "gradient_norm"):
        # About thirty successive roundings of 2^-9, averaged over tokens.
        np.testing.assert_allclose([m[name] for m in metrics], [m[name] for m in wanted], rtol=30**0.5 * 2**-9)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert 0 < np.abs(theirs).max() <= STEPS * 2.1e-5
        # The gradients' own error. Without the lower bits of the masters, a change would be 0 or a whole bfloat16 step.
        assert np.linalg.norm(mine - theirs) < 0.25 * np.linalg.norm(theirs)


def test_packed_documents_do_not_see_each_other(fine_tune, yarn, params, in_transformers):
    """The pretraining loss of packed rows is that of each document alone, over all its tokens but the first."""
    rng = np.random.default_rng(8)
    lengths = [(9, 15), (20, 4), (24,), (1, 2, 21)]
    tokens = rng.integers(0, yarn.vocab_size, (4, LENGTH)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "loss_mask": rng.random(tokens.shape) < 0.5,  # not used by this objective
        "positions": np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths]).astype(np.int32),
        "segment_ids": np.stack([np.repeat(np.arange(len(row)) + 1, row) for row in lengths]).astype(np.int32),
    }
    (metrics,), *_ = fine_tune([batch], microbatches=2, every_token=True)

    model, losses = in_transformers(yarn, params), []
    for row, parts in zip(tokens, lengths, strict=True):
        for document in np.split(row, np.cumsum(parts)[:-1]):
            ids = torch.from_numpy(document[None]).long()
            with torch.no_grad():
                logits = model(ids).logits
            losses.extend(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").tolist())
    assert metrics["tokens"] == len(losses) == 4 * LENGTH - 8
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)


def test_a_batch_without_a_token_to_learn_is_no_nan(fine_tune, batches):
    nothing = {**batches[0], "loss_mask": np.zeros((BATCH, LENGTH), bool)}
    (metrics,), *_ = fine_tune([nothing])
    assert (metrics["loss"], metrics["gradient_norm"], metrics["tokens"]) == (0, 0, 0)


def test_a_step_by_layers_leaves_nothing_behind(fine_tune, batches):
    fine_tune(batches[:2], executor="layerwise", remat="attention")  # from here on, everything cached exists
    before = {id(array) for array in jax.live_arrays()}
    *_, state = fine_tune(batches[:2], executor="layerwise", remat="attention")
    jax.block_until_ready(state)
    gc.collect()
    held = {id(leaf) for leaf in jax.tree.leaves(state)}
    left = [array.shape for array in jax.live_arrays() if id(array) not in before | held]
    assert [shape for shape in left if shape] == []


def test_the_optimizers_state_passes_in_the_room_that_layers_leave(model_config, monkeypatch):
    """While the backward pass fetches state, device memory never exceeds its use when all layers are kept."""
    config = dataclasses.replace(model_config, num_hidden_layers=12)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    compute = Compute(**COMPUTE | {"executor": "layerwise", "optimizer_memory": "host", "remat": "offload:5,dots"})
    rng = np.random.default_rng(1)
    row = {"tokens": rng.integers(0, config.vocab_size, (2, LENGTH)).astype(np.int32)}
    row |= {"loss_mask": np.ones((2, LENGTH), bool), "segment_ids": np.ones((2, LENGTH), np.int32)}
    row["positions"] = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    batch = place_batch(row, mesh, 1, every_token=False)
    model = build_model(config, compute, mesh)
    step = Layerwise(model, make_optimizer(RECIPE, STEPS), compute, mesh, clip_norm=1.0, batch=batch)
    step.compile()
    params = jax.tree.map(lambda like: jnp.full(like.shape, 0.01, like.dtype), step.abstract.params)
    state = step.begin(params)
    del params
    used = {}

    def watched(name, program):
        def call(*arguments):
            live = (leaf for leaf in jax.live_arrays() if leaf.sharding.memory_kind == "device")
            kind = name[0] if isinstance(name, tuple) else name
            used.setdefault(kind, []).append(sum(leaf.nbytes for leaf in live))
            return program(*arguments)

        return call

    programs = {name: watched(name, program) for name, program in step._schedule.programs.items()}
    step._schedule = dataclasses.replace(step._schedule, programs=programs)
    for _ in range(2):
        state, _ = step(state, batch)
        assert len(used["head"]) == 1
        assert max(used["backward"] + used["forward"]) <= used["head"][0]
        used.clear()


def test_gradients_lie_in_memory_once(model_config):
    """One program with microbatches needs little memory beside the state and one sum of the gradients."""
    config = dataclasses.replace(model_config, num_hidden_layers=48, max_position_embeddings=64)
    compute = ComputeConfig(**{**COMPUTE, "remat": "full", "attention": "chunked"})
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    at = microbatch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((2, 1, 8), jnp.int32, sharding=at)
    flags = jax.ShapeDtypeStruct((2, 1, 8), jnp.bool_, sharding=at)
    batch = Microbatch(ids, ids, flags, ids, None)
    optimizer = make_optimizer(RECIPE, STEPS)
    step = Program(build_model(config, compute, mesh), optimizer, compute, mesh, clip_norm=1.0, batch=batch)
    memory = step.lower().compile().memory_analysis()
    gradients = 4 * parameter_count(config)
    assert memory.alias_size_in_bytes >= 3 * gradients  # parameters and moments are updated in place
    assert gradients <= memory.temp_size_in_bytes < 1.25 * gradients
