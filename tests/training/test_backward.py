"""The hand-written backward pass against `jax.grad` of a plain loss, what it keeps, and what it recomputes."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval as pe

from eabf_jax.errors import InputError
from eabf_jax.model import attention
from eabf_jax.model.llama import Llama
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.rope import scheme
from eabf_jax.training.backward import (
    REMAT_POLICIES,
    Microbatch,
    Pieces,
    add,
    head_parameters,
    merge,
    remat_by_layer,
    zeros,
)
from eabf_jax.training.loss import token_losses

ROWS, LENGTH = 2, 20


@pytest.mark.parametrize(
    ("remat", "layers", "expected"),
    [
        ("dots", 3, ["dots"] * 3),
        ("dots:2,qkv", 3, ["dots", "dots", "qkv"]),
        ("dots:1, full:1, none", 4, ["dots", "full", "none", "none"]),
        ("offload:2,dots:1", 3, ["offload", "offload", "dots"]),
        ("qkv:0,full", 2, ["full", "full"]),
    ],
)
def test_policies_by_layer(remat, layers, expected):
    assert remat_by_layer(remat, layers) == tuple(expected)


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        ("ful", "unknown remat policy 'ful': did you mean 'full'"),
        ("", "unknown remat policy ''"),
        ("dots:2,qvk", "unknown remat policy 'qvk': did you mean 'qkv'"),
        ("dots,qkv", "each policy but the last takes its number of layers, as in dots:12,qkv"),
        ("dots:two,qkv", "takes its number of layers"),
        ("dots:-1,qkv", "takes its number of layers"),
        ("dots:2", "remat 'dots:2' is for 2 layers; the model has 3"),
        ("dots:4,qkv", "is for 4 layers; the model has 3"),
    ],
)
def test_policies_that_make_no_sense_are_one_line(remat, message):
    with pytest.raises(InputError, match=message) as error:
        remat_by_layer(remat, 3)
    assert "\n" not in str(error.value)


def variant(model_config, **changes):
    rope = scheme("eabf", base=50_000.0, pretrained_window=8, unscaled_layers=1)
    return dataclasses.replace(model_config, max_position_embeddings=32, rope=rope, **changes)


def microbatches(config, *, packed, count=2):
    rng = np.random.default_rng(0)
    shape = (count, ROWS, LENGTH)
    tokens = rng.integers(0, config.vocab_size, shape).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, shape), axis=2).astype(np.int32) if packed else None
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    if packed:
        starts = np.diff(segments, axis=2, prepend=0) > 0
        positions = positions - np.maximum.accumulate(np.where(starts, positions, 0), axis=2)
    mask = rng.random(shape) < 0.5
    mask[..., -1] = False  # no token follows the last one
    return Microbatch(tokens, np.roll(tokens, -1, axis=2), mask, positions, segments)


def drawn(config, spread=0.3):
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        normal = rng.normal(scale=spread, size=leaf.shape)
        return np.float32(1 + normal if path[-1].key == "scale" else normal)

    return jax.tree.map_with_path(draw, Llama.abstract(config).parameters())


def plain_loss(model, batch, params):
    """Computes the loss by its definition, over all microbatches at once and without `Pieces`."""
    rows = jax.tree.map(lambda array: array.reshape(-1, LENGTH), batch)
    losses = token_losses(model.with_parameters(params), rows.tokens, rows.positions, rows.segment_ids)
    return jnp.where(rows.mask[:, :-1], losses, 0.0).sum()


class ByHand:
    """Sums loss and gradients over all microbatches like the executors, in a Python loop."""

    def __init__(self, model, remat, *, wide=False):
        pieces = Pieces(model, 7, wide=wide)
        self.policies = remat_by_layer(remat, model.config.num_hidden_layers)
        self.forward, self.backward = (
            {policy: jax.jit(functools.partial(function, policy)) for policy in self.policies}
            for function in (pieces.forward, pieces.backward)
        )
        names = ("row", "embed", "head", "embed_backward")
        self.row, self.embed, self.head, self.embed_backward = (jax.jit(getattr(pieces, name)) for name in names)

    def __call__(self, batch, params, frozen=None):
        frozen, whole = frozen or {}, merge(params, frozen or {})
        tied, gradients, total = "lm_head" not in whole, zeros(params), jnp.float32(0)

        def layer(number):
            one = (jax.tree.map(lambda leaf: leaf[number], tree.get("layers", {})) for tree in (params, frozen))
            return *one, jnp.int32(number)

        for number in range(batch.tokens.shape[0]):
            rows = jax.tree.map(lambda array, number=number: array[number], batch)
            row, x, kept = self.row(rows), self.embed(whole["embed_tokens"], rows.tokens), []
            for index, policy in enumerate(self.policies):
                y, saved = self.forward[policy](*layer(index), x, row)
                kept.append((x, saved))
                x = y
            heads = (head_parameters(tree, tied) for tree in (params, frozen))
            loss, head, d_x = self.head(*heads, x, rows, head_parameters(gradients, tied))
            total, gradients = total + loss, {**gradients, **head}
            for index in reversed(range(len(self.policies))):
                x, saved = kept[index]
                d_layer, d_x = self.backward[self.policies[index]](*layer(index), x, row, saved, d_x)
                gradients["layers"] = jax.tree.map(
                    lambda sums, leaf, index=index: sums.at[index].add(leaf), gradients["layers"], d_layer
                )
            if "embed_tokens" in gradients:
                gradients["embed_tokens"] = self.embed_backward(gradients["embed_tokens"], rows.tokens, d_x)
        return total, gradients


def assert_near(found, expected, tolerance):
    paths = jax.tree.leaves_with_path(expected)
    for (path, wanted), value in zip(paths, jax.tree.leaves(found), strict=True):
        largest = np.abs(wanted).max()
        assert largest > 0
        np.testing.assert_allclose(value, wanted, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


GQA = {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}


@functools.cache
def expected_gradients(config, packed, spread=0.3):
    model = Llama.abstract(config, attention="reference")
    loss = functools.partial(plain_loss, model, microbatches(config, packed=packed))
    return jax.jit(jax.value_and_grad(loss))(drawn(config, spread))


@pytest.mark.parametrize(
    ("changes", "packed", "backend", "remat"),
    [
        *((GQA, True, "chunked", remat) for remat in REMAT_POLICIES if remat != "offload"),  # dots elsewhere
        ({"tie_word_embeddings": True}, False, "chunked", "dots:1,attention:1,full"),
        ({"num_key_value_heads": 4}, False, "reference", "qkv:1,none"),
        ({"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True}, True, "reference", "full"),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_plain_loss(model_config, changes, packed, backend, remat):
    config = variant(model_config, **changes)
    model = Llama.abstract(config, attention=backend)
    loss, gradients = ByHand(model, remat)(microbatches(config, packed=packed), drawn(config))
    expected_loss, expected = expected_gradients(config, packed)
    # Float32 sums in another order: about ten roundings of 6e-8; terms cancel in the gradients' sums.
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)
    assert_near(gradients, expected, 5e-5)


@pytest.mark.parametrize("wide", [True, False])
def test_gradients_under_bfloat16(model_config, wide, monkeypatch):
    """If `wide`, a kernel's gradient product stays in float32; otherwise it is rounded to bfloat16 and summed."""
    # With rows of one block, the last product is one that XLA's CPU backend lacks in bfloat16.
    monkeypatch.setattr(attention.chunked, "_CHUNK", 8)
    config = variant(model_config, **GQA)
    # Weights have a narrow spread, because a sharp softmax would amplify the rounding of the parameters.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn(config, 0.1))
    run = ByHand(Llama.abstract(config, attention="chunked", dtype=jnp.bfloat16), "dots", wide=wide)
    batch = microbatches(config, packed=False)
    (_, found), (_, expected) = run(batch, params), expected_gradients(config, packed=False, spread=0.1)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
    # At least one rounding of 2^-9; at most 200 (parameters, activations, gradients), which add up at random.
    assert 2**-10 < max(errors) < 200**0.5 * 2**-8
    # With one microbatch, the gradients are the products themselves.
    _, found = run(jax.tree.map(lambda array: array[:1], batch), params)
    narrow = [not np.any(np.asarray(leaf).view(np.uint32) & 0xFFFF) for leaf in jax.tree.leaves(found["layers"]["mlp"])]
    assert all(narrow) is not wide


