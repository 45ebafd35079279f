"""Causal self-attention behind one function signature, with backends for CPU, GPU and TPU.

Dimensions, here and in `llama.py`: B batch, T length, N query heads, K key-value heads (N is a multiple of K),
G = N / K, H head_dim. A new kernel needs a function with the signature of `reference` and a line in `BACKENDS`; context
parallelism also needs its two halves in `KERNELS`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from eabf_jax.errors import InputError, unknown_name

Attention = Callable[[Array, Array, Array, Array | None], Array]

# exp() of this is 0 in float32; unlike -inf, it gives no NaN in a row whose entries are all masked.
_MASKED = -1e30
# Residuals of a backend's backward pass, other than its inputs, carry this name, so that a remat policy can keep them.
_CHECKPOINT_NAME = "attention_output"
# Query and key block size of the chunked backend: the fastest of 128 to 1024 on CPU, for rows of 2,048 tokens.
_CHUNK = 256
# The splash kernel needs lengths and head sizes that are multiples of the lane count.
SPLASH_LANES = 128
# Largest query and key block for the splash kernel.
_SPLASH_BLOCK = 512


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends with the full [T, T] matrix of logits; the other backends are tested against this definition.

    Args:
      q: queries, already rotated and scaled (1/sqrt(head_dim) and the scheme's logit multiplier included).
      k: keys, already rotated.
      v: values.
      segment_ids: tokens attend only within their own segment; None means one segment per row.

    Returns:
      The attended values, in the dtype of `v`; softmax is taken in float32.
    """
    return reference_at(jnp.arange(q.shape[1]), q, k, v, segment_ids)


