import dataclasses
import errno
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from runs import refuse
from safetensors.numpy import save_file

from eabf_jax.cli import main
from eabf_jax.data.dataset import read_metadata, tokenizer_digest
from eabf_jax.errors import InputError
from eabf_jax.interop.loading import load_parameters
from eabf_jax.interop.native import save_params, write_model_json
from eabf_jax.interop.tokenizer import load_tokenizer
from eabf_jax.model.parameters import parameter_count
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.training import trainer
from eabf_jax.training.plan import Plan
from eabf_jax.training.recipe import dump_config, load_config
from eabf_jax.training.trainer import _first_signal, base_config, lower_train_step, train

TOKENIZER = "assets/tiny"


@pytest.fixture(scope="module")
def finished(run_config, tmp_path_factory):
    """A run of ten steps on eight devices, and its configuration."""
    config = run_config(tmp_path_factory.mktemp("finished") / "runs" / "micro")
    return train(config), config


def final_params(run):
    return load_parameters(run)[1]


def test_a_run_leaves_a_model_directory_with_its_record(finished, extended, read_metrics):
    run, config = finished
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "dataset.json",
        "model.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }
    assert json.loads((run / "dataset.json").read_text())["splits"]["train"]["records"] == 40
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"10"}
    # A finished run has no use for the moments.
    assert {path.name for path in (run / "checkpoints" / "10").iterdir() if path.is_dir()} == {"params"}
    assert load_config(["--config_path", str(run / "config.yaml")]) == config
    found, params = load_parameters(run)
    assert found == extended
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    metrics = read_metrics(run)
    assert [m["step"] for m in metrics] == list(range(1, 11))
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.3
    # Cosine decay from the peak; the last step's rate is the one before zero.
    expected = [1e-2 * 0.5 * (1 + np.cos(np.pi * step / 10)) for step in range(10)]
    # In float32, the error is a few roundings of 6e-8 of the peak; the lowest rate is 0.024 of the peak.
    np.testing.assert_allclose([m["learning_rate"] for m in metrics], expected, rtol=1e-5)
    assert ["compile_seconds" in m for m in metrics] == [True] + [False] * 9
    # The first step's time does not include the compilation.
    assert metrics[0]["seconds"] < metrics[0]["compile_seconds"] + 1
    for m in metrics:
        assert m["tokens_per_second"] == pytest.approx(8 * 64 / m["seconds"])
        assert m["mfu"] is None  # the peak of this CPU is unknown


def test_a_finished_run_is_left_alone(finished, monkeypatch):
    run, config = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)  # fails if anything is compiled
    assert train(config) == run
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"recipe": {"learning_rate": 2e-2}}, "recipe.learning_rate"),
        ({"rope": {"type": "abf", "base": 5e4}}, "rope.pretrained_window, rope.type, rope.unscaled_layers"),
        ({"mesh": {"data": 2}, "compute": {"dtype": "bfloat16"}, "recipe": {"seed": 1}}, "compute.dtype, recipe.seed"),
    ],
)
def test_another_configuration_in_the_same_directory_is_refused(finished, run_config, changes, keys):
    run, _ = finished
    if changes.get("rope"):
        changed = dataclasses.replace(
            run_config(run), rope=type(load_config(["--output", "x", "--window", "2", "--rope.type", "abf"]).rope)(5e4)
        )
    else:
        changed = run_config(run, **changes)
    refuse(changed, f"holds a run with other values of {re.escape(keys)}; pass --overwrite true")


def test_overwriting_starts_afresh_and_leaves_other_files(run_config, write_dataset, tmp_path, read_metrics):
    run, data = tmp_path / "run", write_dataset(tmp_path / "set", seed=1)
    own = {"data": {"directory": str(data)}}
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    config = run_config(run, recipe={"steps": 1}, **own)
    refuse(config, "is not empty and holds no run; name another directory, or pass --overwrite true")
    assert [path.name for path in run.iterdir()] == ["notes.txt"]
    train(dataclasses.replace(config, overwrite=True))
    assert (run / "notes.txt").read_text() == "mine"
    # The dataset is replaced by another of the same name, which must not go unsaid.
    shutil.rmtree(data)
    write_dataset(data, seed=2)
    refuse(config, r"is not the one that the run in .* began with \(another splits than in .*dataset\.json\): prep")
    other = run_config(run, recipe={"steps": 2, "seed": 4}, overwrite=True, **own)
    train(other)
    assert (run / "dataset.json").read_text() == json.dumps(read_metadata(data), indent=2) + "\n"
    assert [m["step"] for m in read_metrics(run)] == [1, 2]
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["recipe"]["seed"] == 4


