import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from eabf_jax.errors import InputError

ROOT = Path(__file__).parents[2]
LLAMA = ["--config_path", str(ROOT / "configs/llama2_7b_eabf_16k.yaml"), "--json", "out.json"]
CONFIG = """
output: runs/micro
window: 64
rope: {type: eabf, base: 50000, pretrained_window: 32, unscaled_layers: 2}
model:
  path: no/such/model
  shape: {vocab_size: 96, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 4,
          num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 32}
compute: {dtype: float32, remat: full}
"""
KEYS = {
    *("tokens_per_second", "mfu", "peak_gib", "compile_seconds", "ratio_to_eager_peer", "ratio_to_compiled_peer"),
    *("device", "devices", "config", "versions", "command", "date", "seconds", "microbatches", "length", "peers"),
}


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("train_step")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a user gets from the whole program with a tiny model, transformers beside it."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "micro.yaml").write_text(CONFIG)
    command = [sys.executable, str(ROOT / "benchmarks/train_step.py"), "--config_path", str(folder / "micro.yaml")]
    command += ["--sequences", "4", "--peers", "eager", "--peer-microbatches", "4", "--multiplier-cost", "1"]
    command += ["--recipe.learning_rate", "0.001", "--json", str(folder / "out.json")]
    # One device, and programs that compile quickly: nobody reads these seconds.
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("64 tokens: ours ")
    return json.loads((folder / "out.json").read_text())


def test_report_has_every_key(report):
    assert report.keys() >= KEYS
    assert report["name"] == "micro"
    assert (report["device"], report["devices"], report["mfu"], report["peak_gib"]) == ("cpu", 1, None, None)
    assert {"jax", "torch", "transformers"} <= report["versions"].keys()
    assert shlex.split(report["command"])[:2] == ["python", str(ROOT / "benchmarks/train_step.py")]
    # Overrides, the benchmark's own included, and weights that are not read.
    config = report["config"]
    assert (config["recipe"]["learning_rate"], config["recipe"]["batch_size"]) == (0.001, 4)
    assert config["model"]["path"] is None
    assert report["compute"]["remat"] == "full"
    assert report["planned_gib"] > 0


def test_figures_follow_from_the_seconds(report):
    assert (len(report["warmup_seconds"]), len(report["seconds"])) == (1, 2)
    assert report["tokens_per_second"] == pytest.approx(4 * 64 / statistics.median(report["seconds"]))
    peer = report["peers"]["eager"]
    assert peer["tokens_per_second"] == pytest.approx(4 * 64 / statistics.median(peer["seconds"]))
    assert report["ratio_to_eager_peer"] == pytest.approx(report["tokens_per_second"] / peer["tokens_per_second"])
    assert report["ratio_to_compiled_peer"] is None
    assert report["compile_seconds"] > 0
    # Matrix products: of each layer q and o 32 x 32, k and v 32 x 16, three of 32 x 48, two norms; the last norm; the
    # output 32 x 96. Attention: 6 x 3 layers x 32 x 64 tokens.
    products = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32 + 32 * 96
    assert report["flops_per_token"] == 6 * products + 6 * 3 * 32 * 64


def test_both_stacks_do_the_same_work(report):
    peer = report["peers"]["eager"]
    assert (
        (peer["microbatches"], peer["microbatch_size"]) == (report["microbatches"], report["microbatch_size"]) == (4, 1)
    )
    # Weights of 0.02 say next to nothing of the tokens: the loss is ln(vocabulary) but for a few hundredths.
    assert report["losses"][0] == pytest.approx(math.log(96), abs=0.03)
    assert peer["losses"][0] == pytest.approx(math.log(96), abs=0.03)
    # Different draws of weights and of 252 tokens: they differ by half a percent. Half the tokens, or a gradient that
    # is summed rather than averaged, would make 40 percent or more.
    assert report["gradient_norms"][0] == pytest.approx(peer["gradient_norms"][0], rel=0.1)
    # The state is carried from step to step: a learning rate of 0.001 shows in the third.
    assert report["losses"][2] != report["losses"][0]
    assert (peer["parameter_dtype"], peer["precision"], peer["graphs"]) == ("float32", "autocast", 0)


def test_multiplier_is_timed_against_default(report):
    cost = report["multiplier_cost"]
    [with_it], [without] = cost["seconds_with"], cost["seconds_without"]
    assert cost["ratio"] == pytest.approx(with_it / without - 1)


def test_multiplier_cost_is_the_median_of_the_pairs(program):
    # 1 %, 2 % and, in a pair that something else disturbed, 50 %.
    cost = program.multiplier_cost([(1.01, 1.0), (2.04, 2.0), (3.0, 2.0)])
    assert cost["ratio"] == pytest.approx(0.02)


