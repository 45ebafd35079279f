"""The optimizer step as a program for each layer, called from Python: for GPUs.

A GPU gains by it over one program that scans: parameters, gradients and what the backward pass keeps lie in buffers of
their own, where the matrix products read and write them without a copy; every layer may keep something else; and the
optimizer's state may lie in host memory and pass through the device a few layers at a time, which XLA would have to
plan for the whole program. The device does not wait for Python: calls are queued far faster than they are computed.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from eabf_jax.model.llama import Llama
from eabf_jax.model.lora import split_trained
from eabf_jax.parallel.rules import parameter_shardings, spec
from eabf_jax.training.backward import Microbatch, Pieces, Tree, add, head_parameters, remat_by_layer, zeros
from eabf_jax.training.master import join, split_tree
from eabf_jax.training.recipe import ComputeConfig
from eabf_jax.training.step import Saved, StepMetrics, TrainState, clip_factor, narrowed, update, with_shardings

_HOST = "pinned_host"
# Layers whose part of what lies in host memory is on its way at a time.
IN_FLIGHT = 3


class Layerwise:
    """The step as a program for each layer; `layers` in the trees of its state is a list."""

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
        self._pieces = Pieces(model, compute.loss_chunk, mesh.shape["context"], wide=mesh.size == 1)
        self._tied = model.config.tie_word_embeddings
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._on_host = compute.optimizer_memory == "host"
        params = model.parameters()
        masters, frozen = split_trained(with_shardings(params, parameter_shardings(mesh, params)), model.lora)
        frozen = narrowed(frozen, self._dtype)

        def on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(_HOST))

        def layer_of(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            at = NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec[1:]))
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=at)

        def by_layer(tree: Tree) -> Tree:
            return {**tree, "layers": jax.tree.map(layer_of, tree["layers"])} if tree else {}

        # Stacked moments and frozen layers pass through host memory: beside those of the layers, the device has no
        # room for them.
        moments = jax.tree.map(on_host, masters)
        self.abstract = Saved(masters, {"mu": moments, "nu": moments})
        self.frozen = {**frozen, "layers": jax.tree.map(on_host, frozen["layers"])} if frozen else {}
        self._masters, self._frozen = by_layer(masters), by_layer(frozen)
        self._gathered = compute.gather == "step" and mesh.shape["fsdp"] * mesh.shape["context"] > 1
        self._programs: dict[Any, Any] = {}
        # Collectives run beside the computation only if they are scheduled so; one device has none.
        overlap = mesh.size > 1 and mesh.devices.flat[0].platform == "gpu"
        self._options: Any = {"compiler_options": {"xla_gpu_enable_latency_hiding_scheduler": True}} if overlap else {}
        self._numbers: list[Array] = []

    # Programs. Each is compiled for the shapes and shardings that the one before it returns.

    def compile(self) -> float:
        """See `Step`."""
        began = time.perf_counter()
        pieces, masters, frozen = self._pieces, self._masters, self._frozen
        others = frozen.get("layers", {})
        halves = jax.eval_shape(lambda tree: split_tree(tree, self._dtype), masters)
        params = with_shardings(halves[0], _shardings(masters))
        rest = jax.tree.map(
            lambda leaf, master: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=master.sharding if leaf.size else self._replicated
            ),
            halves[1],
            masters,
        )
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
        self._kept_at = [_shardings([x, kept.get("offload", [])])]
        self._kept_at.append(jax.tree.map(lambda at: at.with_memory_kind(_HOST), self._kept_at[0]))

        def head(*inputs: Any) -> tuple[Any, ...]:
            loss, gradients, d_x = pieces.head(*inputs[:-1])
            return inputs[-1] + loss, gradients, d_x

        trained, fixed, sums = (head_parameters(tree, self._tied) for tree in (params, frozen, masters))
        _, _, d_x = self._compile("head", head, trained, fixed, x, rows, sums, scalar, donate=(4, 5))
        for policy, saved in kept.items():

            def backward(gradients: Tree, d_y: Array, *inputs: Any, policy: str = policy) -> tuple[Tree, Array]:
                d_layer, d_x = pieces.backward(policy, *inputs, d_y)
                return add(gradients, d_layer), d_x

            inputs = (masters["layers"], d_x, params["layers"], others, number, x, row, saved)
            self._compile(("backward", policy), backward, *inputs, donate=(0, 1))
        if "embed_tokens" in masters:
            inputs = (masters["embed_tokens"], rows.tokens, d_x)
            self._compile("embed_backward", pieces.embed_backward, *inputs, donate=0)

        def finish(squares: list[Array], total: Array, mask: Array) -> tuple[Array, ...]:
            count = mask.sum()
            # Averaged over the trained tokens of the global batch, however they fall into microbatches and devices.
            scale = 1.0 / jnp.maximum(count, 1).astype(jnp.float32)
            norm = jnp.sqrt(sum(squares, start=jnp.float32(0))) * scale
            return total * scale, norm, scale * clip_factor(norm, self._clip_norm), count

        self._compile("finish", finish, [scalar] * (self._layers + len(masters) - 1), scalar, self._batch.mask)
        for name in masters:
            self._compile(("squares", name), lambda tree: optax.tree.norm(tree, squared=True), masters[name])
            part = (shares[name], rest[name], masters[name], masters[name])
            outputs = (*_shardings(part), self._replicated)
            change = functools.partial(update, self._optimizer)
            inputs = (number, *part, masters[name], scalar)
            self._compile(("update", name), change, *inputs, donate=(1, 2, 3, 4), outputs=outputs)
            self._compile(("zeros", name), functools.partial(zeros, masters[name]), outputs=_shardings(masters[name]))
        return time.perf_counter() - began

    def _compile(
        self, name: Any, function: Callable[..., Any], *shapes: Any, donate: Any = (), outputs: Any = None
    ) -> Any:
        """Compiles a program under a name; returns the shapes and shardings of what it returns."""
        options = {} if outputs is None else {"out_shardings": outputs}
        compiled = jax.jit(function, donate_argnums=donate, **options).lower(*shapes).compile(**self._options)
        self._programs[name] = compiled
        return with_shardings(jax.eval_shape(function, *shapes), compiled.output_shardings)

    # The step.

    def __call__(self, state: TrainState, batch: Microbatch) -> tuple[TrainState, StepMetrics]:
        """See `Step`."""
        run, numbers = self._programs, self._numbers
        params, frozen = self._used("trained", state.params), self._used("frozen", state.frozen)
        others = frozen.get("layers", [{}] * self._layers)
        gradients = {
            name: [run["zeros", name]() for _ in range(self._layers)] if name == "layers" else run["zeros", name]()
            for name in params
        }
        total = jax.device_put(np.float32(0), self._replicated)
        for microbatch in range(batch.tokens.shape[0]):
            # Calls queued further ahead than the backward pass before would wait for memory, and not for long.
            jax.block_until_ready(total)
            rows, row, x = run["start"]({**params, **frozen}["embed_tokens"], batch, numbers[microbatch])
            kept: list[Any] = []
            leaving: list[Any] = []
            room = self._layers - self._remat.count("offload")
            for number, policy in enumerate(self._remat):
                if number >= room:
                    jax.block_until_ready(leaving[number - room])  # its place on the device is this layer's
                y, saved = run["forward", policy](params["layers"][number], others[number], numbers[number], x, row)
                kept.append([x, saved])
                if policy == "offload":
                    kept[number] = jax.device_put(kept[number], self._kept_at[1])
                    leaving.append(kept[number])
                x = y
            leaving.clear()
            trained, fixed, sums = (head_parameters(tree, self._tied) for tree in (params, frozen, gradients))
            total, sums, d_x = run["head"](trained, fixed, x, rows, sums, total)
            gradients.update(sums)
            del x, y, saved, sums
            for number in reversed(range(self._layers + IN_FLIGHT)):
                ahead = number - IN_FLIGHT
                if ahead >= 0 and self._remat[ahead] == "offload":
                    kept[ahead] = _moved(kept[ahead], self._kept_at[0])
                if number >= self._layers:
                    continue
                x, saved = kept.pop()
                gradients["layers"][number], d_x = run["backward", self._remat[number]](
                    gradients["layers"][number],
                    d_x,
                    params["layers"][number],
                    others[number],
                    numbers[number],
                    x,
                    row,
                    saved,
                )
                del x, saved
            if "embed_tokens" in gradients:
                gradients["embed_tokens"] = run["embed_backward"](gradients["embed_tokens"], rows.tokens, d_x)
            del d_x
        del params, frozen, others
        squares = [run["squares", name](_part(gradients, place)) for name, place in self._places()]
        loss, norm, scale, count = run["finish"](squares, total, batch.mask)
        state, parameter_norm = self._update(state, gradients, scale)
        return state, StepMetrics(loss, norm, parameter_norm, count)

    def _used(self, kind: str, tree: Tree) -> Tree:
        """Parameters as the layers take them: whole, where they are brought together once a step."""
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
        """The parts that are updated one after the other: name of the part's programs, place in the trees."""
        for name in self._masters:
            if name == "layers":
                yield from ((name, (name, number)) for number in range(self._layers))
            else:
                yield name, (name,)

    def _update(self, state: TrainState, gradients: Tree, scale: Array) -> tuple[TrainState, Array]:
        """Updates part by part. What lies in host memory comes in ahead of its turn and goes out behind it."""
        trees = [{**tree, "layers": list(tree["layers"])} for tree in state[1:5]]
        places = list(self._places())
        coming: dict[int, Any] = {}
        leaving: list[Any] = []
        squares = []

        def fetch(turn: int) -> None:
            if turn < len(places):
                name, place = places[turn]
                coming[turn] = [_part(tree, place) for tree in trees[1:]]
                if self._on_host:
                    at = self._optimizer_shardings(name, host=False)
                    coming[turn] = _moved(coming[turn], at)

        for turn in range(IN_FLIGHT):
            fetch(turn)
        jax.block_until_ready(scale)  # what the backward pass kept is free from here on
        for turn, (name, place) in enumerate(places):
            rest, mu, nu = coming.pop(turn)
            *new, square = self._programs["update", name](
                state.step, _part(trees[0], place), rest, mu, nu, _part(gradients, place), scale
            )
            _set_part(gradients, place, None)
            del rest, mu, nu
            squares.append(square)
            if self._on_host:
                new[1:] = _moved(new[1:], self._optimizer_shardings(name, host=True))
                leaving.append(new[1:])
                if len(leaving) > IN_FLIGHT:
                    jax.block_until_ready(leaving.pop(0))  # or the device would fill up with parts that wait to leave
            for tree, value in zip(trees, new, strict=True):
                _set_part(tree, place, value)
            fetch(turn + IN_FLIGHT)
        norm = jnp.sqrt(jnp.stack(squares).sum())
        return TrainState(state.step + 1, *trees, state.frozen), norm

    @functools.cache  # noqa: B019 - lives as long as the run
    def _optimizer_shardings(self, name: str, *, host: bool) -> Any:
        """Shardings of one part's rest, mu and nu."""
        at = _shardings(self._masters[name])
        halves = jax.eval_shape(lambda tree: split_tree(tree, self._dtype)[1], self._masters[name])
        rest = jax.tree.map(lambda leaf, sharding: sharding if leaf.size else self._replicated, halves, at)
        kind = _HOST if host else "device"
        return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), [rest, at, at])

    # To and from checkpoints, in which the layers are stacked.

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
        # The moments come when the stacked parameters are gone: the device may not have room for both.
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
        return TrainState(jax.device_put(np.int32(step), self._replicated), *trees, fixed)

    def saved(self, state: TrainState) -> Saved:
        """See `Step`."""
        whole = jax.jit(lambda params, rest: jax.tree.map(join, params, rest))

        def master(name: str, params: Tree, rest: Tree) -> Tree:
            return whole(params, jax.device_put(rest, self._optimizer_shardings(name, host=False)[0]))

        def stacked(at: Tree, part: Callable[..., Tree], *trees: dict[str, Any]) -> Tree:
            out = {}
            for name, to in _shardings(at).items():
                if name == "layers":
                    layers = zip(*(tree[name] for tree in trees), strict=True)
                    out[name] = jax.tree.map(_stacked, to, *(jax.tree.map(_Shards, part(name, *x)) for x in layers))
                else:
                    out[name] = jax.device_put(part(name, *(tree[name] for tree in trees)), to)
            return out

        def moment(name: str, tree: Tree) -> Tree:
            return tree

        moments = {key: stacked(at, moment, getattr(state, key)) for key, at in self.abstract.optimizer.items()}
        return Saved(stacked(self.abstract.params, master, state.params, state.rest), moments)