def test_what_is_frozen_has_no_gradient_and_changes_none(model_config):
    config = variant(model_config, **GQA)
    params = drawn(config)
    names = {"q_proj", "v_proj"}
    trained = {"layers": {"self_attn": {name: params["layers"]["self_attn"][name] for name in names}}}
    rest = {key: value for key, value in params["layers"]["self_attn"].items() if key not in names}
    frozen = {**params, "layers": {**params["layers"], "self_attn": rest}}
    run = ByHand(Llama.abstract(config, attention="chunked"), "qkv")
    loss, gradients = run(microbatches(config, packed=True), trained, frozen)
    expected_loss, expected = expected_gradients(config, packed=True)
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)  # as above
    assert jax.tree.structure(gradients) == jax.tree.structure(trained)
    assert_near(gradients["layers"]["self_attn"], {n: expected["layers"]["self_attn"][n] for n in names}, 5e-5)


def layer_shapes(model_config, backend):
    """Returns a layer's arguments as bfloat16 shapes, with different sizes for every kind of array."""
    config = variant(model_config, hidden_size=24, intermediate_size=56, **GQA)
    model = Llama.abstract(config, attention=backend, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    pieces = Pieces(model, 8)
    rows = jax.tree.map(lambda array: array[0], microbatches(config, packed=False))
    row = jax.eval_shape(pieces.row, rows)
    shapes = Llama.abstract(config, param_dtype=jnp.bfloat16).parameters()["layers"]
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), shapes)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, 24), jnp.bfloat16)
    return pieces, (layer, {}, jax.ShapeDtypeStruct((), jnp.int32), x, row)