def test_overwriting_takes_nothing_that_no_run_wrote(run_config, tmp_path):
    """The directory holds other files under names that a run also writes."""
    run = tmp_path / "home"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "tokenizer.json"):
        (run / name).write_text("{output: mine}")
    config = run_config(run, overwrite=True)
    refuse(
        config, r"holds config.yaml, checkpoints, tokenizer.json, but nothing marks it as a run's directory \(no model"
    )
    (run / "config.yaml").write_text(dump_config(config))  # as `eabf suggest --write` does
    refuse(config, r"holds config.yaml, checkpoints, tokenizer.json, but nothing marks it as a run's directory")
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "tokenizer.json"}


def test_a_start_that_fails_puts_the_old_run_back(finished, run_config, tmp_path, monkeypatch):
    run, _ = finished
    shutil.copytree(run, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "it is full")

    monkeypatch.setattr(trainer, "write_model_json", full)
    with pytest.raises(OSError, match="it is full"):
        train(run_config(tmp_path / "run", overwrite=True))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("by_shape", [False, True])
def test_a_model_is_taken_for_one_with_a_smaller_window(run_config, shape, by_shape, model_config):
    own = {"path": None, "shape": shape} if by_shape else {}
    found = base_config(run_config("x", model={**own, "window": 24}))
    assert found == dataclasses.replace(model_config, max_position_embeddings=24)
    assert base_config(run_config("x", model=own)) == model_config


