"""The optimizer step as one program per layer, called from Python; for GPUs.

It has three advantages over one program that scans the layers. Parameters, gradients and residuals have their own
buffers, which matrix products read and write without a copy. Each layer can keep different residuals. The optimizer's
state can stay in host memory and pass through the device a few layers at a time; in one program, XLA would have to
schedule that. The device does not wait for Python, which queues calls much faster than the device runs them.

`Layerwise.compile` settles a `Schedule`, and `Layerwise.__call__` follows it. What a layer keeps for its backward pass
is its input and its residuals. A part of a tree is one layer, or any other top-level entry such as the embedding.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from eabf_jax.model.llama import Llama, Row
from eabf_jax.model.lora import split_trained
from eabf_jax.parallel.rules import parameter_shardings, spec, with_shardings
from eabf_jax.training.backward import Microbatch, Pieces, Tree, add, head_parameters, remat_by_layer, zeros
from eabf_jax.training.host_memory import (
    IN_FLIGHT,
    OptimizerStream,
    Shards,
    device_bytes,
    layer_of,
    moved,
    on_host,
    stacked,
)
from eabf_jax.training.master import join, split_tree
from eabf_jax.training.recipe import ComputeConfig
from eabf_jax.training.step import Saved, StepMetrics, TrainState, clip_factor, narrowed, update

Path = tuple[Any, ...]  # of a part: ("layers", index) or (name,)


@dataclass(frozen=True)
class Schedule:
    """Everything that the loop of a step follows, settled before the first step."""

    programs: Mapping[Any, Any]  # compiled; the key is a name, where there are several with a policy or a part's name
    parts: tuple[Path, ...]  # of the trained parameters, in the order of their update
    indices: tuple[Array, ...]  # 0, 1, … on the device, for layers and for microbatches
    policies: tuple[str, ...]  # by layer, a name in `REMAT_POLICIES`
    kept_bytes: Mapping[str, int]  # by policy, the size on one device of what a layer keeps
    kept_on_device: Any  # shardings of what an offloaded layer keeps, before it leaves and after it returns
    kept_on_host: Any  # its shardings in between
    freed_bytes: int  # what a backward pass frees on one device for the optimizer's state
    optimizer_on_device: Mapping[str, Any]  # by a part's name, shardings of its master rest, mu and nu in the update
    optimizer_on_host: Mapping[str, Any] | None  # its shardings between steps; None: it stays on the device


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
        """Settles shapes and shardings; arguments and errors are those of `step.Program`."""
        self._optimizer, self._clip_norm, self._batch = optimizer, clip_norm, batch
        self._dtype = jnp.dtype(compute.dtype)
        self._policies = remat_by_layer(compute.remat, model.config.num_hidden_layers)
        self._gathered = compute.gather == "step" and mesh.shape["fsdp"] * mesh.shape["context"] > 1
        self._pieces = Pieces(model, compute.loss_chunk, mesh, wide=mesh.size == 1, gathered=self._gathered)
        self._tied = model.config.tie_word_embeddings
        self._replicated = NamedSharding(mesh, PartitionSpec())
        params = model.parameters()
        masters, frozen = split_trained(with_shardings(params, parameter_shardings(mesh, params)), model.lora)
        frozen = narrowed(frozen, self._dtype)

        def in_host_memory(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_host(leaf.sharding))

        def one_layer(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            at = NamedSharding(mesh, PartitionSpec(*leaf.sharding.spec[1:]))
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=at)

        def by_part(tree: Tree) -> Tree:
            return {**tree, "layers": jax.tree.map(one_layer, tree["layers"])} if tree else {}

        def optimizer_shardings(part: Tree) -> list[Any]:
            at, rest = _shardings(part), jax.eval_shape(lambda tree: split_tree(tree, self._dtype)[1], part)
            return [jax.tree.map(lambda leaf, to: to if leaf.size else self._replicated, rest, at), at, at]

        # Stacked moments and frozen layers pass through host memory, because the device has no room for them next to
        # the same arrays by layer.
        moments = jax.tree.map(in_host_memory, masters)
        self.abstract = Saved(masters, {"mu": moments, "nu": moments})
        self.frozen = {**frozen, "layers": jax.tree.map(in_host_memory, frozen["layers"])} if frozen else {}
        # Shapes by a part's name: all layers have the same.
        self._masters, self._frozen = by_part(masters), by_part(frozen)
        self._parts: list[Path] = []
        for name in masters:
            self._parts += [(name, index) for index in range(len(self._policies))] if name == "layers" else [(name,)]
        self._optimizer_on_device = {name: optimizer_shardings(part) for name, part in self._masters.items()}
        streaming = compute.optimizer_memory == "host"
        self._optimizer_on_host = jax.tree.map(on_host, self._optimizer_on_device) if streaming else None
        # Collectives overlap with computation only under this scheduler; a single device has no collectives.
        overlap = mesh.size > 1 and mesh.devices.flat[0].platform == "gpu"
        self._options: Any = {"compiler_options": {"xla_gpu_enable_latency_hiding_scheduler": True}} if overlap else {}
        self._programs: dict[Any, Any] = {}
        self._schedule: Schedule
        # What a step leaves to the next one: optimizer state that is still returning to the host and, for each
        # offloaded layer, an array that is ready once all that the layer keeps is back on the device.
        self._stream: OptimizerStream | None = None
        self._returned: deque[Array] = deque()

    # Programs. Each is compiled for the shapes and shardings that the previous program returns.

    def compile(self) -> float:
        """See `Step`."""
        began = time.perf_counter()
        pieces, policies, masters, frozen = self._pieces, self._policies, self._masters, self._frozen
        halves = jax.eval_shape(lambda tree: split_tree(tree, self._dtype), masters)
        params = shares = with_shardings(halves[0], _shardings(masters))
        rest = with_shardings(halves[1], {name: at[0] for name, at in self._optimizer_on_device.items()})
        if self._gathered:
            params, frozen = (jax.tree.map(_gathered, tree) for tree in (shares, self._frozen))
            for kind, before, after in (("trained", shares, params), ("frozen", self._frozen, frozen)):
                for name in before:
                    self._compile(("gather", kind, name), _same, before[name], outputs=_shardings(after[name]))
        index = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._replicated)
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._replicated)
        count = max(len(policies), self._batch.tokens.shape[0])
        indices = tuple(jax.device_put(np.int32(i), self._replicated) for i in range(count))

        def start(embedding: Tree, batch: Microbatch, index: Array) -> tuple[Any, ...]:
            rows = jax.tree.map(lambda array: array[index], batch)
            return rows, pieces.row(rows), pieces.embed(embedding, rows.tokens)

        rows, row, x = self._compile("start", start, {**params, **frozen}["embed_tokens"], self._batch, index)
        layer = (params["layers"], frozen.get("layers", {}), index)
        residuals, kept_bytes = {}, {}
        for policy in dict.fromkeys(policies):
            forward = functools.partial(pieces.forward, policy)
            x, residuals[policy] = self._compile(("forward", policy), forward, *layer, x, row)
            kept_bytes[policy] = device_bytes((x, residuals[policy]))
        kept_on_device = _shardings([x, residuals.get("offload", [])])
        staying = sum(kept_bytes[policy] for policy in policies if policy != "offload")
        returning = min(policies.count("offload"), IN_FLIGHT + 1) * kept_bytes.get("offload", 0)

        def head(*inputs: Any) -> tuple[Any, ...]:
            loss, gradients, d_x = pieces.head(*inputs[:-1])
            return inputs[-1] + loss, gradients, d_x

        *of_head, gradients = (head_parameters(tree, self._tied) for tree in (params, frozen, masters))
        _, _, d_x = self._compile("head", head, *of_head, x, rows, gradients, scalar, donate=(4, 5))
        for policy in residuals:

            def backward(gradients: Tree, d_y: Array, *inputs: Any, policy: str = policy) -> tuple[Tree, Array]:
                d_layer, d_x = pieces.backward(policy, *(*inputs, d_y))
                # The compiler would split the gradient of a norm over all heads as it splits the heads.
                sums = jax.lax.with_sharding_constraint(add(gradients, d_layer), _shardings(masters["layers"]))
                return sums, d_x

            kept = (x, row, residuals[policy])
            self._compile(("backward", policy), backward, masters["layers"], d_x, *layer, *kept, donate=(0, 1))
        if "embed_tokens" in masters:
            embedding = (masters["embed_tokens"], rows.tokens, d_x)
            self._compile("embed_backward", pieces.embed_backward, *embedding, donate=0)

        def finish(squares: list[Array], total: Array, mask: Array) -> tuple[Array, ...]:
            count = mask.sum()
            # Averaged over the trained tokens of the global batch, however microbatches and devices split them.
            scale = 1.0 / jnp.maximum(count, 1).astype(jnp.float32)
            norm = jnp.sqrt(sum(squares, start=jnp.float32(0))) * scale
            return total * scale, norm, scale * clip_factor(norm, self._clip_norm), count

        self._compile("finish", finish, [scalar] * len(self._parts), scalar, self._batch.mask)
        for name in masters:
            self._compile(("squares", name), lambda tree: optax.tree.norm(tree, squared=True), masters[name])
            part = (shares[name], rest[name], masters[name], masters[name])
            outputs = (*_shardings(part), self._replicated)
            inputs = (index, *part, masters[name], scalar)
            change = functools.partial(update, self._optimizer)
            self._compile(("update", name), change, *inputs, donate=(1, 2, 3, 4), outputs=outputs)
            self._compile(("zeros", name), functools.partial(zeros, masters[name]), outputs=_shardings(masters[name]))
        self._schedule = Schedule(
            programs=self._programs,
            parts=tuple(self._parts),
            indices=indices,
            policies=policies,
            kept_bytes=kept_bytes,
            kept_on_device=kept_on_device,
            kept_on_host=jax.tree.map(on_host, kept_on_device),
            freed_bytes=max(0, staying - returning),
            optimizer_on_device=self._optimizer_on_device,
            optimizer_on_host=self._optimizer_on_host,
        )
        return time.perf_counter() - began

    def _compile(
        self, name: Any, function: Callable[..., Any], *shapes: Any, donate: Any = (), outputs: Any = None
    ) -> Any:
        """Compiles a program and stores it under a name; returns the shapes and shardings of its results."""
        options = {} if outputs is None else {"out_shardings": outputs}
        compiled = jax.jit(function, donate_argnums=donate, **options).lower(*shapes).compile(**self._options)
        self._programs[name] = compiled
        return with_shardings(jax.eval_shape(function, *shapes), compiled.output_shardings)

    # The loop.

    def __call__(self, state: TrainState, batch: Microbatch) -> tuple[TrainState, StepMetrics]:
        """See `Step`."""
        schedule, run, microbatches = self._schedule, self._schedule.programs, batch.tokens.shape[0]
        params, frozen = self._gather("trained", state.params), self._gather("frozen", state.frozen)
        frozen_layers = frozen.get("layers", [{}] * len(schedule.policies))
        layers = list(zip(params["layers"], frozen_layers, schedule.indices, strict=False))
        gradients = _tree(schedule.parts, [run["zeros", path[0]]() for path in schedule.parts])
        total = jax.device_put(np.float32(0), self._replicated)
        leaving, arriving = self._stream, _optimizer_stream(schedule, state)
        for microbatch in range(microbatches):
            # Calls queued beyond the previous backward pass would wait for memory, and the allocator soon gives up.
            jax.block_until_ready(total)
            embedding = {**params, **frozen}["embed_tokens"]
            rows, row, x = run["start"](embedding, batch, schedule.indices[microbatch])
            x, kept = self._forward(layers, x, row, leaving if microbatch == 0 else None)
            *of_head, sums = (head_parameters(tree, self._tied) for tree in (params, frozen, gradients))
            total, sums, d_x = run["head"](*of_head, x, rows, sums, total)
            gradients.update(sums)
            del x, sums
            last = microbatch == microbatches - 1
            d_x = self._backward(layers, gradients["layers"], row, kept, d_x, arriving if last else None)
            if "embed_tokens" in gradients:
                gradients["embed_tokens"] = run["embed_backward"](gradients["embed_tokens"], rows.tokens, d_x)
            del d_x
        del params, frozen, frozen_layers, layers, embedding, of_head  # gathered parameters are free from here on
        squares = [run["squares", path[0]](_part(gradients, path)) for path in schedule.parts]
        loss, norm, scale, count = run["finish"](squares, total, batch.mask)
        state, parameter_norm = _update(schedule, state, gradients, scale, arriving)
        self._stream = arriving
        return state, StepMetrics(loss, norm, parameter_norm, count)

    def _gather(self, kind: str, tree: Tree) -> Tree:
        """Returns the parameters that the layers use: gathered, if they are gathered once per step."""
        if not self._gathered:
            return tree
        run = self._schedule.programs
        return {
            name: [run["gather", kind, name](layer) for layer in part]
            if name == "layers"
            else run["gather", kind, name](part)
            for name, part in tree.items()
        }

    def _forward(
        self, layers: list[Any], x: Array, row: Row, leaving: OptimizerStream | None
    ) -> tuple[Array, list[Any]]:
        """Runs the forward pass of all layers, as the optimizer state in `leaving` makes room for them.

        Returns:
          The last layer's output, and what each layer keeps.
        """
        schedule = self._schedule
        kept: list[Any] = []
        offloaded: list[Any] = []
        kept_bytes = 0
        staying = len(layers) - schedule.policies.count("offload")
        for index, policy in enumerate(schedule.policies):
            if 0 <= index - staying < len(offloaded):
                jax.block_until_ready(offloaded[index - staying])  # this layer needs the device memory that it frees
            kept_bytes += schedule.kept_bytes[policy]
            if leaving:  # waits only until enough of the state has left for this layer to fit
                leaving.drain(max(0, schedule.freed_bytes - kept_bytes))
            y, residuals = schedule.programs["forward", policy](*layers[index], x, row)
            kept.append([x, residuals])
            if policy == "offload":
                if self._returned:  # the previous microbatch no longer uses this much host memory
                    jax.block_until_ready(self._returned.popleft())
                kept[index] = jax.device_put(kept[index], schedule.kept_on_host)
                offloaded.append(kept[index])
            x = y
        return x, kept

    def _backward(
        self,
        layers: list[Any],
        gradients: list[Tree],
        row: Row,
        kept: list[Any],
        d_x: Array,
        arriving: OptimizerStream | None,
    ) -> Array:
        """Runs all backward passes, last layer first; adds to `gradients`, and grants `arriving` the freed memory."""
        schedule = self._schedule
        freed = 0
        for index in reversed(range(len(layers) + IN_FLIGHT)):
            ahead = index - IN_FLIGHT
            if ahead >= 0 and schedule.policies[ahead] == "offload":
                kept[ahead] = moved(kept[ahead], schedule.kept_on_device)
                # The smallest array, because it stays on the device until a later forward pass has waited for it.
                self._returned.append(min(jax.tree.leaves(kept[ahead]), key=device_bytes))
            if index >= len(layers):
                continue
            policy, (x, residuals) = schedule.policies[index], kept.pop()
            freed += 0 if policy == "offload" else schedule.kept_bytes[policy]
            gradients[index], d_x = schedule.programs["backward", policy](
                gradients[index], d_x, *layers[index], x, row, residuals
            )
            del x, residuals
            if arriving:  # a quarter stays free, because the arriving parts have other sizes than the freed buffers
                arriving.grant(min(freed, 3 * schedule.freed_bytes // 4) - arriving.granted)
        return d_x

    # Conversion to and from checkpoints, in which the layers are stacked.

    def begin(self, params: Tree, frozen: Tree | None = None) -> TrainState:
        """See `Step`."""
        return self._state(0, params, None, frozen or {})

    def restored(self, step: int, saved: Saved, frozen: Tree | None = None) -> TrainState:
        """See `Step`."""
        return self._state(step, saved.params, saved.optimizer, frozen or {})

    def _state(self, step: int, masters: Tree, moments: Tree | None, frozen: Tree) -> TrainState:
        halves = jax.jit(lambda tree: split_tree(tree, self._dtype))
        optimizer_at = self._optimizer_on_host or self._optimizer_on_device
        no_moments = {
            name: jax.jit(functools.partial(zeros, shapes), out_shardings=_shardings(shapes))
            for name, shapes in self._masters.items()
        }

        def master(path: Path) -> tuple[Tree, Tree]:
            at = _shardings(self._masters[path[0]])
            params, rest = halves(_unstacked(masters, path, at))
            return jax.device_put(params, at), jax.device_put(rest, optimizer_at[path[0]][0])

        def moment(key: str, path: Path, to: Tree) -> Tree:
            at = _shardings(self._masters[path[0]])
            return jax.device_put(_unstacked(moments[key], path, at) if moments else no_moments[path[0]](), to)

        pairs = [master(path) for path in self._parts]
        # The moments follow once the stacked parameters are freed, because the device may not have room for both.
        jax.block_until_ready(pairs)
        jax.tree.map(lambda leaf: leaf.delete(), masters["layers"])
        more = [
            [moment(key, path, to) for key, to in zip(("mu", "nu"), optimizer_at[path[0]][1:], strict=True)]
            for path in self._parts
        ]
        jax.block_until_ready(more)
        at = _shardings(self._frozen)
        fixed = {name: _unstacked(frozen, (name,), at[name]) for name in frozen if name != "layers"}
        if frozen:
            fixed["layers"] = [_unstacked(frozen, ("layers", i), at["layers"]) for i in range(len(self._policies))]
        trees = (_tree(self._parts, parts) for parts in (*zip(*pairs, strict=True), *zip(*more, strict=True)))
        return TrainState(*(jax.device_put(np.int32(step), self._replicated), *trees, fixed))

    def saved(self, state: TrainState, *, moments: bool = True) -> Saved:
        """See `Step`."""
        whole = jax.jit(lambda params, rest: jax.tree.map(join, params, rest))

        def master(path: Path) -> Tree:
            rest = jax.device_put(_part(state.rest, path), self._optimizer_on_device[path[0]][0])
            return whole(_part(state.params, path), rest)

        def stack(shapes: Tree, parts: Iterator[Tree]) -> Tree:
            out = {}
            for name, at in _shardings(shapes).items():
                if name == "layers":
                    layers = [jax.tree.map(Shards, next(parts)) for _ in self._policies]
                    out[name] = jax.tree.map(stacked, at, *layers)
                else:
                    out[name] = jax.device_put(next(parts), at)
            return out

        optimizer = {
            key: stack(shapes, (_part(getattr(state, key), path) for path in self._parts))
            for key, shapes in (self.abstract.optimizer if moments else {}).items()
        }
        return Saved(stack(self.abstract.params, map(master, self._parts)), optimizer)


def _optimizer_stream(schedule: Schedule, state: TrainState) -> OptimizerStream | None:
    """Prepares to stream the optimizer's state, if it lies in host memory."""
    if schedule.optimizer_on_host is None:
        return None
    parts = [[_part(tree, path) for tree in (state.rest, state.mu, state.nu)] for path in schedule.parts]
    device, host = (
        [at[path[0]] for path in schedule.parts] for at in (schedule.optimizer_on_device, schedule.optimizer_on_host)
    )
    return OptimizerStream(parts, device, host)


