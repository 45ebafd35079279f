"""The optimizer step as one program per layer, called from Python; for GPUs.

It has three advantages over one program that scans the layers. Parameters, gradients and residuals have their own
buffers, which matrix products read and write without a copy. Each layer can keep different residuals. The optimizer's
state can stay in host memory and pass through the device a few layers at a time; in one program, XLA would have to
schedule that. The device does not wait for Python, which queues calls much faster than the device runs them.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from eabf_jax.model.llama import Llama, Row
from eabf_jax.model.lora import split_trained
from eabf_jax.parallel.rules import parameter_shardings, spec
from eabf_jax.training.backward import Microbatch, Pieces, Tree, add, head_parameters, remat_by_layer, zeros
from eabf_jax.training.host_memory import (
    IN_FLIGHT,
    Shards,
    Streamed,
    device_bytes,
    layer_of,
    moved,
    on_host,
    stacked,
)
from eabf_jax.training.master import join, split_tree
from eabf_jax.training.recipe import ComputeConfig
from eabf_jax.training.step import Saved, StepMetrics, TrainState, clip_factor, narrowed, update, with_shardings


class Layerwise:
    """The step as one program per layer; in the trees of its state, `layers` is a list."""

    def __init__(
        self,
        model: Llama,
        optimizer: optax.GradientTransformation,
        compute: ComputeConfig,
        mesh: Mesh,
        *,
        clip_norm: float,
        batch: Microbatch,
    ):
        """Plans the step; arguments and errors are those of `step.Program`."""
        self._optimizer, self._clip_norm, self._batch = optimizer, clip_norm, batch
        self._dtype = jnp.dtype(compute.dtype)
        self._layers = model.config.num_hidden_layers
        self._remat = remat_by_layer(compute.remat, self._layers)
        self._gathered = compute.gather == "step" and mesh.shape["fsdp"] * mesh.shape["context"] > 1
        self._pieces = Pieces(model, compute.loss_chunk, mesh, wide=mesh.size == 1, whole=self._gathered)
        self._tied = model.config.tie_word_embeddings
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._on_host = compute.optimizer_memory == "host"
        params = model.parameters()
        masters, frozen = split_trained(with_shardings(params, parameter_shardings(mesh, params)), model.lora)
        frozen = narrowed(frozen, self._dtype)

        def parked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_host(leaf.sharding))

        def one_layer(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            at = NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec[1:]))
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=at)

        def by_layer(tree: Tree) -> Tree:
            return {**tree, "layers": jax.tree.map(one_layer, tree["layers"])} if tree else {}

        # Stacked moments and frozen layers pass through host memory, because the device has no room for them next to
        # the same arrays by layer.
        moments = jax.tree.map(parked, masters)
        self.abstract = Saved(masters, {"mu": moments, "nu": moments})
        self.frozen = {**frozen, "layers": jax.tree.map(parked, frozen["layers"])} if frozen else {}
        self._masters, self._frozen = by_layer(masters), by_layer(frozen)
        self._programs: dict[Any, Any] = {}
        # Collectives overlap with computation only under this scheduler; a single device has no collectives.
        overlap = mesh.size > 1 and mesh.devices.flat[0].platform == "gpu"
        self._options: Any = {"compiler_options": {"xla_gpu_enable_latency_hiding_scheduler": True}} if overlap else {}
        self._numbers: list[Array] = []
        self._stream: Streamed | None = None  # parts of the optimizer's state that are still returning to the host
        self._room = 0  # bytes that one backward pass frees for these parts
        self._sizes: dict[str, int] = {}  # bytes that a layer keeps, by policy
        self._back: deque[Array] = deque()  # per offloaded layer, an array that is ready once the layer is back

    # Programs. Each is compiled for the shapes and shardings that the previous program returns.

    def compile(self) -> float:
        """See `Step`."""
        began = time.perf_counter()
        pieces, masters, frozen = self._pieces, self._masters, self._frozen
        others = frozen.get("layers", {})
        halves = jax.eval_shape(lambda tree: split_tree(tree, self._dtype), masters)
        params = with_shardings(halves[0], _shardings(masters))
        rest_at = {name: self._optimizer_shardings(name, host=False)[0] for name in masters}
        rest = with_shardings(halves[1], rest_at)
        shares, frozen_shares = params, frozen
        if self._gathered:
            params, frozen = (jax.tree.map(_whole, tree) for tree in (params, frozen))
            others = frozen.get("layers", {})
            for kind, tree, whole in (("trained", shares, params), ("frozen", frozen_shares, frozen)):
                for name in tree:
                    self._compile(("gather", kind, name), _same, tree[name], outputs=_shardings(whole[name]))
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._replicated)
        self._numbers = [
            jax.device_put(np.int32(i), self._replicated) for i in range(max(self._layers, self._batch.tokens.shape[0]))
        ]

        def start(embedding: Tree, batch: Microbatch, number: Array) -> tuple[Any, ...]:
            rows = jax.tree.map(lambda array: array[number], batch)
            return rows, pieces.row(rows), pieces.embed(embedding, rows.tokens)

        rows, row, x = self._compile("start", start, {**params, **frozen}["embed_tokens"], self._batch, number)
        kept = {}
        for policy in dict.fromkeys(self._remat):
            forward = functools.partial(pieces.forward, policy)
            x, kept[policy] = self._compile(("forward", policy), forward, params["layers"], others, number, x, row)
            self._sizes[policy] = device_bytes((x, kept[policy]))
        staying = sum(self._sizes[policy] for policy in self._remat if policy != "offload")
        back = min(self._remat.count("offload"), IN_FLIGHT + 1) * self._sizes.get("offload", 0)
        self._room = max(0, staying - back)
        self._kept_at = [_shardings([x, kept.get("offload", [])])]
        self._kept_at.append(jax.tree.map(on_host, self._kept_at[0]))

        def head(*inputs: Any) -> tuple[Any, ...]:
            loss, gradients, d_x = pieces.head(*inputs[:-1])
            return inputs[-1] + loss, gradients, d_x

        trained, fixed, sums = (head_parameters(tree, self._tied) for tree in (params, frozen, masters))
        _, _, d_x = self._compile("head", head, trained, fixed, x, rows, sums, scalar, donate=(4, 5))
        for policy, saved in kept.items():

            def backward(gradients: Tree, d_y: Array, *layer: Any, policy: str = policy) -> tuple[Tree, Array]:
                trained, others, number, x, row, saved = layer
                d_layer, d_x = pieces.backward(policy, trained, others, number, x, row, saved, d_y)
                return add(gradients, d_layer), d_x

            layer = (params["layers"], others, number, x, row, saved)
            self._compile(("backward", policy), backward, masters["layers"], d_x, *layer, donate=(0, 1))
        if "embed_tokens" in masters:
            embedding = (masters["embed_tokens"], rows.tokens, d_x)
            self._compile("embed_backward", pieces.embed_backward, *embedding, donate=0)

        def finish(squares: list[Array], total: Array, mask: Array) -> tuple[Array, ...]:
            count = mask.sum()
            # Averaged over the trained tokens of the global batch, however microbatches and devices split them.
            scale = 1.0 / jnp.maximum(count, 1).astype(jnp.float32)
            norm = jnp.sqrt(sum(squares, start=jnp.float32(0))) * scale
            return total * scale, norm, scale * clip_factor(norm, self._clip_norm), count

        self._compile("finish", finish, [scalar] * (self._layers + len(masters) - 1), scalar, self._batch.mask)
        for name in masters:
            self._compile(("squares", name), lambda tree: optax.tree.norm(tree, squared=True), masters[name])
            part = (shares[name], rest[name], masters[name], masters[name])
            outputs = (*_shardings(part), self._replicated)
            change = functools.partial(update, self._optimizer)
            whole = (number, *part, masters[name], scalar)
            self._compile(("update", name), change, *whole, donate=(1, 2, 3, 4), outputs=outputs)
            self._compile(("zeros", name), functools.partial(zeros, masters[name]), outputs=_shardings(masters[name]))
        return time.perf_counter() - began

    def _compile(
        self, name: Any, function: Callable[..., Any], *shapes: Any, donate: Any = (), outputs: Any = None
    ) -> Any:
        """Compiles a program and stores it under a name; returns the shapes and shardings of its results."""
        options = {} if outputs is None else {"out_shardings": outputs}
        compiled = jax.jit(function, donate_argnums=donate, **options).lower(*shapes).compile(**self._options)
        self._programs[name] = compiled
        return with_shardings(jax.eval_shape(function, *shapes), compiled.output_shardings)

    # The step.

    def __call__(self, state: TrainState, batch: Microbatch) -> tuple[TrainState, StepMetrics]:
        """See `Step`."""
        run, numbers = self._programs, self._numbers
        params, frozen = self._used("trained", state.params), self._used("frozen", state.frozen)
        gradients = {
            name: [run["zeros", name]() for _ in range(self._layers)] if name == "layers" else run["zeros", name]()
            for name in params
        }
        total = jax.device_put(np.float32(0), self._replicated)
        before, coming = self._stream, self._streamed(state) if self._on_host else None
        for number in numbers[: batch.tokens.shape[0]]:
            # Calls queued beyond the previous backward pass would wait for memory, and the allocator soon gives up.
            jax.block_until_ready(total)
            rows, row, x = run["start"]({**params, **frozen}["embed_tokens"], batch, number)
            x, kept = self._forward(params, frozen, x, row, before)
            before = None
            trained, fixed, sums = (head_parameters(tree, self._tied) for tree in (params, frozen, gradients))
            total, sums, d_x = run["head"](trained, fixed, x, rows, sums, total)
            gradients.update(sums)
            del x, sums
            last = number is numbers[batch.tokens.shape[0] - 1]
            d_x = self._backward(params, frozen, gradients, row, kept, d_x, coming if last else None)
            if "embed_tokens" in gradients:
                gradients["embed_tokens"] = run["embed_backward"](gradients["embed_tokens"], rows.tokens, d_x)
            del d_x
        del params, frozen
        squares = [run["squares", name](_part(gradients, place)) for name, place in self._places()]
        loss, norm, scale, count = run["finish"](squares, total, batch.mask)
        state, parameter_norm = self._update(state, gradients, scale, coming)
        self._stream = coming
        return state, StepMetrics(loss, norm, parameter_norm, count)

    def _forward(
        self, params: Tree, frozen: Tree, x: Array, row: Row, leaving: Streamed | None
    ) -> tuple[Array, list[Any]]:
        """Runs the forward pass of all layers; returns each layer's input and residuals."""
        others = frozen.get("layers", [{}] * self._layers)
        kept: list[Any] = []
        offloaded: list[Any] = []
        used = 0
        room = self._layers - self._remat.count("offload")
        for number, policy in enumerate(self._remat):
            if 0 <= number - room < len(offloaded):
                jax.block_until_ready(offloaded[number - room])  # this layer needs the device memory that it frees
            used += self._sizes[policy]
            if leaving:  # waits only until enough of the previous step's state has left for this layer to fit
                leaving.settle(max(0, self._room - used))
            y, saved = self._programs["forward", policy](
                params["layers"][number], others[number], self._numbers[number], x, row
            )
            kept.append([x, saved])
            if policy == "offload":
                if self._back:  # the previous microbatch no longer uses this much host memory
                    jax.block_until_ready(self._back.popleft())
                kept[number] = jax.device_put(kept[number], self._kept_at[1])
                offloaded.append(kept[number])
            x = y
        return x, kept

    def _backward(
        self,
        params: Tree,
        frozen: Tree,
        gradients: Tree,
        row: Row,
        kept: list[Any],
        d_x: Array,
        coming: Streamed | None,
    ) -> Array:
        """Runs all backward passes, last layer first; adds to `gradients`, and grants the freed memory to `coming`."""
        others = frozen.get("layers", [{}] * self._layers)
        freed = 0
        for number in reversed(range(self._layers + IN_FLIGHT)):
            ahead = number - IN_FLIGHT
            if ahead >= 0 and self._remat[ahead] == "offload":
                kept[ahead] = moved(kept[ahead], self._kept_at[0])
                # The smallest array, because it stays on the device until a later forward pass has waited for it.
                self._back.append(min(jax.tree.leaves(kept[ahead]), key=device_bytes))
            if number >= self._layers:
                continue
            x, saved = kept.pop()
            freed += 0 if self._remat[number] == "offload" else self._sizes[self._remat[number]]
            gradients["layers"][number], d_x = self._programs["backward", self._remat[number]](
                gradients["layers"][number],
                d_x,
                params["layers"][number],
                others[number],
                self._numbers[number],
                x,
                row,
                saved,
            )
            del x, saved
            if coming:  # a quarter stays free, because the incoming parts have other sizes than the freed buffers
                coming.grant(min(freed, 3 * self._room // 4) - coming.granted)
        return d_x

    def _used(self, kind: str, tree: Tree) -> Tree:
        """Returns the parameters that the layers use: gathered, if they are gathered once per step."""
        if not self._gathered:
            return tree
        run = self._programs
        return {
            name: [run["gather", kind, name](layer) for layer in part]
            if name == "layers"
            else run["gather", kind, name](part)
            for name, part in tree.items()
        }

    def _places(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yields the parts in update order: the name of the part's programs, and its path in the trees."""
        for name in self._masters:
            if name == "layers":
                yield from ((name, (name, number)) for number in range(self._layers))
            else:
                yield name, (name,)

    def _streamed(self, state: TrainState) -> Streamed:
        """Prepares to stream the optimizer's state from host memory."""
        places = list(self._places())
        parts = [[_part(tree, place) for tree in (state.rest, state.mu, state.nu)] for _, place in places]
        device, host = ([self._optimizer_shardings(name, host=host) for name, _ in places] for host in (False, True))
        return Streamed(parts, device, host)

    def _update(
        self, state: TrainState, gradients: Tree, scale: Array, coming: Streamed | None
    ) -> tuple[TrainState, Array]:
        """Updates the parameters part by part; returns the new state and the parameters' norm."""
        trees = [{**tree, "layers": list(tree["layers"])} for tree in state[1:5]]
        squares = []
        if coming:
            jax.block_until_ready(scale)  # from here on, the memory of the residuals is free
            coming.grant_least()
        for name, place in self._places():
            params, *optimizer = (_part(tree, place) for tree in trees)
            if coming:
                optimizer = coming.take()
            *new, square = self._programs["update", name](
                state.step, params, *optimizer, _part(gradients, place), scale
            )
            _set_part(gradients, place, None)
            del params, optimizer
            squares.append(square)
            if coming:
                new[1:] = coming.give(new[1:])
            for tree, value in zip(trees, new, strict=True):
                _set_part(tree, place, value)
        norm = jnp.sqrt(jnp.stack(squares).sum())
        params, rest, mu, nu = trees
        return TrainState(state.step + 1, params, rest, mu, nu, state.frozen), norm

    @functools.cache  # noqa: B019 - lives as long as the run
    def _optimizer_shardings(self, name: str, *, host: bool) -> Any:
        """Returns the shardings of one part's rest, mu and nu."""
        at = _shardings(self._masters[name])
        halves = jax.eval_shape(lambda tree: split_tree(tree, self._dtype)[1], self._masters[name])
        rest = jax.tree.map(lambda leaf, sharding: sharding if leaf.size else self._replicated, halves, at)
        return jax.tree.map(on_host, [rest, at, at]) if host else [rest, at, at]

    # Conversion to and from checkpoints, in which the layers are stacked.

    def begin(self, params: Tree, frozen: Tree | None = None) -> TrainState:
        """See `Step`."""
        return self._state(0, params, None, frozen or {})

    def restored(self, step: int, saved: Saved, frozen: Tree | None = None) -> TrainState:
        """See `Step`."""
        return self._state(step, saved.params, saved.optimizer, frozen or {})

    def _state(self, step: int, masters: Tree, moments: Tree | None, frozen: Tree) -> TrainState:
        halves = jax.jit(lambda tree: split_tree(tree, self._dtype))
        trees: list[dict[str, Any]] = [{name: [] for name in self._masters} for _ in range(4)]

        def keep(tree: dict[str, Any], name: str, value: Tree, at: Tree) -> None:
            value = jax.device_put(value, at)
            if name == "layers":
                tree[name].append(value)
            else:
                tree[name] = value

        for name, place in self._places():
            rest_at, *_ = self._optimizer_shardings(name, host=self._on_host)
            params, rest = halves(_unstacked(masters, place, self._masters))
            keep(trees[0], name, params, _shardings(self._masters[name]))
            keep(trees[1], name, rest, rest_at)
        # The moments follow once the stacked parameters are freed, because the device may not have room for both.
        jax.block_until_ready(trees)
        jax.tree.map(lambda leaf: leaf.delete(), masters["layers"])
        none = {
            name: jax.jit(functools.partial(zeros, shapes), out_shardings=_shardings(shapes))
            for name, shapes in self._masters.items()
        }
        for name, place in self._places():
            _, *at = self._optimizer_shardings(name, host=self._on_host)
            for tree, key, to in zip(trees[2:], ("mu", "nu"), at, strict=True):
                value = _unstacked(moments[key], place, self._masters) if moments else none[name]()
                keep(tree, name, value, to)
        jax.block_until_ready(trees)
        fixed = {name: _unstacked(frozen, (name,), self._frozen) for name in frozen if name != "layers"}
        if frozen:
            fixed["layers"] = [_unstacked(frozen, ("layers", i), self._frozen) for i in range(self._layers)]
        params, rest, mu, nu = trees
        return TrainState(jax.device_put(np.int32(step), self._replicated), params, rest, mu, nu, fixed)

    def saved(self, state: TrainState, *, moments: bool = True) -> Saved:
        """See `Step`."""
        whole = jax.jit(lambda params, rest: jax.tree.map(join, params, rest))

        def master(name: str, params: Tree, rest: Tree) -> Tree:
            return whole(params, jax.device_put(rest, self._optimizer_shardings(name, host=False)[0]))

        def whole_tree(at: Tree, part: Callable[..., Tree], *trees: dict[str, Any]) -> Tree:
            out = {}
            for name, to in _shardings(at).items():
                if name == "layers":
                    layers = zip(*(tree[name] for tree in trees), strict=True)
                    out[name] = jax.tree.map(stacked, to, *(jax.tree.map(Shards, part(name, *x)) for x in layers))
                else:
                    out[name] = jax.device_put(part(name, *(tree[name] for tree in trees)), to)
            return out

        def moment(name: str, tree: Tree) -> Tree:
            return tree

        kept = self.abstract.optimizer if moments else {}
        optimizer = {key: whole_tree(at, moment, getattr(state, key)) for key, at in kept.items()}
        return Saved(whole_tree(self.abstract.params, master, state.params, state.rest), optimizer)


def _unstacked(tree: Tree, place: tuple[Any, ...], parts: Tree) -> Tree:
    """Copies one part of a tree with stacked layers to the device."""
    at = _shardings(parts[place[0]])
    if len(place) == 1:
        return jax.device_put(tree[place[0]], at)
    return jax.tree.map(lambda leaf, to: layer_of(leaf, place[1], to), tree[place[0]], at)


def _whole(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the shape of a parameter that is gathered over the mesh axes fsdp and context."""
    shared = spec("embed")[0]
    at = NamedSharding(
        leaf.sharding.mesh, PartitionSpec(*(None if axes == shared else axes for axes in leaf.sharding.spec))
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)


def _same(tree: Tree) -> Tree:
    return tree


def _shardings(shapes: Tree) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def _part(tree: Tree, place: tuple[Any, ...]) -> Tree:
    for key in place:
        tree = tree[key]
    return tree


def _set_part(tree: Tree, place: tuple[Any, ...], value: Any) -> None:
    _part(tree, place[:-1])[place[-1]] = value
