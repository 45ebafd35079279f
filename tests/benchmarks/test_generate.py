"""The generation benchmark: its arithmetic with a simulated clock, its counts, and a run of a small shape on a CPU."""

import itertools
import json
import types

import jax
import jax.numpy as jnp
import pytest

from eabf_jax.errors import InputError
from eabf_jax.inference import Completion
from eabf_jax.model import Llama, LlamaConfig
from eabf_jax.model.kv_cache import empty_cache


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("generate")


class Clock:
    """A clock that only the test advances."""

    now = 1000.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


ROWS, NEW = 3, 11
# (seconds to the first token, seconds from there) by call: one compiles, two are warm, three are timed.
CALLS = [(100.0, 70.0), (2.5, 2.0), (2.5, 2.0), (2.0, 5.0), (7.0, 4.0), (3.0, 9.0)]


def stream_of(clock, calls, tokens=NEW):
    taken = iter(calls)

    def start():
        first, rest = next(taken)
        clock.spend(first)
        yield [Completion([0], "", None)] * ROWS
        for _ in range(2):
            clock.spend(rest / 2)
            yield [Completion([0] * tokens, "", "length")] * ROWS

    return start


def test_our_rate_is_of_the_tokens_after_the_first_and_of_warm_calls(program):
    clock = Clock()
    figures, last = program.our_speed(stream_of(clock, CALLS), ROWS, NEW, clock)
    # 3 rows of 10 tokens after the first, in 5 seconds, the median of 5, 4 and 9.
    assert figures["tokens_per_second"] == pytest.approx(3 * 10 / 5)
    assert figures["first_token_seconds"] == pytest.approx(3.0)  # median of 2, 7 and 3
    assert figures["spread"] == pytest.approx((9 - 4) / 5)
    assert figures["timed_runs"] == 3
    assert figures["seconds"]["warm_up"] == pytest.approx([170.0, 4.5, 4.5])
    assert figures["seconds"]["first_token"] == pytest.approx([2, 7, 3])
    assert figures["seconds"]["decode"] == pytest.approx([5, 4, 9])
    assert len(last) == ROWS


def test_rows_that_ended_early_have_no_rate(program):
    clock = Clock()
    with pytest.raises(RuntimeError, match=r"\[10\] new tokens where 11 were asked for"):
        program.our_speed(stream_of(clock, CALLS, tokens=10), ROWS, NEW, clock)


def test_warming_up_goes_on_until_a_call_is_no_quicker(program):
    def seconds(*calls):
        clock, taken = Clock(), iter(calls)
        return program.warm_up(lambda: clock.spend(next(taken)), clock)

    assert seconds(9, 9, 1) == pytest.approx([9, 9])
    assert seconds(90, 20, 2, 1.99, 1) == pytest.approx([90, 20, 2, 1.99])  # compiles, records, then stays
    assert seconds(50, 40, 30, 20, 10, 5) == pytest.approx([50, 40, 30, 20, 10])  # never settles


def peer_of(clock, prefill, token, first_call=0.0):
    """Returns a `generate` that yields nothing before its end, and `counts`, the requested numbers of tokens."""
    prefills, tokens, counts = iter(prefill), iter(token), []

    def generate(count):
        if not counts:
            clock.spend(first_call)
        counts.append(count)
        clock.spend(next(prefills) + next(tokens) * (count - 1))

    return generate, counts


def test_the_peers_rate_is_of_the_tokens_after_the_first(program):
    clock = Clock()
    # Two calls warm up, three generate one token, three eleven.
    prefill = [6, 6, 5, 4, 9, 5, 5, 5]
    generate, counts = peer_of(clock, prefill, [1, 1, 1, 1, 1, 2, 3, 7])
    figures = program.peer_speed(generate, ROWS, NEW, clock, compiled=False, best=None)
    assert counts == [2, 2, 1, 1, 1, NEW, NEW, NEW]
    assert figures["first_token_seconds"] == pytest.approx(5)  # median of 5, 4 and 9
    assert figures["seconds"]["decode"] == pytest.approx([20, 30, 70])  # not 25, 35 and 75
    assert figures["tokens_per_second"] == pytest.approx(3 * 10 / 30)
    assert figures["spread"] == pytest.approx(50 / 30)