def reference_at(
    q_index: Int[Array, "T"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends like `reference`, for a subset of a row's queries in any order.

    Args:
      q_index: each query's index in the row; a query sees the keys up to and including that index.
      q: the queries at `q_index`.
      k: the keys of the whole row.
      v: the values of the whole row.
      segment_ids: as for `reference`; allowed only where `q` holds all queries of the row in order.

    Returns:
      As `reference`.
    """
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, head_dim)
    logits = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32, precision=precision_of(q.dtype)
    )
    mask = _mask(q_index, jnp.arange(k.shape[1]), segment_ids, segment_ids)
    weights = jax.nn.softmax(jnp.where(mask, logits, _MASKED), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision_of(v.dtype))
    return out.reshape(batch, length, heads, head_dim)


class Kernel(NamedTuple):
    """An attention kernel as a forward and a backward function, linked by the log-sum-exp of each query's logits.

    Attributes:
      forward: (q, k, v, segment_ids, causal) -> out [B, T, N, H], log_sum_exp float32 [B, N, T]. If not causal, every
        query sees every key, and the number of keys may differ from the number of queries.
      backward: (q, k, v, segment_ids, out, log_sum_exp, d_out, causal) -> d_q, d_k, d_v. If `out` and `log_sum_exp`
        cover more keys than `k` holds, the result is the contribution of the keys in `k` to the gradients.
    """

    forward: Callable[[Array, Array, Array, Array | None, bool], tuple[Array, Array]]
    backward: Callable[[Array, Array, Array, Array | None, Array, Array, Array, bool], tuple[Array, Array, Array]]


def keep_residuals(kernel: Kernel) -> Attention:
    """Builds attention whose output and log-sum-exp a remat policy can keep, so that the forward pass runs only once.

    Both carry the name "attention_output". Callers must not name the output again, or it is kept twice; they name
    the other residuals (q, k, v) themselves.

    Returns:
      A function with the signature of `reference`.
    """

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        return kernel.forward(q, k, v, segment_ids, True)[0]

    def forward(q: Array, k: Array, v: Array, segment_ids: Array | None) -> tuple[Array, Any]:
        out, log_sum_exp = named(*kernel.forward(q, k, v, segment_ids, True))
        return out, (q, k, v, segment_ids, out, log_sum_exp)

    def backward(saved: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
        q, k, v, segment_ids, out, log_sum_exp = saved
        return *kernel.backward(q, k, v, segment_ids, out, log_sum_exp, d_out, True), None

    attend.defvjp(forward, backward)
    return attend


def named(*residuals: Array) -> tuple[Array, ...]:
    """Tags a kernel's residuals with the name that remat policies look for."""
    return tuple(checkpoint_name(x, _CHECKPOINT_NAME) for x in residuals)


def chunked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends block by block with an online softmax; memory is linear in T and blocks above the diagonal are skipped.

    Args and Returns: as `reference`.
    Source: "FlashAttention-2" (Dao, 2023), algorithms 1 and 2, in plain JAX for any device.
    """
    return _chunked(q, k, v, segment_ids)


class _Blocks:
    """Splits the chunked kernel's [T, S] logits into blocks and masks them."""

    def __init__(self, length: int, keys: int, causal: bool):
        self.length, self.keys, self.causal = length, keys, causal
        self.q_size, self.k_size = min(_CHUNK, length), min(_CHUNK, keys)
        self.q_count, self.k_count = -(-length // self.q_size), -(-keys // self.k_size)

    def queries(self, x: Array, kv_heads: int) -> Array:
        """[B, T, N, H] -> [B, K, G, padded T, H]."""
        x = jnp.pad(x, ((0, 0), (0, self.q_count * self.q_size - self.length), (0, 0), (0, 0)))
        return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)

    def from_queries(self, x: Array) -> Array:
        """[B, K, G, padded T, H] -> [B, T, N, H]."""
        x = x.transpose(0, 3, 1, 2, 4)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])[:, : self.length]

    def key_values(self, x: Array) -> Array:
        """[B, S, K, H] -> [B, K, padded S, H]."""
        return jnp.pad(x, ((0, 0), (0, self.k_count * self.k_size - self.keys), (0, 0), (0, 0))).swapaxes(1, 2)

    def from_key_values(self, x: Array) -> Array:
        """[B, K, padded S, H] -> [B, S, K, H]."""
        return x.swapaxes(1, 2)[:, : self.keys]

    def statistics(self, x: Array, kv_heads: int) -> Array:
        """[B, N, T] -> [B, K, G, padded T]."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.q_count * self.q_size - self.length)))
        return x.reshape(x.shape[0], kv_heads, -1, x.shape[-1])

    def segments(self, ids: Array | None) -> Array | None:
        return None if ids is None else jnp.pad(ids, ((0, 0), (0, self.q_count * self.q_size - self.length)))

    def logits(self, q_i: Array, k_j: Array, segments: Array | None, i: Array, j: Array) -> Array:
        """Masked logits of query block i against key block j: [B, K, G, q_size, k_size]."""
        k_index = j * self.k_size + jnp.arange(self.k_size)
        if self.causal:
            # Padding comes after every real query, so the causal mask already excludes it.
            q_index = i * self.q_size + jnp.arange(self.q_size)
            of_block = (None, None) if segments is None else (_block(segments, n, self.q_size, 1) for n in (i, j))
            mask = _mask(q_index, k_index, *of_block)
        else:
            mask = k_index < self.keys
        return jnp.where(mask, _dot("bkgth,bksh->bkgts", q_i, k_j), _MASKED)


def _chunked_forward(q: Array, k: Array, v: Array, segment_ids: Array | None, causal: bool) -> tuple[Array, Array]:
    blocks, kv_heads = _Blocks(q.shape[1], k.shape[1], causal), k.shape[2]
    q, k, v = blocks.queries(q, kv_heads), blocks.key_values(k), blocks.key_values(v)
    segments = blocks.segments(segment_ids)

    def query_block(i: Array) -> tuple[Array, Array]:
        q_i = _block(q, i, blocks.q_size, 3)

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            total, largest, weighted = carry
            logits = blocks.logits(q_i, _block(k, j, blocks.k_size, 2), segments, i, j)
            new_largest = jnp.maximum(largest, logits.max(-1))
            weights = jnp.exp(logits - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            update = _dot("bkgts,bksh->bkgth", weights.astype(v.dtype), _block(v, j, blocks.k_size, 2))
            return (
                total * shrink + weights.sum(-1),
                new_largest,
                weighted * shrink[..., None] + update,
            )

        zeros = jnp.zeros(q_i.shape, jnp.float32)
        start = (zeros[..., 0], jnp.full(q_i.shape[:-1], _MASKED, jnp.float32), zeros)
        last = i + 1 if causal else blocks.k_count
        total, largest, weighted = jax.lax.fori_loop(0, last, key_block, start)
        return (weighted / total[..., None]).astype(v.dtype), largest + jnp.log(total)

    out, log_sum_exp = jax.lax.map(query_block, jnp.arange(blocks.q_count))
    log_sum_exp = _join(log_sum_exp[..., None])[..., 0]
    log_sum_exp = log_sum_exp.reshape(log_sum_exp.shape[0], -1, log_sum_exp.shape[-1])
    return blocks.from_queries(_join(out)), log_sum_exp[..., : blocks.length]


def _chunked_backward(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    out: Array,
    log_sum_exp: Array,
    d_out: Array,
    causal: bool,
) -> tuple[Array, Array, Array]:
    blocks, kv_heads = _Blocks(q.shape[1], k.shape[1], causal), k.shape[2]
    # Row sums of weights * d_weights, which the derivative of softmax subtracts.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    delta, log_sum_exp = blocks.statistics(delta, kv_heads), blocks.statistics(log_sum_exp, kv_heads)
    q, d_out = blocks.queries(q, kv_heads), blocks.queries(d_out, kv_heads)
    k, v = blocks.key_values(k), blocks.key_values(v)
    segments = blocks.segments(segment_ids)

    def key_block(d_q: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_j, v_j = _block(k, j, blocks.k_size, 2), _block(v, j, blocks.k_size, 2)

        def query_block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k_j, d_v_j = carry
            q_i, d_out_i = _block(q, i, blocks.q_size, 3), _block(d_out, i, blocks.q_size, 3)
            logits = blocks.logits(q_i, k_j, segments, i, j)
            weights = jnp.exp(logits - _block(log_sum_exp, i, blocks.q_size, 3)[..., None])
            d_v_j += _dot("bkgth,bkgts->bkhs", d_out_i, weights.astype(v.dtype))
            d_weights = _dot("bkgth,bksh->bkgts", d_out_i, v_j)
            d_logits = (weights * (d_weights - _block(delta, i, blocks.q_size, 3)[..., None])).astype(q.dtype)
            d_k_j += _dot("bkgth,bkgts->bkhs", q_i, d_logits)
            d_q_i = _block(d_q, i, blocks.q_size, 3) + _dot("bkgts,bksh->bkgth", d_logits, k_j)
            return jax.lax.dynamic_update_slice_in_dim(d_q, d_q_i, i * blocks.q_size, 3), d_k_j, d_v_j

        # These sums have head_dim first: with it last, XLA would transpose the large [t, s] operand in each product.
        zeros = jnp.zeros(k_j.mT.shape, jnp.float32)
        first = j if causal else 0
        d_q, d_k_j, d_v_j = jax.lax.fori_loop(first, blocks.q_count, query_block, (d_q, zeros, zeros))
        return d_q, (d_k_j.mT, d_v_j.mT)

    d_q, (d_k, d_v) = jax.lax.scan(key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(blocks.k_count))
    return (
        blocks.from_queries(d_q.astype(q.dtype)),
        blocks.from_key_values(_join(d_k).astype(k.dtype)),
        blocks.from_key_values(_join(d_v).astype(v.dtype)),
    )


def _block(x: Array, index: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _join(blocks: Array) -> Array:
    """[blocks, ..., size, H] -> [..., blocks * size, H]."""
    moved = jnp.moveaxis(blocks, 0, -3)
    return moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])


def _mask(q_index: Array, k_index: Array, q_segments: Array | None, k_segments: Array | None) -> Array:
    """True where a query may see a key, broadcastable to [B, K, G, T, S]."""
    causal = k_index[None, :] <= q_index[:, None]
    if q_segments is None or k_segments is None:
        return causal
    return causal & (q_segments[:, None, None, :, None] == k_segments[:, None, None, None, :])


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """Returns the precision of matrix products for a compute dtype, so that float32 means float32 on every device.

    Returns:
      HIGHEST for float32, which TPUs and recent GPUs would otherwise round to fewer bits; None for other dtypes.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _dot(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32, precision=precision_of(a.dtype))


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends with cuDNN's fused kernel (NVIDIA GPUs, bfloat16 or float16).

    Args and Returns: as `reference`. With segment ids the kernel takes a [B, 1, T, T] mask, which is meant for the
    short windows of packed pretraining.
    Source: `jax.nn.dot_product_attention`. Its two primitives are called directly, because its own derivative does
    not expose the float32 log-sum-exp.
    """
    # The kernel's backward pass rejects odd lengths. Padding comes last, so the causal mask already excludes it.
    length, pad = q.shape[1], q.shape[1] % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, pad)))
    return _cudnn(q, k, v, ids)[:, :length]


def _cudnn_forward(q: Array, k: Array, v: Array, segment_ids: Array | None, causal: bool) -> tuple[Array, Array]:
    out, log_sum_exp = fused._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, *_cudnn_operands(q, segment_ids), **_cudnn_options(segment_ids, causal), is_training=True
    )
    return out, log_sum_exp


def _cudnn_backward(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    out: Array,
    log_sum_exp: Array,
    d_out: Array,
    causal: bool,
) -> tuple[Array, Array, Array]:
    operands = _cudnn_operands(q, segment_ids)
    d_q, d_k, d_v = fused._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *operands, log_sum_exp, out, d_out, **_cudnn_options(segment_ids, causal)
    )
    return d_q, d_k, d_v


def _cudnn_operands(q: Array, segment_ids: Array | None) -> tuple[Array, ...]:
    """Bias, then lengths, offsets and page tables of queries and keys; unused operands are empty."""
    unused = jnp.zeros(0, q.dtype)
    bias = unused
    if segment_ids is not None:
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        bias = jnp.where(same, 0, fused.get_large_negative_number(q.dtype)).astype(q.dtype)
    return bias, *(unused,) * 6


def _cudnn_options(segment_ids: Array | None, causal: bool) -> dict[str, Any]:
    return {
        "scale": 1.0,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (segment_ids is not None, False),  # has a bias, needs the bias gradient
        "mask_type": fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }


def cudnn_token(
    q: Float[Array, "B N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], lengths: Int[Array, "B"]
) -> Float[Array, "B N H"]:
    """Attends with one query per row to the first keys of a cache, with cuDNN's fused kernel.

    Args:
      q: queries, rotated and scaled.
      k: keys; those past a row's length are not read.
      v: values; those past a row's length are not read.
      lengths: int32 [batch], number of keys in each row.

    Returns:
      The attended values.
    Source: the function behind `jax.nn.dot_product_attention`, which does not accept the [B, K, S, H] cache layout.
    """
    one = jnp.ones_like(lengths)
    out = fused.dot_product_attention(
        q[:, :, None], k, v, q_seqlen=one, kv_seqlen=lengths, mask_type=fused.MaskType.PADDING, qkv_layout="BNTH"
    )
    return out[:, :, 0]


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends with the splash kernel (TPU).

    Args and Returns: as `reference`. Lengths and head sizes are padded to multiples of 128, which the kernel needs.
    Source: `jax.experimental.pallas.ops.tpu.splash_attention`.
    """
    _, length, heads, head_dim = q.shape
    pad_length, pad_head = -length % SPLASH_LANES, -head_dim % SPLASH_LANES
    pads = ((0, 0), (0, pad_length), (0, 0), (0, pad_head))
    q, k, v = (jnp.pad(x, pads) for x in (q, k, v))
    ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, pad_length)))
    out = run_splash(splash_kernel(tuple(range(length + pad_length)), heads), q, k, v, ids)
    return out[:, :length, :, :head_dim]