def test_a_pretraining_run_from_nothing_packs_and_keeps_the_tokenizer(run_config, shape, write_dataset, tmp_path):
    shape = {**shape, "vocab_size": 4096}
    digest = tokenizer_digest(load_tokenizer(TOKENIZER))
    data = write_dataset(tmp_path / "set", metadata={"vocab_size": 4096, "tokenizer": digest})
    config = run_config(
        tmp_path / "run",
        window=32,
        model={"path": None, "shape": shape, "tokenizer": TOKENIZER},
        data={"directory": str(data)},
        recipe={"objective": "pretrain", "steps": 2, "batch_size": 16},
        compute={"microbatch_size": 2},
        checkpoint={"every_steps": None},
    )
    run = train(config)
    assert load_tokenizer(run).encode("hello") == load_tokenizer(TOKENIZER).encode("hello")
    tokens = [json.loads(line)["trained_tokens"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(16 * 32 * 0.9 < count < 16 * 32 for count in tokens)  # all but the first of each document in a row


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {"batch_size": 12}}, r"batch_size 12 is not divisible by compute.microbatch_size 1 x 8 devices"),
        (
            {"compute": {"microbatch_size": 2}},
            r"batch_size 8 is not divisible by compute.microbatch_size 2 x 8 devices",
        ),
        ({"recipe": {"batch_size": 48}}, "has 40 records, fewer than one batch of 48"),
        ({"recipe": {"seed": 2**32}}, "seed 4294967296 is out of range"),
        ({"mesh": {"fsdp": 3}}, "takes 3 devices; 8 are available"),
        ({"mesh": {"tensor": 8}}, "mesh tensor=8 does not divide the model's 2 key-value heads"),
        ({"window": 32}, "window 32 is not larger than the model's own window 32: nothing to extend; set model.window"),
        ({"model": {"window": 64}}, "model.window 64 is larger than the model's own window 32"),
        ({"model": {"window": 16}}, "rope.pretrained_window 32 is larger than the model's own window 16"),
        (
            {"mesh": "auto", "recipe": {"batch_size": 9, "objective": "pretrain"}},
            "mesh auto: no mesh of 8 devices divides recipe.batch_size 9",
        ),
        ({"window": 48}, "has records of 64 tokens, but rows have 48"),
        ({"data": {"directory": "nowhere"}}, "nowhere is not a prepared dataset"),
        ({"data": {"split": "trian"}}, "did you mean 'train'"),
        ({"model": {"path": "nowhere"}}, "nowhere: no such directory"),
        ({"model": {"path": None}}, r"names no model: set model.path .* or model.shape"),
        ({"model": {"shape": {"hidden_size": 64}}}, r"model.shape says hidden_size 64; the model in .* has 32"),
        ({"model": {"shape": {"hiden_size": 32}}}, "unknown model field 'hiden_size': did you mean 'hidden_size'"),
        ({"model": {"tokenizer": "configs"}}, "no tokenizer in configs"),
        ({"model": {"tokenizer": TOKENIZER}}, "the tokenizer has 4096 tokens, the embedding 96 rows"),
        ({"compute": {"attention": "flash"}}, "unknown attention backend 'flash'"),
        ({"compute": {"remat": "ful"}}, "unknown remat policy 'ful': did you mean 'full'"),
        ({"compute": {"remat": "none:1,full:1"}}, "remat 'none:1,full:1' is for 2 layers; the model has 3"),
        (
            {"compute": {"optimizer_memory": "host", "executor": "program"}},
            "optimizer_memory 'host' needs compute.executor 'layerwise', not 'program'",
        ),
        (
            {"compute": {"remat": "offload:1,full", "executor": "program"}},
            "compute.remat 'offload' needs compute.executor 'layerwise', not 'program'",
        ),
        (
            {"compute": {"gather": "step", "executor": "program"}},
            "compute.gather 'step' needs compute.executor 'layerwise', not 'program'",
        ),
        (
            {"mesh": {"context": 2}, "recipe": {"objective": "pretrain"}},
            "mesh.context above 1 takes one document a row",
        ),
        (
            {"recipe": {"epochs": 2**30}},
            r"recipe.epochs 1073741824 makes 5368709120 steps; fewer than 2\*\*31 are needed",
        ),
        ({"recipe": {"warmup_steps": 10}}, r"recipe.warmup_steps 10 is not less than the run's 10 steps"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(run_config, tmp_path, changes, message):
    refuse(run_config(tmp_path / "run", **changes), message)
    assert list(tmp_path.iterdir()) == []


def test_output_may_not_be_what_is_read(run_config, base_model, dataset, tmp_path):
    before = sorted(base_model.iterdir())
    for output, source, relation in (
        (base_model, base_model, "is"),
        (dataset, dataset, "is"),
        (base_model.parent, base_model, "holds"),
        (dataset / "run", dataset, "lies in"),
    ):
        refuse(run_config(output, overwrite=True), f"{output} {relation} the source {source}: name another directory")
    (tmp_path / "file").write_text("")
    refuse(run_config(tmp_path / "file"), "is a file: name a directory")
    assert sorted(base_model.iterdir()) == before


def test_tokens_beyond_the_embedding_are_refused(run_config, write_dataset, tmp_path):
    data = write_dataset(tmp_path / "set", metadata={"vocab_size": 97})
    config = run_config(tmp_path / "run", data={"directory": str(data)})
    refuse(config, "was tokenized with 97 tokens; the model's embedding has 96 rows")
    assert not (tmp_path / "run").exists()


def test_tokens_of_another_tokenizer_are_refused(run_config, shape, write_dataset, tmp_path):
    data = write_dataset(tmp_path / "set", metadata={"vocab_size": 96, "tokenizer": "0123456789abcdef"})
    model = {"path": None, "shape": {**shape, "vocab_size": 4096}, "tokenizer": TOKENIZER}
    config = run_config(tmp_path / "run", data={"directory": str(data)}, model=model)
    refuse(
        config, r"another tokenizer \(digest 0123456789abcdef\) than the one in assets/tiny .* --tokenizer assets/tiny"
    )
    assert not (tmp_path / "run").exists()


def test_adapters_of_peft_have_the_tokenizer_of_their_base(run_config, base_model, write_dataset, tmp_path):
    base = shutil.copytree(base_model, tmp_path / "base")
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    (base / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    (tmp_path / "peft").mkdir()
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    described = {**options, "base_model_name_or_path": str(base)}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(described))
    q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 32), "B": (32, 2)}
    adapters = {
        q.format(layer, name): np.zeros(shape, np.float32) for layer in range(3) for name, shape in shapes.items()
    }
    save_file(adapters, tmp_path / "peft" / "adapter_model.safetensors")
    data = write_dataset(tmp_path / "set", metadata={"vocab_size": 96, "tokenizer": "0123456789abcdef"})
    config = run_config(tmp_path / "run", data={"directory": str(data)}, model={"path": str(tmp_path / "peft")})
    refuse(config, rf"than the one in {base} .* prepare it with --tokenizer {base}")