@pytest.mark.parametrize(("rate", "mfu"), [(6_899, 0.366), (8_149, 0.433), (8_242, 0.438), (9_204, 0.489)])
def test_mfu_is_that_of_published_measurements(program, rate, mfu):
    # Measured elsewhere on H100 and H200, rounded to 0.1 %: LLaMA-2-7B at 16,384 tokens.
    options, rest = program.parse(LLAMA)
    model = program.shape_of(program.configure(rest, options, None))
    for device in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert program.model_flops_utilisation(rate, model, 16_384, device) == pytest.approx(mfu, abs=0.0005)
    assert program.model_flops_utilisation(rate, model, 16_384, "cpu") is None


def test_a_peer_with_fewer_microbatches_is_reckoned_up(program):
    own = {"tokens_per_second": 4000.0, "tokens_per_second_per_device": 2000.0, "microbatches": 8}
    peer = {
        "tokens_per_second": 2 * 1000 / 2.5,
        "microbatches": 2,
        "microbatch_size": 1,
        "microbatch_seconds": 1.0,
        "update_seconds": 0.5,
    }
    # Eight microbatches of 1,000 tokens and one update: 8.5 s.
    assert program.ratio_to(own, peer, 1000) == pytest.approx(2000 / (8000 / 8.5))
    assert program.ratio_to({**own, "microbatches": 2}, peer, 1000) == pytest.approx(2000 / 800)
    assert program.ratio_to({"out_of_memory": True}, peer, 1000) is None
    assert program.ratio_to(own, {"out_of_memory": True}, 1000) is None


def test_lengths_within_the_pretrained_window_keep_the_work(program):
    options, rest = program.parse([*LLAMA, "--sequences", "2", "--steps", "3", "--compute.loss_chunk", "512"])
    config = program.configure(rest, options, 4096)
    assert (config.window, config.recipe.batch_size, config.recipe.steps) == (4096, 2, 4)
    assert (config.compute.loss_chunk, config.model.path) == (512, None)
    assert config.model.shape["max_position_embeddings"] == config.rope.pretrained_window == 2048
    long = program.configure(rest, options, 65_536)
    assert long.model.shape["max_position_embeddings"] == long.rope.pretrained_window == 4096
    differing = {key for key in config.model.shape if config.model.shape[key] != long.model.shape[key]}
    assert differing == {"max_position_embeddings"}


def test_the_recipe_is_six_steps_of_the_paper(program):
    options, rest = program.parse([*LLAMA, "--recipe"])
    config = program.configure(rest, options, None)
    assert (config.recipe.steps, config.recipe.batch_size, config.window) == (6, 32, 16_384)


def test_rows_are_full_and_learned(program, load_program):
    import numpy as np

    batch = program.random_batch(np.random.default_rng(0), 3, 500, 96)
    assert batch["loss_mask"].all() and (batch["segment_ids"] == 1).all()
    assert (batch["positions"] == np.arange(500)).all()
    assert set(np.unique(batch["tokens"])) == set(range(96))


def test_running_out_of_memory_is_a_result(program, monkeypatch):
    options, rest = program.parse(LLAMA)
    config = program.configure(rest, options, None)

    def fail(message):
        def measure(*_):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(program, "_measure", measure)

    fail("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.\nBufferAssignment: ...")
    figures = program.own_figures(config, options)
    assert figures["out_of_memory"] is True
    assert figures["error"] == "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes."
    fail("INTERNAL: an illegal instruction")
    with pytest.raises(jax.errors.JaxRuntimeError, match="illegal"):
        program.own_figures(config, options)


def test_the_longest_that_ran_stands_for_the_run(program):
    ran = {"tokens_per_second": 1.0}
    entries = [
        {"length": 4096, "peers": {"eager": ran}, **ran},
        {"length": 8192, "peers": {"eager": {"out_of_memory": True}}, **ran},
        {"length": 16_384, "peers": {"eager": {"out_of_memory": True}}, "out_of_memory": True},
    ]
    assert program.longest(entries) == {"ours": 8192, "eager": 4096}
    assert program.headline(entries, 4096)["length"] == 4096
    assert program.headline(entries, 16_384)["length"] == 8192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "eagre"], "did you mean 'eager'"),
        (["--steps", "0"], "--steps 0"),
        (["--lengths", "4k"], "--lengths: invalid integers value: '4k'"),
        (["--json", "no/such/folder/out.json"], "no directory no/such/folder"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(program, arguments, message):
    with pytest.raises(InputError, match=message):
        program.parse([*LLAMA, *arguments])


def test_a_configuration_without_a_shape_is_refused(program):
    options, rest = program.parse(["--config_path", str(ROOT / "configs/tiny_eabf_2k.yaml"), "--json", "out.json"])
    with pytest.raises(InputError, match=r"no model\.shape"):
        program.configure(rest, options, None)