@functools.cache
def splash_kernel(q_index: tuple[int, ...], heads: int, *, head_shards: int = 1, q_shards: int = 1) -> Any:
    """Builds the splash kernel for causal attention of queries in any order.

    Args:
      q_index: each query's index in the row; a permutation of 0 ... length - 1, length a multiple of 128.
      heads: number of query heads.
      head_shards: number of devices that split the heads.
      q_shards: number of devices that split the queries; each device's share is a multiple of 128.

    Returns:
      A callable pytree that takes q, k and v of one row as [heads, length, H].
    """
    # The import takes longer than importing the whole model, so machines without a TPU skip it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernel

    @functools.cache
    def uniform(value: bool, rows: int, columns: int) -> np.ndarray:
        return np.full((rows, columns), value)

    class Causal(kernel.CausalMask):
        """A causal mask with a fast path for uniform blocks, which are nearly all blocks of a long row."""

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            rows, columns = self.q_sequence[index[0]], range(self.shape[1])[index[1]]
            if rows.min() >= columns[-1] or rows.max() < columns[0]:
                return uniform(bool(rows[0] >= columns[0]), rows.size, len(columns))
            return rows[:, None] >= np.array(columns)

    mask = Causal((len(q_index),) * 2)
    mask.q_sequence = np.array(q_index, np.int32)
    # The largest block that divides a device's queries. Block tables grow with (length / block)^2 and must fit in
    # scalar memory, and the library's default of 128 leaves the matrix unit idle.
    block = math.gcd(len(q_index) // q_shards, _SPLASH_BLOCK)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    # The result is cached per process, so it must not hold tracers of the current trace.
    with jax.ensure_compile_time_eval():
        made = kernel.make_splash_mha(
            kernel.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=head_shards,
            q_seq_shards=q_shards,
            residual_checkpoint_name=_CHECKPOINT_NAME,
        )
    return jax.tree.map(np.asarray, made)


def run_splash(kernel: Any, q: Array, k: Array, v: Array, segment_ids: Array | None = None) -> Array:
    """Runs a kernel from `splash_kernel` on rows: [B, T, N, H], [B, S, K, H] twice, [B, T] -> [B, T, N, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    ids = None if segment_ids is None else SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)


KERNELS: dict[str, Kernel] = {
    "chunked": Kernel(_chunked_forward, _chunked_backward),
    "cudnn": Kernel(_cudnn_forward, _cudnn_backward),
}
_chunked, _cudnn = (keep_residuals(KERNELS[name]) for name in ("chunked", "cudnn"))
BACKENDS: dict[str, Attention] = {"reference": reference, "chunked": chunked, "cudnn": cudnn, "splash": splash}


def select(backend: str, dtype: jnp.dtype, head_dim: int, platform: str | None = None) -> str:
    """Resolves the backend's name before tracing.

    Args:
      backend: a name in `BACKENDS`, or "auto" for the best one that the platform, dtype and head size allow.
      dtype: the compute dtype.
      head_dim: size of one head.
      platform: "cpu", "gpu" or "tpu"; None means JAX's default backend.

    Returns:
      A name in `BACKENDS`.
    Raises:
      InputError: an unknown name, or cuDNN with a dtype or head size that it does not support.
    """
    fits_cudnn = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    if backend == "auto":
        platform = platform or jax.default_backend()
        if platform == "tpu":
            return "splash"
        return "cudnn" if platform in ("gpu", "cuda") and fits_cudnn else "chunked"
    if backend not in BACKENDS:
        raise unknown_name("attention backend", backend, [*BACKENDS, "auto"])
    if backend == "cudnn" and not fits_cudnn:
        raise InputError(
            f"attention backend 'cudnn' takes bfloat16 or float16 and a head_dim of at most 128 divisible by 8, not "
            f"{jnp.dtype(dtype).name} and {head_dim}; 'chunked' takes any"
        )
    return backend
