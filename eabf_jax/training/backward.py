"""The loss and its gradients, with a hand-written backward pass from layer to layer.

JAX's derivative of a scan over layers returns the gradients of all layers at once. Adding them to the sum over earlier
microbatches takes twice the memory of the gradients. Here each layer's gradient is added to the sum as soon as it is
computed. A policy per layer names the residuals that the layer keeps for its backward pass.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from eabf_jax.errors import InputError, unknown_name
from eabf_jax.model.attention import precision_of
from eabf_jax.model.llama import Llama, Row, embedded, final_norm, logits
from eabf_jax.parallel.fsdp import TOKEN_AXES, by_device, lookup, lookup_backward, scattered
from eabf_jax.parallel.rules import parameter_spec, spec

Tree = Any  # nested dict of arrays

_TOKENS = spec("batch", "length")
_EMBEDDING = parameter_spec(("embed_tokens", "embedding"))

# The residuals that a layer keeps in addition to its input, by their names in `model/`; None keeps all residuals.
# `offload` keeps its residuals in host memory.
REMAT_POLICIES: dict[str, tuple[str, ...] | None] = {
    "full": (),
    "attention": ("attention_output",),
    "qkv": ("attention_output", "qkv"),
    "dots": ("attention_output", "qkv", "middle", "mlp"),
    "offload": ("attention_output", "qkv", "middle", "mlp"),
    "none": None,
}


def remat_by_layer(remat: str, layers: int) -> tuple[str, ...]:
    """Expands a remat setting to one policy name per layer.

    Args:
      remat: a name in `REMAT_POLICIES` for all layers, or a list with counts: "dots:12,qkv" means `dots` for the first
        twelve layers and `qkv` for the others.

    Raises:
      InputError: unknown policy, or counts that do not add up to the number of layers.
    """
    found: list[str] = []
    parts = remat.split(",")
    for number, part in enumerate(parts):
        name, colon, count = part.strip().partition(":")
        if name not in REMAT_POLICIES:
            raise unknown_name("remat policy", name, [*REMAT_POLICIES, "auto"])
        if (colon and not count.isdigit()) or (not colon and number != len(parts) - 1):
            raise InputError(f"remat {remat!r}: each policy but the last takes its number of layers, as in dots:12,qkv")
        found += [name] * (int(count) if colon else layers - len(found))
    if len(found) != layers:
        raise InputError(f"remat {remat!r} is for {len(found)} layers; the model has {layers}")
    return tuple(found)


class Microbatch(NamedTuple):
    """The rows of one microbatch [batch, length], or of all microbatches of a step; arrays or their shapes."""

    tokens: Any  # int32
    targets: Any  # int32, the next token of each token
    mask: Any  # bool, True where the target counts towards the loss
    positions: Any  # int32
    segment_ids: Any  # int32, or None for one document per row


class Pieces:
    """The training computation in pieces, each a pure function of arrays.

    `trained` trees hold the trained parameters and `frozen` trees the others; merged, they are the model's parameters.
    Gradient trees have the structure of the trained trees.
    """

    def __init__(
        self, model: Llama, loss_chunk: int, mesh: Mesh | None = None, *, wide: bool = False, gathered: bool = False
    ):
        """Stores the static settings.

        Args:
          model: the model; its parameters are not used.
          loss_chunk: positions of a row (or of a device's part of the row) whose logits are in memory at a time.
          wide: matrix products return layer gradients in float32, so that a product can add to its sum directly. If
            False, gradients have the compute dtype, which halves the bytes sent between devices.
          gathered: parameters are already gathered over the mesh axes that only shard their storage.
        """
        self._model = model
        self._chunk = loss_chunk
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._wide = wide
        self._gathered = gathered

    def row(self, rows: Microbatch) -> Row:
        """Computes the per-token inputs that all layers share."""
        return self._model.row(rows.tokens, rows.positions, rows.segment_ids)

    def embed(self, parameters: Tree, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Computes the hidden states before the first layer."""
        embedding = parameters["embedding"]
        if self._mesh is None:
            return self._model.embed(embedding, tokens)
        lies = PartitionSpec() if self._gathered else _EMBEDDING
        x = lookup(self._mesh, _TOKENS, lies)(embedding, tokens)
        return self._laid_out(embedded(self._model.config, x, self._model.dtype))

    def _pullback(
        self, policy: str, trained: Tree, frozen: Tree, index: Array, x: Array, row: Row
    ) -> tuple[Array, Any]:
        def layer(trained: Tree, x: Array, frozen: Tree, index: Array, row: Row) -> Array:
            frozen, row = jax.lax.stop_gradient((frozen, row))
            return self._model.layer(merge(trained, frozen), index, x, row)

        if self._wide:
            trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
        names = REMAT_POLICIES[policy]
        if names is not None:
            keep = jax.checkpoint_policies.save_only_these_names(*names)
            layer = jax.checkpoint(layer, policy=keep, prevent_cse=False)
        return jax.vjp(layer, trained, x, frozen, index, row)

    def forward(
        self, policy: str, trained: Tree, frozen: Tree, index: Array, x: Float[Array, "B T D"], row: Row
    ) -> tuple[Float[Array, "B T D"], list[Array]]:
        """Runs the forward pass of one layer.

        Args:
          policy: a name in `REMAT_POLICIES`.
          index: int32 scalar, 0-based layer index.
          x: hidden states before the layer.

        Returns:
          Hidden states after the layer, and the residuals for `backward`.
        """
        y, pullback = self._pullback(policy, trained, frozen, index, x, row)
        return y, pullback.opaque_residuals

    def backward(
        self,
        policy: str,
        trained: Tree,
        frozen: Tree,
        index: Array,
        x: Float[Array, "B T D"],
        row: Row,
        residuals: list[Array],
        d_y: Float[Array, "B T D"],
    ) -> tuple[Tree, Float[Array, "B T D"]]:
        """Runs the backward pass of one layer.

        Args:
          policy, trained, frozen, index, x, row: as given to `forward`.
          residuals: what `forward` returned.
          d_y: gradient of the loss with respect to the layer's output.

        Returns:
          Gradients with respect to the trained parameters and to x.
        """
        # Traced again for the pullback's structure; the compiler removes the computation that `residuals` replace.
        _, pullback = self._pullback(policy, trained, frozen, index, x, row)
        pullback.opaque_residuals = residuals
        d_trained, d_x, *_ = pullback(d_y)
        return d_trained, self._laid_out(d_x)

    def head(
        self, trained: Tree, frozen: Tree, x: Float[Array, "B T D"], rows: Microbatch, gradients: Tree
    ) -> tuple[Float[Array, ""], Tree, Float[Array, "B T D"]]:
        """Computes final norm, logits and loss together with their derivatives, so that each logit is computed once.

        Args:
          trained: the trained part of `head_parameters`.
          frozen: the rest of `head_parameters`.
          x: hidden states after the last layer.
          rows: targets and mask.
          gradients: float32 gradient sums of the trained parameters.

        Returns:
          The sum of the losses that count (nats), the gradients plus this microbatch's, and the gradient of x.
        Source: `loss.token_losses` defines the losses.
        """
        params = merge(trained, frozen)
        tied = "lm_head" not in params
        kernel = params["embed_tokens"]["embedding"].T if tied else params["lm_head"]["kernel"]
        # Gathered before the chunks; a sharded contraction would sum up the logits of every chunk across devices.
        kernel = self._model.constrain(kernel.astype(x.dtype), None, "vocab")
        precision = precision_of(x.dtype)

        norm = functools.partial(final_norm, self._model.config)

        def run(
            gradients: Tree, scale: Array, kernel: Array, x: Array, targets: Array, mask: Array
        ) -> tuple[Array, Tree, Array]:
            def chunk(carry: tuple[Array, Tree], part: tuple[Array, ...]) -> tuple[tuple[Array, Tree], Array]:
                (total, gradients), (x, targets, mask) = carry, part
                hidden, pullback = jax.vjp(norm, scale, x)
                scores = logits(hidden, kernel)
                log_sum = jax.nn.logsumexp(scores, axis=-1)
                chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
                total += jnp.where(mask, log_sum - chosen, 0.0).sum()
                d_scores = jnp.exp(scores - log_sum[..., None]) - jax.nn.one_hot(targets, kernel.shape[1])
                # In the compute dtype, so that the products below are not float32.
                d_scores = jnp.where(mask[..., None], d_scores, 0.0).astype(x.dtype)
                d_scale, d_x = pullback(jnp.matmul(d_scores, kernel.T, precision=precision))
                product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
                found: dict[str, Any] = {"norm": {"scale": d_scale}} if trained.get("norm") else {}
                if trained.get("lm_head"):
                    found["lm_head"] = {"kernel": product("...d,...v->dv", hidden, d_scores)}
                if trained.get("embed_tokens") and tied:
                    found["embed_tokens"] = {"embedding": product("...d,...v->vd", hidden, d_scores)}
                return (total, {**gradients, **add({name: gradients[name] for name in found}, found)}), d_x

            parts = tuple(map(self._chunks, (x, targets, mask)))
            (total, gradients), d_x = jax.lax.scan(chunk, (jnp.float32(0), gradients), parts)
            d_x = jnp.moveaxis(d_x, 0, 1).reshape(x.shape[0], -1, x.shape[2])
            return total, gradients, d_x[:, : x.shape[1]]

        arrays = (params["norm"]["scale"], kernel, x, rows.targets, rows.mask)
        mesh = self._mesh
        if mesh is None:
            return run(gradients, *arrays)
        specs = jax.tree.map_with_path(lambda path, _: parameter_spec(tuple(k.key for k in path)), gradients)

        def share(sums: Tree, *arrays: Array) -> tuple[Array, Tree, Array]:
            """Processes a device's own tokens; sums over all chunks first, then once over the devices."""
            total, found, d_x = run(zeros(gradients), *arrays)
            found = jax.tree.map(functools.partial(scattered, mesh), found, specs)
            return jax.lax.psum(total, TOKEN_AXES), add(sums, found), d_x

        hidden = PartitionSpec(*_TOKENS, None)
        in_specs = (specs, PartitionSpec(), PartitionSpec(), hidden, _TOKENS, _TOKENS)
        return by_device(mesh, share, in_specs, (PartitionSpec(), specs, hidden))(gradients, *arrays)

    def _laid_out(self, x: Array) -> Array:
        """Constrains hidden states or their gradients to their layout on the mesh."""
        return self._model.constrain(x, "batch", "length", None)

    def _chunks(self, array: Array) -> Array:
        """[B, T, ...] -> [chunks, B, size, ...]."""
        batch, length, *rest = array.shape
        size = min(self._chunk, length)
        array = jnp.pad(array, ((0, 0), (0, -length % size), *((0, 0),) * len(rest)))
        return jnp.moveaxis(array.reshape(batch, -1, size, *rest), 1, 0)

    def embed_backward(self, gradients: Tree, tokens: Int[Array, "B T"], d_x: Float[Array, "B T D"]) -> Tree:
        """Adds the derivative of `embed` to the gradients of the embedding, if it is trained."""
        if "embedding" not in gradients:
            return gradients
        d_x = embedded(self._model.config, d_x, d_x.dtype)  # the derivative is the same multiplication
        if self._mesh is None:
            return {"embedding": gradients["embedding"].at[tokens].add(d_x.astype(jnp.float32))}
        return {"embedding": lookup_backward(self._mesh, _TOKENS, _EMBEDDING)(gradients["embedding"], tokens, d_x)}


def head_parameters(params: Mapping[str, Tree], tied: bool) -> dict[str, Tree]:
    """Selects the part of a parameter or gradient tree that `Pieces.head` takes.

    Args:
      params: trees by top-level name; parts that are not trained may be missing.
      tied: whether the embedding is also the output kernel.

    Returns:
      The trees of the final norm and the output kernel that `params` contains.
    """
    return {name: params[name] for name in ("norm", "embed_tokens" if tied else "lm_head") if name in params}


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two nested mappings that have no leaf in common."""
    merged = dict(first)
    for key, value in second.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return merged


def zeros(params: Tree) -> Tree:
    """Returns float32 zeros in the shapes of a tree."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)


def add(total: Tree, gradients: Tree) -> Tree:
    """Adds gradients to their float32 sum."""
    return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, gradients)