def test_a_compiled_peer_is_warm_at_full_length(program):
    clock = Clock()
    generate, counts = peer_of(clock, itertools.repeat(5), itertools.repeat(2), first_call=100)
    figures = program.peer_speed(generate, ROWS, NEW, clock, compiled=True, best=99.0)
    assert counts == [NEW] * 3 + [1] * 3 + [NEW] * 3
    assert figures["seconds"]["warm_up"] == pytest.approx([125, 25, 25])
    assert figures["tokens_per_second"] == pytest.approx(3 * 10 / 20)


@pytest.mark.parametrize(("best", "timed"), [(1.6, 3), (1.7, 0)])
def test_a_peer_far_behind_has_a_trial_only(program, best, timed):
    clock = Clock()
    generate, counts = peer_of(clock, itertools.repeat(5), itertools.repeat(2))
    figures = program.peer_speed(generate, ROWS, NEW, clock, compiled=False, best=best)
    assert figures["timed_runs"] == timed
    assert counts[:4] == [2, 2, 1, program.TRIAL]
    if not timed:
        assert figures["trial_tokens_per_second"] == pytest.approx(3 / 2)  # 3 rows, 2 seconds per token
        assert figures["trial_tokens"] == program.TRIAL and "tokens_per_second" not in figures


def test_flops_are_those_of_the_products(program):
    """All matrices count per token, except the head, which counts once; causal attention counts half the square."""
    shape, length = program.SHAPES["micro"], 96
    parameters = Llama.abstract(LlamaConfig.from_fields(shape)).parameters()
    matrices = sum(leaf.size for leaf in jax.tree.leaves(parameters["layers"]) if leaf.ndim == 3)
    head = parameters["lm_head"]["kernel"].size
    attention = 2 * 2 * shape["num_hidden_layers"] * shape["num_attention_heads"] * shape["head_dim"] * length**2 / 2
    assert program.prefill_flops(shape, length) == 2 * matrices * length + 2 * head + attention


@pytest.mark.parametrize("cache", ["model", "int8"])
@pytest.mark.parametrize("name", ["micro", "smollm2_135m"])
def test_a_step_reads_every_weight_and_the_slots_in_use(program, name, cache):
    shape, rows, prompt, new = program.SHAPES[name], 5, 20, 7
    parameters = Llama.abstract(LlamaConfig.from_fields(shape)).parameters()
    if "lm_head" in parameters:  # otherwise the embedding is also the head, and all of it is read
        del parameters["embed_tokens"]
    weights = sum(leaf.size for leaf in jax.tree.leaves(parameters))

    def cached(slots):
        sizes = (rows, shape["num_key_value_heads"], slots, shape["head_dim"])
        layer = jax.eval_shape(lambda: empty_cache(*sizes, jnp.bfloat16, cache))
        return shape["num_hidden_layers"] * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer))

    # The prefill generates the first token; each later step attends to the prompt and all earlier tokens.
    steps = [cached(prompt + made) for made in range(1, new)]
    slot_bytes = program.SLOT_BYTES[cache](shape["head_dim"])
    expected = 2 * weights + sum(steps) / len(steps)
    assert program.step_bytes(shape, rows, prompt, new, slot_bytes) == pytest.approx(expected, rel=1e-12)


def measured(rate, **more):
    return {"tokens_per_second": rate, "first_token_seconds": 0.455, "timed_runs": 3, "spread": 0.01, **more}


def report(program, peer=None, **runs):
    size = {"short": (1, 128), "long": (1, 16_384), "batch": (16, 2048)}
    filled = {
        name: dict(zip(("batch", "prompt"), size[name], strict=True)) | {"new": 256} | x for name, x in runs.items()
    }
    return {"device": "NVIDIA H100 80GB HBM3", "cache": "model", "runs": filled} | ({"peer": peer} if peer else {})