def test_a_damaged_model_leaves_no_run(run_config, base_model, tmp_path):
    shutil.copytree(base_model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "checkpoints" / "0" / "params" / "d")
    refuse(run_config(tmp_path / "run", model={"path": str(tmp_path / "model")}), "damaged checkpoint|cannot be read")
    assert not (tmp_path / "run").exists()


def test_a_blow_up_stops_the_run_and_keeps_the_last_good_checkpoint(run_config, params, tmp_path, read_metrics):
    # Warm-up starts at zero: the first step changes nothing, the second everything.
    config = run_config(tmp_path / "run", recipe={"learning_rate": 1e30, "warmup_steps": 3})
    refuse(config, r"not finite at step 2: .*parameter norm inf.*; stopped, checkpoint 1 in .*run is the last good one")
    assert [m["step"] for m in read_metrics(tmp_path / "run")] == [1]
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "run"), params)


def test_a_weight_that_is_not_a_number_stops_the_run(run_config, model_config, params, tmp_path):
    broken = jax.tree.map(np.array, params)
    broken["norm"]["scale"][3] = np.nan
    (tmp_path / "model").mkdir()
    write_model_json(tmp_path / "model", model_config)
    save_params(tmp_path / "model", broken)
    config = run_config(tmp_path / "run", model={"path": str(tmp_path / "model")})
    refuse(config, "not finite at step 1: loss nan, .* stopped, no checkpoint was written")


def test_a_checkpoint_that_host_memory_has_no_room_for(run_config, tmp_path, monkeypatch):
    """It is refused before anything runs; without intermediate checkpoints, the run completes."""
    monkeypatch.setattr(Plan, "can_checkpoint", False)
    config = run_config(tmp_path / "run", recipe={"steps": 1})
    refuse(config, "host memory has no room for a checkpoint .* set checkpoint.every_steps null")
    assert not (tmp_path / "run").exists()
    run = train(run_config(tmp_path / "run", recipe={"steps": 1}, checkpoint={"every_steps": None}, mesh="auto"))
    assert load_parameters(run)


def flip(path, at=0.5):
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def kept(run_config, tmp_path_factory):
    """Completes a run that keeps its checkpoints of steps 4, 8 and 10."""
    config = run_config(tmp_path_factory.mktemp("kept") / "run", checkpoint={"every_steps": 4, "keep": 3})
    return train(config), config


@pytest.fixture
def copied(kept, tmp_path):
    """Copies that run."""
    run, config = kept
    shutil.copytree(run, tmp_path / "run")
    here = dataclasses.replace(config, output=str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run), here.output))
    return tmp_path / "run", here


