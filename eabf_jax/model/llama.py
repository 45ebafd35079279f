"""The model: RMSNorm, rotary attention with the scheme's logit multiplier, SwiGLU, and one scan over layers.

It is LLaMA, and every architecture that `LlamaConfig` describes by features of LLaMA's decoder.

Dimensions: B batch, T length, D hidden_size, F intermediate_size, N query heads, K key-value heads, H head_dim,
V vocabulary, L layers. Module names are Hugging Face's; kernels are [in, out]; the tensors of all layers are stacked
on a leading axis L, so that one traced block serves every layer and compile time does not grow with depth.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from eabf_jax.errors import InputError
from eabf_jax.model.attention import Attention, needs_of, precision_of, select, with_window
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.lora import Lora, adapters
from eabf_jax.model.parameters import TreePath, check_shapes, flatten, parameters
from eabf_jax.rope import Scheme

Constrain = Callable[..., Array]
# (x [..., in], one layer's parameter [in, out], its path in the parameter tree) -> x @ parameter.
Product = Callable[[Array, Array, TreePath], Array]


class Row(NamedTuple):
    """Per-token inputs that all layers share."""

    positions: Int[Array, "B T"]
    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]
    segment_ids: Int[Array, "B T"] | None


def unconstrained(x: Array, *logical_axes: str | None) -> Array:
    """Leaves the layout of an activation to the compiler; `parallel.rules` has the version for a mesh."""
    return x


def positions_from_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Numbers tokens from 0 within each run of equal segment ids.

    Args:
      segment_ids: int32 [batch, length].

    Returns:
      int32 [batch, length], restarting at 0 where a segment starts.
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def rotary_tables(
    rope: Scheme, head_dim: int, positions: Int[Array, "B T"], length: int | Int[Array, "B T"] | None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Computes cosines and sines of every token's angles, times the scheme's rotation scale.

    Args:
      positions: int32 [batch, length], 0-based.
      length: the current length in tokens, used by dynamic schemes only: an integer known before tracing, or an array
        [batch, length] or [batch, 1]. None means within the pretrained window.

    Returns:
      float32 cosines and sines, each [batch, length, head_dim // 2].
    """
    if rope.depends_on_length and isinstance(length, jax.Array):

        def rotation(length: Array) -> tuple[Array, Array]:
            scale = jnp.asarray(rope.rotation_scale(length), jnp.float32)
            return rope.inverse_frequencies(head_dim, length), scale[None]

        frequencies, scale = jax.vmap(jax.vmap(rotation))(length)
    else:
        known = None if isinstance(length, jax.Array) else length
        frequencies, scale = rope.inverse_frequencies(head_dim, known), jnp.float32(rope.rotation_scale(known))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def segment_lengths(positions: Array, segment_ids: Array | None) -> Array:
    """Returns, for each token, the largest position in its segment plus 1: int32 [batch, length].

    Other rows of the batch and other segments of the row therefore never change a token's frequencies.
    """
    if segment_ids is None:
        return jnp.broadcast_to(positions.max(1, keepdims=True) + 1, positions.shape)
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    runs = jnp.cumsum(starts, axis=1)
    largest = jax.vmap(lambda p, r: jax.ops.segment_max(p, r, num_segments=p.shape[0])[r])(positions, runs)
    return largest + 1