def test_shares_and_ratios(program):
    """At these rates, the shares are 77 % and 81 % of 3.35 TB/s."""
    static, kept, dynamic = "static cache, compiled", "static cache of the caller's, compiled", "dynamic cache"
    peer = {
        "short": {static: measured(135.7), dynamic: {"timed_runs": 0, "trial_tokens_per_second": 35.2}},
        "long": {static: measured(84.8), kept: measured(90.0), dynamic: {"left_out": "no time"}},
        "batch": {static: {"out_of_memory": True, "error": "CUDA out of memory."}},
    }
    runs = {"short": measured(192.554), "long": measured(123.821), "batch": measured(1381.1)}
    figures = program.finish(report(program, peer, **runs), program.SHAPES["llama2_7b"])
    # Shares are rounded to a thousandth.
    assert figures["runs"]["short"]["bandwidth_share"] == pytest.approx(0.767, abs=0.001)
    assert figures["runs"]["long"]["bandwidth_share"] == pytest.approx(0.808, abs=0.001)
    # By hand: 16 rows of 2,176 slots of 524,288 bytes, and 6,607,343,616 weights of 2.
    step = 16 * 2176 * 524_288 + 2 * 6_607_343_616
    assert figures["runs"]["batch"]["step_bytes"] == step
    assert figures["runs"]["batch"]["bandwidth_share"] == pytest.approx(step * 1381.1 / 16 / 3.35e12)
    assert figures["peer"]["short"][static]["bandwidth_share"] == pytest.approx(0.767 * 135.7 / 192.554, abs=0.001)
    assert figures["strongest_peer"] == {"short": static, "long": kept, "batch": None}
    assert figures["ratio_to_strongest_peer"] == pytest.approx({"short": 192.554 / 135.7, "long": 123.821 / 90})
    assert figures["peer"]["long"][kept]["settings"] == {"own_cache": True, "compiled": True}
    assert figures["prefill_mfu"] == pytest.approx(0.628, abs=0.001)  # the FLOPs counted above, in 0.455 s
    assert program.errors(figures) == []


def test_the_cards_data_sheet(program):
    shape, runs = program.SHAPES["llama2_7b"], {"short": measured(192.554)}
    h200 = program.finish({**report(program, **runs), "device": "NVIDIA H200"}, shape)["runs"]["short"]
    assert h200["bandwidth_share"] == pytest.approx(0.767 * 3.35 / 4.8, abs=0.001)
    pcie = program.finish({**report(program, **runs), "device": "NVIDIA H100 PCIe"}, shape)["runs"]["short"]
    assert pcie["bandwidth_share"] == pytest.approx(0.767 * 3.35 / 2.0, abs=0.001)  # slower memory than SXM's
    for unknown in ("NVIDIA H100", "cpu"):
        figures = program.finish({**report(program, **runs), "device": unknown}, shape)
        assert figures["memory_bandwidth"] is None and "bandwidth_share" not in figures["runs"]["short"]


SIZE = {"batch": 1, "prompt": 8, "new": 4}


def compared(program, rates, budget, cost=10.0):
    """Runs `compare` on `rates` by run and setting; returns the last saved figures and the order of measurements."""
    clock, order, saved = Clock(), [], []

    def measure(setting, one, best):
        order.append((one["name"], setting, best))
        clock.spend(cost[setting] if isinstance(cost, dict) else cost)
        found = rates[one["name"]][setting]
        if isinstance(found, Exception):
            raise found
        return {"tokens_per_second": found}

    runs = {name: {"name": name} for name in rates}
    program.compare(list(rates["a"]), runs, measure, budget, clock, lambda x: saved.append(json.loads(json.dumps(x))))
    return saved[-1], order


def test_every_setting_is_measured_the_strongest_before_first(program):
    rates = {
        "a": {"x": 3.0, "y": 5.0, "z": 1.0},
        "b": {"x": 3.0, "y": 2.0, "z": 1.0},
        "c": {"x": 1.0, "y": 1.0, "z": 4.0},
    }
    found, order = compared(program, rates, budget=1000)
    assert order == [
        *[("a", "x", None), ("a", "y", 3.0), ("a", "z", 5.0)],
        *[("b", "y", None), ("b", "x", 2.0), ("b", "z", 3.0)],
        *[("c", "x", None), ("c", "y", 1.0), ("c", "z", 1.0)],
    ]
    assert [program.strongest(found[run]) for run in "abc"] == ["y", "x", "z"]


def test_a_spent_budget_leaves_the_strongest_for_later_runs(program):
    rates = {run: {"x": 3.0, "y": 5.0, "z": 1.0} for run in "abc"}
    found, order = compared(program, rates, budget=45)
    # Three in the first run would leave less than two times ten seconds for later runs.
    assert [(run, setting) for run, setting, _ in order] == [("a", "x"), ("a", "y"), ("a", "z"), ("b", "y"), ("c", "y")]
    assert (
        found["b"]["x"]["left_out"]
        == "the 45 seconds for the peer were up (60% of the strongest's rate in the run before)"
    )
    found, order = compared(program, rates, budget=20)
    assert [(run, setting) for run, setting, _ in order] == [("a", "x"), ("b", "x"), ("c", "x")]
    assert found["a"]["y"]["left_out"] == "the 20 seconds for the peer were up (not tried)"
    # What x compiles in the first run, y must compile in later runs.
    _, order = compared(program, rates, budget=100, cost={"x": 30, "y": 5, "z": 5})
    assert [setting for run, setting, _ in order if run == "b"] == ["y", "x"]