class _Shards:
    """The parts of an array that this process holds, in NumPy: a leaf to JAX, by device."""

    def __init__(self, array: Array):
        self.shape = array.shape
        self.by_device = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}


def _stacked(at: NamedSharding, *layers: _Shards) -> Array:
    """One array from those of all layers, stacked in host memory."""
    pieces = [
        jax.device_put(
            np.stack([layer.by_device[device] for layer in layers]),
            jax.sharding.SingleDeviceSharding(device, memory_kind=at.memory_kind),
        )
        for device in layers[0].by_device
    ]
    return jax.make_array_from_single_device_arrays((len(layers), *layers[0].shape), at, pieces)


def _layer_of(leaf: Array, number: int, at: NamedSharding) -> Array:
    """One layer of a stacked array, on the device."""
    if leaf.sharding.memory_kind != _HOST:
        return jax.device_put(leaf[number], at)
    pieces = [jax.device_put(np.asarray(shard.data)[number], shard.device) for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape[1:], at, pieces)


def _unstacked(tree: Tree, place: tuple[Any, ...], parts: Tree) -> Tree:
    """One part of a tree with stacked layers, on the device."""
    at = _shardings(parts[place[0]])
    if len(place) == 1:
        return jax.device_put(tree[place[0]], at)
    return jax.tree.map(lambda leaf, to: _layer_of(leaf, place[1], to), tree[place[0]], at)


def _whole(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A parameter that the devices of the axes fsdp and context each have all of."""
    shared = spec("embed")[0]
    at = NamedSharding(
        leaf.sharding.mesh, PartitionSpec(*(None if axes == shared else axes for axes in leaf.sharding.spec))
    )
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)


def _same(tree: Tree) -> Tree:
    return tree


def _shardings(shapes: Tree) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def _moved(tree: Tree, shardings: Tree) -> Tree:
    """Copies arrays to another memory; where they were is free as soon as that is done."""
    copies = jax.device_put(tree, shardings)
    jax.tree.map(lambda leaf: leaf.delete(), tree)
    return copies


def _part(tree: Tree, place: tuple[Any, ...]) -> Tree:
    for key in place:
        tree = tree[key]
    return tree


def _set_part(tree: Tree, place: tuple[Any, ...], value: Any) -> None:
    _part(tree, place[:-1])[place[-1]] = value