def _update(
    schedule: Schedule, state: TrainState, gradients: Tree, scale: Array, stream: OptimizerStream | None
) -> tuple[TrainState, Array]:
    """Updates the parameters part by part; returns the new state and the parameters' norm."""
    if stream:
        jax.block_until_ready(scale)  # from here on, the memory of what the layers kept is free
        stream.grant_least()
    updated, squares = [], []
    for path in schedule.parts:
        params, *optimizer = (_part(tree, path) for tree in state[1:5])
        if stream:
            optimizer = stream.take()
        gradient = _part(gradients, path)
        *new, square = schedule.programs["update", path[0]](state.step, params, *optimizer, gradient, scale)
        _part(gradients, path[:-1])[path[-1]] = gradient = None
        squares.append(square)
        updated.append([new[0], *stream.give(new[1:])] if stream else new)
    norm = jnp.sqrt(jnp.stack(squares).sum())
    trees = (_tree(schedule.parts, parts) for parts in zip(*updated, strict=True))
    return TrainState(*(state.step + 1, *trees, state.frozen)), norm


def _unstacked(tree: Tree, path: Path, at: Tree) -> Tree:
    """Copies one part of a tree with stacked layers to the device."""
    if len(path) == 1:
        return jax.device_put(tree[path[0]], at)
    return jax.tree.map(lambda leaf, to: layer_of(leaf, path[1], to), tree[path[0]], at)


def _gathered(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
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


def _part(tree: Tree, path: Path) -> Tree:
    for key in path:
        tree = tree[key]
    return tree


def _tree(paths: Iterable[Path], parts: Iterable[Tree]) -> dict[str, Any]:
    """Builds a tree from its parts."""
    tree: dict[str, Any] = {}
    for (name, *layer), part in zip(paths, parts, strict=True):
        if layer:
            tree.setdefault(name, []).append(part)
        else:
            tree[name] = part
    return tree