def test_errors_are_written_down_and_only_memory_is_forgiven(program):
    rates = {"a": {"x": RuntimeError("CUDA out of memory. Tried to"), "y": ValueError("no such\ncache"), "z": 1.0}}
    found, order = compared(program, rates, budget=1000)
    assert found["a"]["x"] == {"out_of_memory": True, "error": "RuntimeError: CUDA out of memory. Tried to"}
    assert found["a"]["y"] == {"out_of_memory": False, "error": "ValueError: no such"}
    assert found["a"]["z"] == {"tokens_per_second": 1.0} and len(order) == 3
    figures = {"runs": {"a": {"error": "XlaRuntimeError: RESOURCE_EXHAUSTED", "out_of_memory": True}}, "peer": found}
    assert program.errors(figures) == ["a, y: ValueError: no such"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--new", "1"], "--new 1: at least 2 are needed"),
        (["--shape", "large"], "unknown shape 'large'"),
        (["--cache", "int4"], "unknown kind of cache 'int4'"),
    ],
)
def test_wrong_arguments(program, monkeypatch, arguments, told):
    monkeypatch.setattr("sys.argv", ["generate", "--shape", "micro", *arguments])
    with pytest.raises(InputError, match=told):
        program.main()


@pytest.mark.parametrize("failure", ["", "ValueError: broken", "the process"])
def test_a_result_says_where_it_comes_from(program, monkeypatch, tmp_path, failure):
    path = tmp_path / "out.json"
    sizes = []

    def peer_process(command):
        peer = {run: {"dynamic cache": measured(2.0)} for run in sizes}
        if failure.startswith("ValueError"):
            peer["short"]["static cache, compiled"] = {"out_of_memory": False, "error": failure}
        with open(command[command.index("--json", len(command) - 2) + 1], "w") as file:
            json.dump(peer, file)
        return types.SimpleNamespace(returncode=7 if failure == "the process" else 0)

    def ours(shape, runs, cache, chunk):
        return {"device": "NVIDIA H200", "runs": {name: one | measured(3.0) for name, one in runs.items()}}

    sizes += ["short", "long", "one_row", "batch"]
    monkeypatch.setattr(program, "ours", ours)
    monkeypatch.setattr(program, "subprocess", types.SimpleNamespace(run=peer_process))
    monkeypatch.setattr("sys.argv", ["generate", "--shape", "micro", "--json", str(path)])
    if failure:
        with pytest.raises(SystemExit) as exit:
            program.main()
        assert exit.value.code == 1
    else:
        program.main()
    figures = json.loads(path.read_text())
    assert {"commit", "date", "versions", "environment", "card", "sources", "command"} <= figures.keys()
    assert "benchmarks/generate.py" in figures["sources"]
    assert figures["ratio_to_strongest_peer"] == dict.fromkeys(sizes, 1.5)
    assert figures["runs"]["batch"]["bandwidth_share"] > 0


def test_our_figures(program):
    figures = program.ours(program.SHAPES["micro"], {"short": {"batch": 2, "prompt": 5, "new": 9}}, "int8", 16)
    (run,) = figures["runs"].values()
    assert (run["batch"], run["prompt"], run["new"]) == (2, 5, 9)
    assert run["first_token_seconds"] > 0 and run["timed_runs"] == len(run["seconds"]["decode"]) == 3
    assert run["tokens_per_second"] > 0 and figures["device"] == "cpu"
    assert 0 <= run["worst_choice"] < 0.1  # with int8 keys and values; a random token would be several below


def test_every_setting_of_the_peer_runs_or_says_why_not(program, monkeypatch):
    """On a CPU nothing is compiled, and kernels that only GPUs have are skipped."""
    monkeypatch.setattr(program, "warm_up", lambda call, clock: [])
    monkeypatch.setattr(program, "REPEATS", 1)
    peer = program.Peer(program.SHAPES["micro"])
    for name, setting in program.SETTINGS.items():
        figures = peer.measure(name, {"batch": 2, "prompt": 5, "new": 2}, None)
        if program.missing(setting.needs):
            assert figures == {"left_out": f"{setting.needs} is not installed"}
        else:
            assert figures["timed_runs"] == 1, name
