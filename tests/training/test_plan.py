import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml

from eabf_jax.errors import InputError
from eabf_jax.hardware import DEVICES, GIB
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.lora import Lora
from eabf_jax.parallel.mesh import MeshConfig, axis_sizes, make_mesh
from eabf_jax.training import plan as planner
from eabf_jax.training.backward import REMAT_POLICIES, Pieces
from eabf_jax.training.plan import check, choose, plan, settle_mesh
from eabf_jax.training.recipe import load_config
from eabf_jax.training.step import build_model

ROOT = Path(__file__).parents[2]
ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
PARAMETERS_7B = 6_738_415_616  # as Hugging Face counts


def llama_7b(**compute):
    """Returns the paper's run and the model that it trains."""
    config = load_config(["--config_path", str(ROOT / "configs/llama2_7b_eabf_16k.yaml")])
    settings = {"remat": "full", "optimizer_memory": "device", **compute}
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, **settings))
    model = dataclasses.replace(LlamaConfig.from_fields(config.model.shape), rope=config.scheme)
    return config, model


def test_the_state_takes_sixteen_bytes_a_parameter_with_its_gradient():
    found = plan(*llama_7b(), ONE, DEVICES["h200"])
    expected = {"parameters": 2, "master rest": 2, "moments": 8, "gradients": 4}
    assert {name: found.parts[name] / PARAMETERS_7B for name in expected} == expected
    assert found.host == {}


@pytest.mark.parametrize("axis", ["fsdp", "context", "tensor"])
def test_devices_share_the_state(axis):
    found = plan(*llama_7b(), {**ONE, axis: 4}, DEVICES["v4"])
    # Every device holds all scales of the norms, 65 x 4,096 numbers.
    share = (PARAMETERS_7B - 65 * 4096) / 4 + 65 * 4096
    assert found.parts["parameters"] == 2 * share
    assert found.parts["moments"] == 8 * share


@pytest.mark.parametrize(
    ("attention", "device", "window", "contexts"),
    [("auto", "h200", 8 * 2047, {1, 2}), ("chunked", "h200", 8 * 2047, {1, 2, 4}), ("auto", "v4", 16384 - 256, {1, 2})],
)
def test_rows_are_split_only_where_the_attention_backend_can(attention, device, window, contexts):
    """A device gets two chunks, whose length must be even for cuDNN and a multiple of 64 for splash."""
    config, model = llama_7b(attention=attention)
    config = dataclasses.replace(config, window=window)
    found = planner.mesh_plans(config, model, 4, DEVICES[device])
    assert {each.mesh["context"] for each in found} == contexts


def test_replicas_do_not_share():
    found = plan(*llama_7b(), {**ONE, "data": 4}, DEVICES["h200"])
    assert found.parts["parameters"] == 2 * PARAMETERS_7B


def test_state_in_host_memory_is_not_on_the_device():
    found = plan(*llama_7b(optimizer_memory="host"), ONE, DEVICES["h100"])
    assert found.host == {"master rest": 2 * PARAMETERS_7B, "moments": 8 * PARAMETERS_7B}
    assert not {"master rest", "moments"} & found.parts.keys()
    assert found.waiting > 0


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_a_layer_keeps_what_the_step_keeps(policy):
    """Compares with the shapes that the forward pass of a layer returns."""
    config, model_config = llama_7b(attention="chunked")
    model_config = dataclasses.replace(model_config, num_key_value_heads=8)
    model = build_model(model_config, config.compute, make_mesh(MeshConfig(), jax.devices()[:1]))
    pieces, length = Pieces(model, 1024), config.window
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], jnp.bfloat16), model.parameters()["layers"])
    x = jax.ShapeDtypeStruct((1, length, model_config.hidden_size), jnp.bfloat16)

    def keep(layer, x, tokens, number):
        return pieces.forward(policy, layer, {}, number, x, model.row(tokens, tokens, None))[1]

    kept = jax.eval_shape(keep, layer, x, tokens, jax.ShapeDtypeStruct((), jnp.int32))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((x, kept)))
    found = planner._Step.of(config, model_config, ONE, 1).kept(policy)
    # `none` also keeps small arrays of one number per token; the others are exact.
    assert found == pytest.approx(size, rel=0.02 if policy == "none" else 0)


def measured_peaks():
    """Yields the committed results of train_step.py whose peak stayed below the memory limit."""
    for path in sorted((ROOT / "benchmarks/results").glob("*.json")):
        report = json.loads(path.read_text())
        for entry in report.get("lengths", [report]) if report.get("benchmark") == "train_step" else ():
            if entry.get("peak_gib") and entry["peak_gib"] < entry["limit_gib"]:
                yield pytest.param(report["config"], entry, id=f"{path.stem}-{entry['length']}")