def rotate(x: Float[Array, "B T heads H"], cos: Array, sin: Array) -> Float[Array, "B T heads H"]:
    """Applies rotary embedding in float32, pairing the first half of each head's rotated part with its second half.

    Args:
      x: queries or keys.
      cos: float32 [batch, length, rotary_dim // 2]; the dimensions from rotary_dim on are not rotated.
      sin: float32, the shape of cos.

    Returns:
      float32, the shape of x.
    Source: transformers, `apply_rotary_pos_emb` (halves, not interleaved pairs).
    """
    half = cos.shape[-1]
    first, second, *rest = jnp.split(x.astype(jnp.float32), (half, 2 * half)[: x.shape[-1] // half], axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin, *rest), axis=-1)


def layer_tables(config: LlamaConfig, row: Row, index: int | Int[Array, ""]) -> tuple[Array, Array]:
    """Returns the cosines and sines of a layer, which may be traced; those of an unrotated layer change nothing."""
    if not config.unrotated_layers:
        return row.cos, row.sin
    rotated = ~jnp.isin(index, jnp.array(config.unrotated_layers))
    return jnp.where(rotated, row.cos, 1.0), jnp.where(rotated, row.sin, 0.0)


def query_scale(config: LlamaConfig, row: Row, index: int | Int[Array, ""]) -> Float[Array, "B T"]:
    """Returns the factor on a layer's queries: that of the attention logits and the scheme's multiplier."""
    return config.rope.logit_scale(row.positions, index) * config.attention_scale


def embedded(config: LlamaConfig, x: Float[Array, "... D"], dtype: Any) -> Float[Array, "... D"]:
    """Turns token vectors into the hidden states before the first layer, in the compute dtype."""
    return (x if config.embedding_multiplier == 1.0 else x * config.embedding_multiplier).astype(dtype)


def add_branch(config: LlamaConfig, x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Adds the output of attention or MLP to the hidden states."""
    return x + (y if config.residual_multiplier == 1.0 else y * config.residual_multiplier)


def final_norm(config: LlamaConfig, scale: Float[Array, "D"], x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Applies the norm after the last layer, and divides by `logits_scaling`, so that logits need no other factor."""
    if config.logits_scaling != 1.0:
        scale = scale.astype(jnp.float32) / config.logits_scaling
    return rms_norm(x, scale, config.rms_norm_eps)


def product(x: Array, kernel: Array, path: TreePath) -> Array:
    """Computes x @ kernel and leaves its layout to the compiler; `parallel.rules` has the version for a mesh."""
    return _product(x, kernel)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    """Computes x @ kernel in the dtype of x; accumulates and returns the kernel's gradient in the kernel's dtype."""
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision_of(x.dtype))


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, kernel = saved
    precision = precision_of(x.dtype)
    d_kernel = jnp.einsum("...i,...o->io", x, d_y, precision=precision, preferred_element_type=kernel.dtype)
    return jnp.matmul(d_y, kernel.astype(x.dtype).T, precision=precision), d_kernel


_product.defvjp(_product_forward, _product_backward)


class Initializer:
    """Makes the first values of a model's parameters, in the shapes of the table."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: Any, lora: Lora | None = None):
        self.config, self.lora = config, lora
        self._rngs, self._dtype = rngs, param_dtype
        self._shapes = {entry.path: entry.shape for entry in (*parameters(config), *adapters(config, lora))}

    def __contains__(self, path: TreePath) -> bool:
        """Whether the model has a parameter with this path."""
        return path in self._shapes

    def __call__(self, *path: str) -> Any:
        """Returns the parameter at a path of the tree; None if the model has no such parameter."""
        if (shape := self._shapes.get(path)) is None:
            return None
        # With lora_b zero, the adapters change nothing before the first step.
        if (value := {"scale": 1, "bias": 0, "lora_b": 0}.get(path[-1])) is not None:
            return nnx.Param(jnp.full(shape, value, self._dtype))
        stddev = shape[-2] ** -0.5 if path[-1] == "lora_a" else self.config.initializer_range
        return nnx.Param(jax.nn.initializers.normal(stddev)(self._rngs.params(), shape, self._dtype))


class Linear(nnx.Module):
    """y = x @ kernel (+ the adapters' product) (+ bias), computed in the dtype of x."""

    def __init__(self, init: Initializer, path: TreePath, product: Product = product):
        self.path, self.product = path, product
        self.kernel, self.bias = init(*path, "kernel"), init(*path, "bias")
        self.lora_a, self.lora_b = init(*path, "lora_a"), init(*path, "lora_b")
        self.lora_scale = 0.0 if init.lora is None else init.lora.scale

    def __call__(self, x: Array) -> Array:
        y = self.product(x, self.kernel[...], (*self.path, "kernel"))
        if self.lora_a is not None and self.lora_b is not None:
            narrow = self.product(x, self.lora_a[...], (*self.path, "lora_a")) * self.lora_scale
            y += self.product(narrow, self.lora_b[...], (*self.path, "lora_b"))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def norm_of(init: Initializer, path: TreePath) -> "RMSNorm | None":
    """Returns a norm; None if the model does not have it."""
    return RMSNorm(init, path) if (*path, "scale") in init else None


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, init: Initializer, path: TreePath):
        self.scale = init(*path, "scale")
        self.eps = init.config.rms_norm_eps

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """Divides by the root mean square and multiplies by `scale`, in float32.

    Args:
      x: [..., features].
      scale: [features].
      eps: added to the mean square.

    Returns:
      The shape and dtype of x.
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, init: Initializer, path: TreePath, product: Product):
        self.head_dim = init.config.head_dim
        self.norm_all = init.config.qk_norm == "full"
        self.q_norm, self.k_norm = norm_of(init, (*path, "q_norm")), norm_of(init, (*path, "k_norm"))
        self.q_proj = Linear(init, (*path, "q_proj"), product)
        self.k_proj = Linear(init, (*path, "k_proj"), product)
        self.v_proj = Linear(init, (*path, "v_proj"), product)
        self.o_proj = Linear(init, (*path, "o_proj"), product)

    def __call__(
        self,
        x: Array,
        tables: tuple[Array, Array],
        segment_ids: Array | None,
        q_scale: Array,
        attention: Attention,
        constrain: Constrain,
    ) -> Array:
        def heads(y: Array, norm: RMSNorm | None = None) -> Array:
            y = y if norm is None or not self.norm_all else norm(y)
            y = constrain(y.reshape(*y.shape[:2], -1, self.head_dim), "batch", "length", "heads", None)
            return y if norm is None or self.norm_all else norm(y)

        q, k, v = heads(self.q_proj(x), self.q_norm), heads(self.k_proj(x), self.k_norm), heads(self.v_proj(x))
        # The multiplier is applied to q in float32, so that q is rounded to the compute dtype only once.
        q = (rotate(q, *tables) * q_scale[:, :, None, None]).astype(x.dtype)
        k = rotate(k, *tables).astype(x.dtype)
        q, k, v = (checkpoint_name(y, "qkv") for y in (q, k, v))
        out = attention(q, k, v, segment_ids)
        return self.o_proj(out.reshape(*out.shape[:2], -1))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, init: Initializer, path: TreePath, product: Product):
        self.gate_proj = Linear(init, (*path, "gate_proj"), product)
        self.up_proj = Linear(init, (*path, "up_proj"), product)
        self.down_proj = Linear(init, (*path, "down_proj"), product)

    def __call__(self, x: Array, constrain: Constrain) -> Array:
        gate, up = (checkpoint_name(proj(x), "mlp") for proj in (self.gate_proj, self.up_proj))
        return self.down_proj(constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp"))


class Block(nnx.Module):
    """One decoder layer; holds the stacked parameters of all layers, or those of the layer that it computes."""

    def __init__(self, init: Initializer, path: TreePath, product: Product):
        self.input_layernorm = norm_of(init, (*path, "input_layernorm"))
        self.self_attn = SelfAttention(init, (*path, "self_attn"), product)
        self.post_attention_layernorm = RMSNorm(init, (*path, "post_attention_layernorm"))
        self.post_feedforward_layernorm = norm_of(init, (*path, "post_feedforward_layernorm"))
        self.mlp = SwiGLU(init, (*path, "mlp"), product)

    def __call__(
        self, config: LlamaConfig, x: Array, row: Row, index: Array, attention: Attention, constrain: Constrain
    ) -> Array:
        tables, q_scale = layer_tables(config, row, index), query_scale(config, row, index)

        def attend(x: Array) -> Array:
            return self.self_attn(x, tables, row.segment_ids, q_scale, attention, constrain)

        def branch(x: Array, before: RMSNorm | None, inner: Callable[[Array], Array], after: RMSNorm | None) -> Array:
            y = inner(x if before is None else before(x))
            return add_branch(config, x, y if after is None else after(y))

        middle, after = self.post_attention_layernorm, config.post_norm
        x = checkpoint_name(branch(x, self.input_layernorm, attend, middle if after else None), "middle")
        mlp = functools.partial(self.mlp, constrain=constrain)
        x = branch(x, None if after else middle, mlp, self.post_feedforward_layernorm)
        return constrain(x, "batch", "length", None)


class Embedding(nnx.Module):
    """Token vectors."""

    def __init__(self, init: Initializer, path: TreePath):
        self.embedding = init(*path, "embedding")


class Llama(nnx.Module):
    """A causal language model of the LLaMA family."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        attention: str | Attention = "auto",
        windowed: Attention | None = None,
        constrain: Constrain = unconstrained,
        product: Product = product,
        lora: Lora | None = None,
    ):
        """Initialises the parameters at random.

        Args:
          config: the model's shape and rotary scheme.
          rngs: source of randomness; the stream `params` is used.
          dtype: compute dtype of the matrix products; norms, angles, softmax and logits are float32.
          param_dtype: dtype of the parameters.
          attention: a backend's name, "auto", or a function with the signature of `attention.Backend`.
          windowed: the function for layers with a sliding window; None for that of `attention`'s backend.
          constrain: called with each large activation and its logical axes, to set its layout on a mesh.
          product: multiplies activations by the layers' kernels and adapters.
          lora: adds adapters to the projections that it names.

        Raises:
          InputError: unknown backend.
        """
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.constrain = constrain
        self.lora = lora
        if isinstance(attention, str):
            attention = select(attention, self.dtype, config.head_dim, needs=needs_of(config))
        self.attention, self.windowed = attention, windowed
        if config.sliding_window is not None and windowed is None:
            self.windowed = with_window(attention, config.sliding_window)
        init = Initializer(config, rngs=rngs, param_dtype=param_dtype, lora=lora)
        self.embed_tokens = Embedding(init, ("embed_tokens",))
        self.layers = Block(init, ("layers",), product)
        self.norm = RMSNorm(init, ("norm",))
        self.lm_head = None if config.tie_word_embeddings else Linear(init, ("lm_head",))

    @classmethod
    def abstract(cls, config: LlamaConfig, **options: Any) -> Self:
        """Builds the model with shapes (`jax.ShapeDtypeStruct`) in place of arrays; allocates and computes nothing.

        Args:
          **options: as for `Llama`.
        """
        return nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), **options))

    @classmethod
    def from_params(cls, config: LlamaConfig, params: Mapping[str, Any], **options: Any) -> Self:
        """Builds the model around existing parameters.

        Args:
          params: nested mapping of arrays, as returned by `parameters()`.
          **options: as for `Llama`.

        Raises:
          InputError: as for `with_parameters`.
        """
        return cls.abstract(config, **options).with_parameters(params)

    def with_parameters(self, params: Mapping[str, Any]) -> Self:
        """Returns a copy of the model with other parameters; this model does not change.

        Args:
          params: nested mapping of arrays, as returned by `parameters()`.

        Raises:
          InputError: a parameter is missing, unknown or has the wrong shape.
        """
        graphdef, state = nnx.split(self)
        # In the order in which JAX flattens dicts.
        expected, given = (dict(sorted(flatten(tree))) for tree in (nnx.to_pure_dict(state), params))
        found, needed = ({path: leaf.shape for path, leaf in tree.items()} for tree in (given, expected))
        check_shapes(found, needed, "the model")
        return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), given.values()))

    def parameters(self) -> dict[str, Any]:
        """Returns the parameters as a nested dict of arrays."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Runs the model up to and including the final norm, without the output projection.

        Args:
          tokens: integers [batch, length], below vocab_size. Under `jax.jit` the values cannot be checked; an id
            beyond the vocabulary then gives NaN.
          positions: integers [batch, length], 0-based; None counts from 0 within each segment.
          segment_ids: integers [batch, length]; tokens see only their own segment. None means one segment per row.

        Returns:
          Final normed hidden states [batch, length, hidden_size], divided by `logits_scaling`, in the compute dtype.

        Raises:
          InputError: an argument has the wrong shape or dtype, or (outside of `jax.jit`) a value is out of range.
        """
        tokens = checked("tokens", tokens, 0, self.config.vocab_size)
        if positions is not None:
            positions = checked("positions", positions, 0, 2**31, tokens.shape)
        if segment_ids is not None:
            segment_ids = checked("segment_ids", segment_ids, -(2**31), 2**31, tokens.shape)
        row = self.row(tokens, positions, segment_ids)
        stacked = nnx.to_pure_dict(nnx.state(self.layers, nnx.Param))

        def layer(x: Array, inputs: tuple[Any, Array]) -> tuple[Array, None]:
            return self.layer(*inputs, x, row), None

        x = self.embed(self.embed_tokens.embedding[...], tokens)
        x, _ = jax.lax.scan(layer, x, (stacked, jnp.arange(self.config.num_hidden_layers)))
        return final_norm(self.config, self.norm.scale[...], x)

    def row(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Row:
        """Computes the per-token inputs that all layers share: positions, cosines and sines, and segments.

        Args:
          tokens, positions, segment_ids: as for `hidden_states`.
        """
        if positions is None:
            positions = (
                jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
                if segment_ids is None
                else positions_from_segments(segment_ids)
            )
        rope = self.config.rope
        length = segment_lengths(positions, segment_ids) if rope.depends_on_length else None
        return Row(positions, *rotary_tables(rope, self.config.rotary_dim, positions, length), segment_ids)

    def embed(self, embedding: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the hidden states before the first layer, in the compute dtype."""
        x = embedded(self.config, jnp.take(embedding, tokens, axis=0), self.dtype)
        return self.constrain(x, "batch", "length", None)

    def layer(self, parameters: Mapping[str, Any], index: Array, x: Float[Array, "B T D"], row: Row) -> Array:
        """Runs one decoder layer.

        Args:
          parameters: one layer's entries of `parameters()["layers"]`, without the leading axis.
          index: int32 scalar, 0-based layer index; a scheme's logit multiplier may depend on it.
          x: hidden states before the layer.

        Returns:
          Hidden states after the layer, with the shape and dtype of x.
        """
        graphdef, state = nnx.split(self.layers)
        block = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(dict(parameters))))
        return block(self.config, x, row, index, self._attention_of(index, x.shape[1]), self.constrain)

    def _attention_of(self, index: Array, length: int) -> Attention:
        """Returns the attention function of a layer, whose index may be traced, for rows of this length."""
        config, full, windowed = self.config, self.attention, self.windowed
        if windowed is None or config.sliding_window is None or length <= config.sliding_window:
            return full
        if not config.full_attention_layers:
            return windowed
        is_full = jnp.isin(index, jnp.array(config.full_attention_layers))
        return lambda q, k, v, segments: jax.lax.cond(is_full, full, windowed, q, k, v, segments)

    def output_kernel(self) -> Float[Array, "D V"]:
        """Returns the [hidden_size, vocab_size] matrix from hidden states to logits, in the parameters' dtype."""
        return self.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Computes the logits of the next token at every position.

        Args:
          tokens, positions, segment_ids: as for `hidden_states`.

        Returns:
          float32 [batch, length, vocab_size].

        Raises:
          InputError: as for `hidden_states`.
        """
        return logits(self.hidden_states(tokens, positions, segment_ids), self.output_kernel())


def logits(hidden: Float[Array, "... D"], kernel: Float[Array, "D V"]) -> Float[Array, "... V"]:
    """Projects hidden states to float32 logits.

    Args:
      hidden: [..., hidden_size], in the compute dtype.
      kernel: [hidden_size, vocab_size].

    Returns:
      float32 [..., vocab_size].
    """
    return jnp.matmul(
        hidden, kernel.astype(hidden.dtype), precision=precision_of(hidden.dtype), preferred_element_type=jnp.float32
    )


def checked(name: str, given: Any, low: int, end: int, shape: tuple[int, ...] | None = None) -> Int[Array, "B T"]:
    """Converts an argument to int32 [batch, length]; checks shape and dtype, and the values where they are known."""
    try:
        values = given if isinstance(given, jax.Array) else np.asarray(given)
    except ValueError as error:
        raise InputError(f"{name}: rows of different lengths; integers of shape [batch, length] are needed") from error
    if values.ndim != 2 or not values.size or not jnp.issubdtype(values.dtype, jnp.integer):
        raise InputError(
            f"{name}: {values.dtype} of shape {list(values.shape)} was given; integers of shape [batch, length] are "
            "needed, both at least 1"
        )
    if shape is not None and values.shape != shape:
        raise InputError(f"{name}: shape {list(values.shape)} was given; that of the tokens, {list(shape)}, is needed")
    if not isinstance(values, jax.Array) or (not isinstance(values, jax.core.Tracer) and values.is_fully_addressable):
        known = np.asarray(values)
        if known.min() < low or known.max() >= end:
            raise InputError(
                f"{name}: values from {known.min()} to {known.max()} were given; {low} to {end - 1} are possible"
            )
    return jnp.asarray(values, jnp.int32)