NARROW = "bfloat16[2,20,{}]"
KEPT = {
    "attention": ["bfloat16[2,20,4,8]", "float32[2,4,20]"],  # the output, and the log-sum-exp of each query's logits
    "qkv": ["bfloat16[2,20,4,8]", *["bfloat16[2,20,2,8]"] * 2],
    "dots": [NARROW.format(24), *[NARROW.format(56)] * 2],  # the residual after attention; gate and up
}


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        ("full", []),
        ("attention", ["attention"]),
        ("qkv", ["attention", "qkv"]),
        ("dots", ["attention", "qkv", "dots"]),
        ("offload", ["attention", "qkv", "dots"]),
    ],
)
def test_a_layer_keeps_what_its_policy_names(model_config, policy, names):
    pieces, arguments = layer_shapes(model_config, "chunked")
    y, kept = jax.eval_shape(functools.partial(pieces.forward, policy), *arguments)
    assert (y.shape, y.dtype) == ((ROWS, LENGTH, 24), jnp.bfloat16)
    found = Counter(f"{leaf.dtype}{list(leaf.shape)}".replace(" ", "") for leaf in kept)
    assert found == Counter(shape for name in names for shape in KEPT[name])


def primitives(jaxpr):
    """Counts each primitive in a jaxpr and those inside it."""
    found = Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        leaves = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
        for inner in leaves:
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += primitives(inner)
    return found


def test_the_backward_pass_computes_again_only_what_was_not_kept(model_config):
    """Operations are counted in the traced backward pass without dead code, as a compiler sees it."""
    pieces, arguments = layer_shapes(model_config, "chunked")
    products, kernels = {}, {}
    for policy in REMAT_POLICIES:
        y, kept = jax.eval_shape(functools.partial(pieces.forward, policy), *arguments)
        jaxpr = jax.make_jaxpr(functools.partial(pieces.backward, policy))(*arguments, kept, y).jaxpr
        live, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        found = primitives(live)
        products[policy] = found["dot_general"]
        # Only the kernel's forward half computes the largest logit.
        kernels[policy] = found["reduce_max"]
    assert kernels == {"full": 1, "attention": 0, "qkv": 0, "dots": 0, "offload": 0, "none": 0}
    backward = 2 * 7 + 5  # two per kernel, five in the backward half of attention
    again = {"full": 6 + 2, "attention": 6, "qkv": 3, "dots": 0, "offload": 0, "none": 0}
    assert products == {policy: backward + more for policy, more in again.items()}


def test_chunks_of_the_loss_do_not_change_it(model_config):
    """The rows may be split over devices, into parts that are not whole chunks."""
    config = variant(model_config)
    model, batch, params = Llama.abstract(config), microbatches(config, packed=False, count=1), drawn(config)
    x = np.random.default_rng(2).normal(size=(ROWS, LENGTH, config.hidden_size)).astype(np.float32)
    rows, trained = jax.tree.map(lambda array: array[0], batch), head_parameters(params, tied=False)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(chunk, mesh=None):
        return Pieces(model, chunk, mesh).head(trained, {}, x, rows, zeros(trained))

    expected = run(LENGTH)
    split = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, context=2))
    for chunk, mesh in ((1, None), (7, None), (1024, None), (3, split), (5, split)):
        loss, gradients, d_x = run(chunk, mesh)
        # Sums of 40 terms in another order.
        np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
        assert_near((gradients, d_x), expected[1:], 3e-6)


def avals(jaxpr):
    """Yields the arrays of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from avals(inner)


@pytest.mark.parametrize(("chunk", "whole"), [(1, False), (7, False), (LENGTH - 1, False), (LENGTH, True)])
def test_full_logits_exist_only_where_the_chunk_is_the_whole_row(model_config, chunk, whole):
    config = dataclasses.replace(model_config, vocab_size=997)  # a size that no other array has
    model, batch = Llama.abstract(config), microbatches(config, packed=False, count=1)
    trained = head_parameters(model.parameters(), tied=False)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, config.hidden_size), jnp.float32)
    rows = jax.tree.map(lambda array: array[0], batch)
    sums = jax.eval_shape(zeros, trained)
    jaxpr = jax.make_jaxpr(lambda *arguments: Pieces(model, chunk).head(*arguments))(trained, {}, x, rows, sums)
    sizes = [aval.size for aval in avals(jaxpr.jaxpr) if aval.shape[-1:] == (997,) and aval.shape[0] != 32]
    assert max(sizes) >= ROWS * chunk * 997  # the search finds the logits of a chunk
    assert (max(sizes) >= ROWS * LENGTH * 997) == whole


def test_sums_are_float32_whatever_is_added():
    sums = add({"a": jnp.full(3, 256.0)}, {"a": jnp.full(3, 0.25, jnp.bfloat16)})
    assert sums["a"].dtype == jnp.float32
    assert sums["a"].tolist() == [256.25] * 3  # bfloat16 would lose the addend


def test_mappings_with_different_leaves_are_merged():
    assert merge({"a": {"x": 1}, "b": 2}, {"a": {"y": 3}, "c": {}}) == {"a": {"x": 1, "y": 3}, "b": 2, "c": {}}
