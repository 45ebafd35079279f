"""The decoder with its cache, against the full forward, for every rotary scheme."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_params

from eabf_jax.errors import InputError
from eabf_jax.model import Llama, LlamaConfig, decoder
from eabf_jax.model.attention import BACKENDS
from eabf_jax.model.kv_cache import LayerCache, attend_chunk, attend_token, empty_cache
from eabf_jax.model.llama import Row, rotary_tables
from eabf_jax.model.lora import Lora
from eabf_jax.model.parameters import TABLE
from eabf_jax.rope import Scheme, compose, scheme, scheme_names

WINDOW = 16
CHUNK, PROMPT, LENGTH = 12, 24, 40
LAG = (0, 3)  # tokens by which each row lags during generation
# The promised bound; float32 sums in another order differ by about 1e-5 here.
PROMISED = 1e-4

PARAMETERS: dict[str, dict[str, Any]] = {
    "pi": {"factor": 4.0},
    "ntk": {"factor": 4.0},
    "dynamic_ntk": {"factor": 2.0, "pretrained_window": WINDOW},
    "ntk_by_parts": {"factor": 4.0, "pretrained_window": WINDOW, "beta_fast": 2.0, "beta_slow": 0.5},
    "yarn": {"factor": 4.0, "pretrained_window": WINDOW, "beta_fast": 2.0, "beta_slow": 0.5},
    "dynamic_yarn": {"pretrained_window": WINDOW, "beta_fast": 2.0, "beta_slow": 0.5},
    "eabf": {"pretrained_window": WINDOW, "unscaled_layers": 1},
    "eabf_stair": {"pretrained_window": WINDOW},
    "llama3": {"factor": 4.0, "pretrained_window": WINDOW},
    "longrope": {"factor": 4.0, "pretrained_window": WINDOW, "short_factor": [1.0] * 4, "long_factor": [1.0, 2, 3, 4]},
}
SCHEMES: dict[str, Scheme] = {name: scheme(name, **PARAMETERS.get(name, {})) for name in scheme_names()}
SCHEMES["compose"] = compose(SCHEMES["yarn"], SCHEMES["eabf"])


def model_of(rope: Scheme, **changes: Any) -> Llama:
    sizes: dict[str, Any] = {
        "vocab_size": 37, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": WINDOW,
    }  # fmt: skip
    config = LlamaConfig(**{**sizes, **changes}, rope=rope)
    return Llama.from_params(config, random_params(config), attention="reference")


def test_the_decoder_takes_every_parameter_of_a_layer() -> None:
    taken = [part for _, parts in decoder._FORMS.values() for part in parts]
    assert len(taken) == len({*taken})
    assert {*taken} == {".".join(entry.path[1:]) for entry in TABLE if entry.stacked}


def cached_logits(model: Llama, tokens: np.ndarray, length: int | None) -> np.ndarray:
    """Returns logits at every position: a prompt in chunks, then token by token, row 1 three tokens behind row 0."""
    config = model.config
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
    row = Row(positions, *rotary_tables(config.rope, config.head_dim, positions, length), None)
    # The tables hold the frequencies, so one program serves all schemes with the same multiplier.
    plain = compose(scheme("default"), config.rope)
    prompt, generated = _cached(
        dataclasses.replace(config, rope=plain), decoder.weights_of(decoder.source_of(model)), tokens, row
    )
    found = np.zeros((*tokens.shape, config.vocab_size), np.float32)
    found[:, :PROMPT] = prompt
    for index, logits in enumerate(np.asarray(generated)):
        for number, behind in enumerate(LAG):
            found[number, PROMPT + index - behind] = logits[number]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _cached(
    config: LlamaConfig, weights: decoder.Weights, tokens: jax.Array, table: Row
) -> tuple[jax.Array, jax.Array]:
    def read(caches: Any, positions: jax.Array, attention: Any) -> Any:
        def take(x: jax.Array) -> jax.Array:
            return jax.vmap(lambda values, index: values[index])(x, positions)

        row = Row(positions, take(table.cos), take(table.sin), None)
        x, kept = weights.embedding[take(tokens)], []
        for index, (layer, cache) in enumerate(zip(weights.layers, caches, strict=True)):
            x, cache = decoder.layer(config, layer, index, x, row, cache, attention)
            kept.append(cache)
        logits = decoder.next_token_logits(config, weights, x.reshape(-1, x.shape[-1]))
        return logits.reshape(*x.shape[:2], -1), kept

    caches = [
        empty_cache(len(tokens), config.num_key_value_heads, LENGTH + 8, config.head_dim, jnp.dtype("float32"))
        for _ in weights.layers
    ]
    prompt = []
    for start in range(0, PROMPT, CHUNK):
        positions = jnp.broadcast_to(jnp.arange(start, start + CHUNK), (len(tokens), CHUNK))
        logits, caches = read(caches, positions, functools.partial(_chunk, start=start))
        prompt.append(logits)

    def step(caches: Any, index: jax.Array) -> tuple[Any, jax.Array]:
        positions = index - jnp.array(LAG)
        logits, caches = read(caches, positions[:, None], functools.partial(_token, positions=positions))
        return caches, logits[:, 0]

    return jnp.concatenate(prompt, axis=1), jax.lax.scan(step, caches, jnp.arange(PROMPT, LENGTH))[1]


def _chunk(q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache, start: int) -> Any:
    return attend_chunk(q, k, v, cache, start=start, backend=BACKENDS["chunked"])


def _token(q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache, positions: jax.Array) -> Any:
    out, cache = attend_token(q[:, 0], k[:, 0], v[:, 0], cache, positions, backend=BACKENDS["chunked"])
    return out[:, None], cache


def check(model: Llama, length: int | None = None) -> None:
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, LENGTH)).astype(np.int32)
    expected = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, tokens))
    assert expected.std() > 0.5  # otherwise the tolerance would mean nothing
    found = cached_logits(model, tokens, length)
    np.testing.assert_allclose(found[0], expected[0], atol=PROMISED, rtol=0)
    np.testing.assert_allclose(found[1, :-3], expected[1, :-3], atol=PROMISED, rtol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_cached_logits_are_those_of_the_full_forward(name: str) -> None:
    """The text crosses the pretrained window; a dynamic scheme uses the length of the whole text."""
    check(model_of(SCHEMES[name]), LENGTH if SCHEMES[name].depends_on_length else None)


def test_biases_and_tied_embeddings() -> None:
    check(model_of(SCHEMES["eabf"], attention_bias=True, mlp_bias=True, tie_word_embeddings=True))


@pytest.mark.parametrize("name", ["dynamic_ntk", "dynamic_yarn"])
def test_each_row_has_the_tables_of_its_own_length(name: str) -> None:
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (3, LENGTH))
    lengths = [WINDOW - 1, WINDOW + 1, LENGTH]
    found = rotary_tables(SCHEMES[name], 8, positions, jnp.array(lengths)[:, None])
    for row, length in enumerate(lengths):
        expected = rotary_tables(SCHEMES[name], 8, positions[:1], length)
        # Traced lengths make float32 angles of up to 40.
        for table, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(table[row], wanted[0], atol=1e-5)
    assert np.abs(found[0][0] - found[0][2]).max() > 0.1


def test_one_token_on_a_gpu_has_the_products_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    x, kernel, bias = (generator.normal(size=size).astype(np.float32) for size in ((1, 1, 40), (32, 40), (32,)))
    expected = x.astype(np.float64) @ kernel.T + bias
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        found = decoder._contract(jnp.asarray(x), jnp.asarray(kernel), jnp.asarray(bias))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_adapters_is_refused() -> None:
    model = Llama.abstract(model_of(SCHEMES["default"]).config, lora=Lora())
    with pytest.raises(InputError, match="has adapters beside its weights"):
        decoder.weights_of(decoder.source_of(model))
