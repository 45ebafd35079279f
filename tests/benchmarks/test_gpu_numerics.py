"""The program that compares a GPU with float32, on a CPU: its references, and that it finds errors."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from eabf_jax.errors import InputError
from eabf_jax.model import attention
from eabf_jax.rope import scheme_names


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("gpu_numerics")


@pytest.fixture
def call(program, monkeypatch, tmp_path):
    """Runs the program on a CPU; returns its exit status and its file."""

    def run(*arguments):
        path, argv = tmp_path / "out.json", ["gpu_numerics", "--device", "cpu", "--workers", "1"]
        monkeypatch.setattr("sys.argv", [*argv, "--json", str(path), *arguments])
        status = 0
        try:
            program.main()
        except SystemExit as exit:
            status = exit.code
        return status, json.loads(path.read_text())

    return run


def test_the_reference_is_attention_and_its_gradients(program):
    """Compares with PyTorch in float64: two query heads per key-value head, more keys than queries, and a mask."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    shapes = [(2, 5, 4, 6), (2, 9, 2, 6), (2, 9, 2, 6), (2, 5, 4, 6)]
    q, k, v, d_out = (random.normal(size=shape) for shape in shapes)
    mask = random.random((2, 5, 9)) < 0.6
    mask[..., 0] = True
    found = program.dense(q, k, v, mask, d_out)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    heads = [x.transpose(1, 2) for x in leaves]
    options = {"attn_mask": torch.tensor(mask)[:, None], "scale": 1.0, "enable_gqa": True}
    out = torch.nn.functional.scaled_dot_product_attention(*heads, **options).transpose(1, 2)
    out.backward(torch.tensor(d_out))
    for name, expected in zip(("out", "d_q", "d_k", "d_v"), (out, *(x.grad for x in leaves)), strict=True):
        # Sums of at most nine numbers near 1, in float64.
        np.testing.assert_allclose(found[name], expected.detach().numpy(), atol=1e-13, err_msg=name)


def test_a_result_may_be_twice_as_wrong_as_the_plain_one(program):
    exact, plain = np.array([3.0, 4.0]), np.array([3.0, 4.1])
    for found, within in (([3.0, 4.19], True), ([3.0, 4.21], False), ([3.0, np.nan], False), ([3.0, np.inf], False)):
        result = program.comparison("path", "what", np.array(found), plain, exact, scheme="eabf")
        assert result["within"] == within
        assert result["plain_error"] == pytest.approx(0.02) and result["limit"] == pytest.approx(0.04)
    assert program.distance([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)  # 0.5 of 5


BROKEN = {
    "no causal mask": lambda q, k, v, ids: attention.reference.attend_at(
        jnp.full(q.shape[1], q.shape[1]), q, k, v, ids
    ),
    "a scale that is wrong by a tenth": lambda q, k, v, ids: attention.BACKENDS["reference"](1.1 * q, k, v, ids),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_wrong_kernel_is_found(program, monkeypatch, broken):
    def kernel(q, k, v, segment_ids=None):
        return BROKEN[broken](q, k, v, segment_ids).astype(q.dtype)

    monkeypatch.setitem(attention.BACKENDS, "broken", kernel)
    found = program.attention_case("broken", 24, 2, 8, packed=True)
    assert [x["what"] for x in found] == ["out", "d_q", "d_k", "d_v"]
    assert not any(x["within"] for x in found)


@pytest.mark.parametrize(("kind", "off"), [("model", 0), ("model", 1), ("int8", 1)])
def test_a_token_that_sees_beyond_its_rows_end_is_found(program, monkeypatch, kind, off):
    from eabf_jax.model import kv_cache

    whole = kv_cache.attend_token

    def attend(q, k, v, cache, positions, *, backend):
        # The token is stored in its place, then attended to from one position further.
        _, cache = whole(q, k, v, cache, positions, backend=backend)
        return whole(q, k, v, cache, positions + off, backend=backend)

    monkeypatch.setattr(kv_cache, "attend_token", attend)
    (found,) = program.token_case("reference", 20, 2, 8, kind)
    assert found["within"] == (off == 0)


@pytest.mark.parametrize("window", [None, 20])
def test_entropies_are_compared_and_wrong_ones_found(program, monkeypatch, window):
    from eabf_jax.analysis import attention_entropy

    (found,) = program.entropy_case(300, 2, 8, window)
    assert found["within"] and 2.0**-12 < found["plain_error"] < 2.0**-4
    right = attention_entropy.row_entropies
    monkeypatch.setattr(attention_entropy, "row_entropies", lambda q, k, window: right(1.1 * q, k, window))
    (wrong,) = program.entropy_case(300, 2, 8, window)
    assert not wrong["within"]


def shortened(sizes):
    """Limits a run to one head size and one policy; the kernels are tested above."""
    return sizes._replace(lengths=(), slots=(), entropies=(), wide=None, policies=sizes.policies[:1])


def test_a_model_is_compared_in_training_and_in_generation(program, call, monkeypatch):
    monkeypatch.setitem(program.SIZES, "cpu", shortened(program.SIZES["cpu"]))
    status, figures = call("--schemes", "eabf")
    found = figures["comparisons"]
    assert [x for x in found if not x["within"]] == [] and figures["beyond"] == 0 and status == 0
    assert {x["path"].partition(",")[0] for x in found} == {"training", "prefill", "decode", "generate"}
    assert {x.get("cache") for x in found} == {None, "int8"}
    gradients = {x["what"] for x in found if x["what"].startswith("gradient")}
    assert len(gradients) == 12 and "gradient of layers.self_attn.q_proj.kernel" in gradients
    # The plain computation's errors are those of 8 bits.
    assert all(2.0**-12 < x["plain_error"] < 2.0**-4 for x in found if x["what"] != "loss")
    assert {"commit", "card", "versions", "sources", "device"} <= figures.keys()
    assert "eabf_jax/training/backward.py" in figures["sources"]


def test_every_scheme_is_compared_beyond_its_window(program):
    for name in scheme_names():
        rope = program.scheme_of(name, 12, 8)
        rope.inverse_frequencies(8, 40)
        assert rope.name == name
        if name == "eabf":
            assert rope.logit_scale(jnp.arange(40), 2)[-1] > 1 and rope.logit_scale(jnp.arange(40), 1)[-1] == 1


def test_parts_are_done_in_processes(program):
    numbers = list(program.done([functools.partial(divmod, 7, by) for by in (2, 3)], 2))
    assert sorted(numbers) == [(2, 1), (3, 1)]


def test_what_is_beyond_its_limit_is_a_failure(program, call, monkeypatch, capsys):
    wrong = program.comparison(
        "decode, cudnn", "logits", np.array([3.3]), np.array([3.1]), np.array([3.0]), scheme="pi"
    )
    right = wrong | {"within": True}
    monkeypatch.setattr(program, "jobs", lambda *_: [lambda: [right], lambda: [wrong | {"error": float("nan")}, wrong]])
    status, figures = call()
    assert status == 1 and figures["beyond"] == 2
    assert "decode, cudnn, pi, logits: 1.00e-01, at most 6.67e-02" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "cpu", "--schemes", "eabf,rope"], "unknown rotary scheme 'rope'"),
    ],
)
def test_wrong_arguments(program, monkeypatch, arguments, told):
    monkeypatch.setattr("sys.argv", ["gpu_numerics", *arguments])
    with pytest.raises(InputError, match=told):
        program.main()