@pytest.mark.parametrize("damaged", [("params",), ("optimizer",), ("data",), ("params", "d"), ("", "optimizer")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(kept, copied, capfd, damaged):
    """One file of checkpoint 8 is flipped, or a folder of it is missing."""
    run, config = copied
    shutil.rmtree(run / "checkpoints" / "10")
    at = (run / "checkpoints" / "8").joinpath(*damaged)
    if len(damaged) == 1:
        at = largest(at)
        flip(at)
    else:
        shutil.rmtree(at)
    train(config)
    lines = [line for line in capfd.readouterr().err.splitlines() if "checkpoint" in line]
    assert lines[0].startswith(f"checkpoint 8 is damaged: {at}") and "looking for the one before" in lines[0]
    assert lines[1].endswith("set aside as 8.damaged") and len(lines) == 2
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"4", "8", "8.damaged", "10"}
    found, wanted = (load_parameters(directory)[1] for directory in (run, kept[0]))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_damage_to_the_last_checkpoint_is_found_when_a_finished_run_is_started_again(kept, copied, capfd):
    run, config = copied
    at = largest(run / "checkpoints" / "10" / "params")
    flip(at)
    with pytest.raises(InputError, match=rf"{at}: damaged: .*; move {run}/checkpoints/10 away .* of step 8"):
        load_parameters(run)
    train(config)
    assert f"checkpoint 10 is damaged: {at}" in capfd.readouterr().err
    found, wanted = (load_parameters(directory)[1] for directory in (run, kept[0]))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_run_without_an_undamaged_checkpoint_is_refused(copied):
    run, config = copied
    for step in (4, 8, 10):
        flip(largest(run / "checkpoints" / str(step) / "params"))
    refuse(config, f"{run}/checkpoints/4/params/.*: damaged: .* no checkpoint before it .* --overwrite true")


def test_an_empty_folder_is_no_checkpoint(copied, capfd):
    run, config = copied
    shutil.rmtree(run / "checkpoints" / "10")
    (run / "checkpoints" / "12").mkdir()
    train(config)
    assert "checkpoints/12: no whole checkpoint; set aside as 12.damaged" in capfd.readouterr().err
    assert (run / "checkpoints" / "10" / "params").is_dir()


@pytest.mark.parametrize("position", ['{"next_index": 7}', "{}", '{"next_index": "8"}', "[]", "{"])
def test_a_position_in_the_data_that_is_not_the_checkpoints_is_refused(copied, position):
    """Checkpoints of earlier releases have no checksums, so the position is compared with the step."""
    run, config = copied
    shutil.rmtree(run / "checkpoints" / "10")
    (run / "checkpoints" / "8" / "data" / "checksums.json").unlink()
    (run / "checkpoints" / "8" / "data" / "metadata").write_text(position)
    refuse(config, r"checkpoint 8 in .*: remove it to resume from the one before")


class Interrupted:
    """A run of `python train.py` that may be interrupted."""

    STEPS = 20

    def __init__(self, folder, config_file, start):
        self.run, self.start = folder / "run", start
        self.config = config_file(
            folder / "config.yaml", self.run, recipe={"steps": self.STEPS}, checkpoint={"keep": 2}
        )

    def go(self):
        return self.start("--config_path", self.config)

    def recorded(self):
        path = self.run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait(self, process, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture(scope="module")
def uninterrupted(config_file, tmp_path_factory, quick_flags):
    """Completes a run, started as a user would start it."""

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "train.py", *map(str, arguments)],
            env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {quick_flags}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole = Interrupted(tmp_path_factory.mktemp("whole"), config_file, start)
    process = whole.go()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    # There are only our own lines, and no library's log or warning.
    lines = err.splitlines()
    assert lines[0] == "compiling the step ..."
    assert len(lines) == 1 + Interrupted.STEPS and all(re.match(r"step \d+/20  loss ", line) for line in lines[1:])
    assert f"{whole.run}: finished" in out
    return whole


def test_killed_and_started_again_a_run_ends_bit_for_bit_the_same(
    uninterrupted, config_file, fork, train_py, tmp_path, read_metrics
):
    # The step is compiled by the first of these processes and by the one that is never cut off, and read by the others.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    cut = Interrupted(tmp_path, config_file, functools.partial(fork, train_py, **cache))

    process = cut.go()  # SIGKILL at a random step
    kill_at = random.Random(20240107).randint(2, 5)
    cut.wait(process, lambda: cut.recorded() >= kill_at)
    process.kill()
    process.communicate()
    killed_at = cut.recorded()
    assert kill_at <= killed_at < cut.STEPS

    process = cut.go()  # SIGKILL while a later checkpoint is being written
    partial = re.compile(r"(\d+)\.orbax-checkpoint-tmp")
    checkpoints = cut.run / "checkpoints"

    def writing():
        names = [partial.fullmatch(path.name) for path in checkpoints.iterdir()]
        return any(name and int(name[1]) > killed_at + 1 for name in names)

    cut.wait(process, writing)
    process.kill()
    process.communicate()

    process = cut.go()  # SIGTERM, as on a preempted machine
    recorded = cut.recorded()
    cut.wait(process, lambda: cut.recorded() > recorded)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3  # stopped, can go on
    last = err.splitlines()[-1]
    stopped = re.fullmatch(r"stopped by a signal after step (\d+) of 20; run it again to resume", last)
    assert stopped, err
    assert max(int(path.name) for path in checkpoints.iterdir()) == int(stopped[1]) < cut.STEPS

    process = cut.go()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert err.splitlines()[1].startswith(f"step {int(stopped[1]) + 1}/20")

    jax.tree.map(np.testing.assert_array_equal, final_params(cut.run), final_params(uninterrupted.run))
    lines, expected = read_metrics(cut.run), read_metrics(uninterrupted.run)
    assert [m["step"] for m in lines] == list(range(1, cut.STEPS + 1))
    for name in ("loss", "gradient_norm", "parameter_norm", "learning_rate", "trained_tokens"):
        assert [m[name] for m in lines] == [m[name] for m in expected]
    # Remains of the interrupted saves are gone.
    assert sorted(path.name for path in checkpoints.iterdir()) == ["19", "20"]


def test_a_finished_run_started_again_says_so_at_once(uninterrupted, read_metrics, capsys):
    before = read_metrics(uninterrupted.run)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config_path", str(uninterrupted.config)])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert f"{uninterrupted.run}: finished" in out
    assert err == ""
    assert read_metrics(uninterrupted.run) == before


@pytest.fixture
def interruptible():
    """Handles Ctrl-C as in a terminal; a process that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_sent_twice_in_a_row_is_one(interruptible):
    with _first_signal() as received:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]


@pytest.mark.parametrize(
    ("number", "resumable", "status", "again"),
    [
        (signal.SIGTERM, True, 3, "resume"),
        (signal.SIGINT, True, 130, "resume"),
        (signal.SIGTERM, False, 143, "start over: no checkpoint fits in host memory"),
    ],
)
def test_the_exit_status_of_a_stopped_run(number, resumable, status, again):
    stop = trainer.Preempted(3, 20, number, resumable=resumable)
    assert (str(stop), stop.status) == (f"stopped by a signal after step 3 of 20; run it again to {again}", status)


def test_the_second_signal_is_not_held_back(interruptible, monkeypatch):
    monkeypatch.setattr(trainer, "REPEAT", 0)
    with _first_signal() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and `&` do
    with _first_signal() as received:
        signal.raise_signal(signal.SIGINT)
        assert not received
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("path", sorted(Path("configs").glob("llama2_7b_*.yaml")), ids=lambda path: path.stem)
def test_the_7b_step_lowers_from_shapes_alone(path):
    config = load_config(["--config_path", str(path)])
    assert parameter_count(base_config_without_weights(config)) == 6_738_415_616
    arrays = sum(array.nbytes for array in jax.live_arrays())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lowered = lower_train_step(config, make_mesh(MeshConfig(fsdp=8)))
    assert sum(array.nbytes for array in jax.live_arrays()) - arrays < 2**20
    # In KiB. The parameters alone would take 25 GiB, the smallest kernel 500 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 400 * 2**10

    (state, batch), _ = lowered.in_avals
    trained, frozen = 6_738_415_616, 0
    if config.lora is not None:
        changed = 32_000 * 4_096 + 65 * 4_096  # embedding and norms
        # A and B of four projections in 32 layers.
        trained, frozen = changed + 32 * 4 * 8 * (4_096 + 4_096), trained - changed
    assert sum(leaf.size for leaf in jax.tree.leaves(state.frozen)) == frozen
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen)} <= {jnp.dtype("bfloat16")}
    for tree, dtype in zip(state[1:5], ("bfloat16", "int16", "float32", "float32"), strict=True):
        leaves = jax.tree.leaves(tree)
        assert sum(leaf.size for leaf in leaves) == trained
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    assert batch.tokens.shape == (4, 8, 16_384)


def base_config_without_weights(config):
    return base_config(dataclasses.replace(config, model=dataclasses.replace(config.model, path=None)))