@pytest.mark.parametrize(("told", "entry"), list(measured_peaks()))
def test_peaks_that_were_measured_on_gpus_are_predicted(told, entry, tmp_path):
    """Predictions are within 3 % or 1 GiB."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**told, "window": entry["length"], "compute": entry["compute"]}))
    config = load_config(["--config_path", str(tmp_path / "run.yaml")])
    model = dataclasses.replace(LlamaConfig.from_fields(config.model.shape), rope=config.scheme)
    device = next(name for name in ("h100", "h200") if name.upper() in entry["device"])
    found = plan(config, model, axis_sizes(config.mesh, entry["devices"]), DEVICES[device])
    assert found.total / GIB == pytest.approx(entry["peak_gib"], rel=0.03, abs=1.0)


def test_layers_behind_the_backward_pass_keep_nothing():
    """Memory peaks at the end of the forward pass, when each layer holds what its own policy keeps."""
    plans = [
        plan(*llama_7b(remat=remat), ONE, DEVICES["h200"]) for remat in ("full", "dots:1,full", "dots:31,full", "dots")
    ]
    kept = [found.parts["kept activations"] for found in plans]
    layer_input, layer_kept = 16384 * 4096 * 2, 16384 * (4096 * 2 * 6 + 2 * 2 * 11008 + 4 * 32)
    assert kept[0] == 32 * layer_input
    assert kept[1] == 31 * layer_input + layer_kept
    assert kept[2] == layer_input + 31 * layer_kept
    assert kept[3] == 32 * layer_kept


def settled(mesh, device, window=16384, **compute):
    config, model = llama_7b(**{"remat": "auto", "optimizer_memory": "auto", "microbatch_size": "auto", **compute})
    return choose(dataclasses.replace(config, window=window), model, mesh, device)


def test_auto_leaves_nothing_open_and_fits():
    found = settled(ONE, DEVICES["h100"])
    config, compute = found.config, found.config.compute
    assert "auto" not in (compute.remat, compute.optimizer_memory, compute.microbatch_size, compute.gather)
    assert found.fits and found.total <= DEVICES["h100"].memory
    assert found == plan(config, llama_7b()[1], ONE, DEVICES["h100"])
    # At 16 bytes per parameter, 100 GiB do not fit on this device, so the optimizer's state goes to host memory.
    assert compute.optimizer_memory == "host"


def test_auto_recomputes_less_where_there_is_more_memory():
    v4 = dataclasses.replace(DEVICES["v4"], memory=0.0)
    recomputed = []
    for gib in (16, 20, 24, 80):
        found = settled({**ONE, "fsdp": 16}, dataclasses.replace(v4, memory=gib * GIB))
        compute = found.config.compute
        assert found.fits and "offload" not in compute.remat and compute.optimizer_memory == "device"
        recomputed.append(found.recomputed_flops)
    assert recomputed == sorted(recomputed, reverse=True) and len(set(recomputed)) == 4
    assert recomputed[-1] == 0.0


def test_auto_keeps_nothing_in_host_memory_where_the_step_is_one_program():
    found = settled(ONE, DEVICES["h200"], executor="program")
    assert found.config.compute.optimizer_memory == "device" and not found.host


def test_auto_takes_more_rows_at_a_time_where_they_are_short():
    mesh = {**ONE, "fsdp": 2}
    long = settled(mesh, DEVICES["h200"], remat="full")
    short = settled(mesh, DEVICES["h200"], remat="full", window=1024)
    assert (long.config.compute.microbatch_size, short.config.compute.microbatch_size) == (2, 16)
    assert long.microbatches == 8 and short.microbatches == 1


def test_a_run_that_cannot_fit_is_refused_with_the_numbers_and_what_would_fit():
    config, model = llama_7b()
    found = plan(config, model, ONE, DEVICES["h100"])
    with pytest.raises(InputError) as refused:
        check(found)
    text = str(refused.value)
    assert "needs 107." in text and "moments 50.2" in text and "it has 76.8" in text
    # The first setting named fits.
    assert "what fits: compute.optimizer_memory host" in text
    host, _ = llama_7b(optimizer_memory="host")
    check(plan(host, model, ONE, DEVICES["h100"]))


@pytest.mark.parametrize(
    ("devices", "device", "changes", "mesh"),
    [
        (16, "v4", {}, {"fsdp": 16}),  # one axis of devices is enough
        (4, "v4", {}, {"fsdp": 2, "context": 2}),  # benchmarks/results/tpu_table.json: 29.4 GiB
        (8, "v4", {"batch_size": 2}, {"fsdp": 2, "context": 4}),  # two rows cannot be split further
        (8, "h100", {"objective": "pretrain"}, {"fsdp": 8}),
        (1, "h200", {}, {"fsdp": 1}),
    ],
)
def test_mesh_auto(devices, device, changes, mesh):
    config, model = llama_7b(remat="full")
    config = dataclasses.replace(config, mesh="auto", recipe=dataclasses.replace(config.recipe, **changes))
    found = settle_mesh(config, model, devices, DEVICES[device])
    assert found == MeshConfig(**{"fsdp": 1, **mesh})
    assert settle_mesh(dataclasses.replace(config, mesh=MeshConfig(tensor=2)), model, 1, DEVICES[device]).tensor == 2


def test_mesh_auto_where_nothing_divides():
    config, model = llama_7b()
    config = dataclasses.replace(config, mesh="auto", recipe=dataclasses.replace(config.recipe, objective="pretrain"))
    with pytest.raises(
        InputError, match=r"mesh auto: no mesh of 3 devices divides recipe\.batch_size 32, window 16384"
    ):
        settle_mesh(config, model, 3, DEVICES["h100"])


def test_a_refusal_names_a_mesh_that_fits():
    config, model = llama_7b(optimizer_memory="device", remat="full", executor="program")
    with pytest.raises(InputError, match=r"what fits: mesh.fsdp 2, mesh.context 2, compute.remat full"):
        check(plan(config, model, {**ONE, "fsdp": 4}, DEVICES["v4"]))


def test_a_refusal_names_more_devices_where_no_setting_helps():
    config, model = llama_7b(optimizer_memory="host", remat="full")
    with pytest.raises(InputError, match=r"2 devices with mesh.fsdp 2") as refused:
        check(plan(config, model, ONE, DEVICES["a100-40"]))
    assert "compute.optimizer_memory host" in str(refused.value)
    assert "adapters (lora.rank 8)" in str(refused.value)


def test_adapters_leave_the_model_without_gradients_and_moments():
    config, model = llama_7b()
    config = dataclasses.replace(config, lora=Lora(rank=8, targets=("q_proj", "v_proj"), train_norms=True))
    found = plan(config, model, {**ONE, "fsdp": 4}, DEVICES["v4"])
    # A and B of two 4,096 x 4,096 projections in 32 layers. Four chips share the rows of A; each has all of B and of
    # the norms' scales.
    norms = 65 * 4096
    trained = 32 * 2 * (4096 * 8 / 4 + 8 * 4096) + norms
    assert found.parts["moments"] == 8 * trained
    assert found.parts["gradients"] == 4 * trained
    assert found.parts["frozen parameters"] == 2 * (PARAMETERS_7B - norms) / 4
    assert found.total < 14 * GIB


def test_a_refusal_names_a_shorter_window_where_devices_do_not_help():
    config, model = llama_7b()
    found = plan(dataclasses.replace(config, window=2**21), model, ONE, DEVICES["h100"])
    with pytest.raises(InputError, match=r"window \d+"):
        check(found)


@pytest.mark.parametrize(("memory", "fits", "lacks"), [("device", 119, 118), ("host", 217, 216)])
def test_a_checkpoint_passes_through_host_memory(memory, fits, lacks):
    """A checkpoint of 7B takes 75.3 GiB (12 bytes per parameter), beside 62.8 GiB of state kept in host memory."""
    for host, expected in ((fits, True), (lacks, False)):
        device = dataclasses.replace(DEVICES["h200"], host_memory=host * GIB)
        assert plan(*llama_7b(optimizer_memory=memory), ONE, device).can_checkpoint is expected


def test_host_memory_that_is_known_is_a_limit():
    device = dataclasses.replace(DEVICES["h100"], host_memory=32 * GIB)
    config, model = llama_7b(optimizer_memory="host")
    with pytest.raises(
        InputError, match=r"62\.8 GiB of host memory for each device; arrays can fill 20.4 of its 32.0; what f"
    ):
        check(plan(config, model, ONE, device))


@pytest.mark.parametrize(("memory", "limit", "fits", "can_checkpoint"), [
    ("device", 89, True, True), ("device", 88, True, False), ("host", 84, True, False), ("host", 70, False, False)
])  # fmt: skip
def test_what_xla_may_use_of_host_memory_is_a_limit(memory, limit, fits, can_checkpoint):
    """A plan for 64 GiB leaves XLA's pool a seventh of its memory for gaps."""
    device = dataclasses.replace(DEVICES["h200"], host_memory=1024 * GIB, pinned_limit=limit * GIB)
    found = plan(*llama_7b(optimizer_memory=memory), ONE, device)
    assert (found.fits, found.can_checkpoint) == (fits, can_checkpoint)
    if not fits:
        with pytest.raises(
            InputError, match=r"fill 59\.5 of its 1024\.0, because of XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB;"
        ):
            check(found)


def test_rows_that_do_not_divide_are_refused():
    config, model = llama_7b()
    with pytest.raises(InputError, match=r"batch_size 32 is not divisible by compute.microbatch_size 1 x 64"):
        plan(config, model, {**ONE, "fsdp": 64}, DEVICES["v4"])
    with pytest.raises(InputError, match="window 16384 is not divisible by mesh context=3"):
        plan(config, model, {**ONE, "context": 3}, DEVICES["v4"])
