"""Predicts a train step's memory per device from shapes alone, and finds settings with which the step fits.

All amounts are bytes on one device, or in its share of the host's memory.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from eabf_jax.errors import InputError
from eabf_jax.hardware import GIB, PINNED_LIMIT, PINNED_SHARE, Device
from eabf_jax.model.attention import needs_of, select
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.lora import Lora, adapters, split_trained
from eabf_jax.model.parameters import nest, parameters
from eabf_jax.parallel.mesh import MeshConfig
from eabf_jax.parallel.rules import LOGICAL_TO_MESH, check_tensor_axis, parameter_shardings
from eabf_jax.training.backward import remat_by_layer
from eabf_jax.training.host_memory import IN_FLIGHT
from eabf_jax.training.recipe import TrainConfig
from eabf_jax.training.tracking import flops_per_token

# Remat policies in order of memory, least first. `offload` is `dots` in host memory; `none` is for tiny models.
_KEEPING = ("full", "attention", "qkv", "dots")
# The smallest policy that keeps a projection's result, if it is not `dots`; the backward pass needs no down_proj's.
_NEVER = "never"
_KEPT_BY = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "down_proj": _NEVER}
# Measured on one H100: the fraction of peak FLOP/s that a layer's matrix products and attention reach, and bytes/s
# between a GPU and its host, in one direction and in both directions together.
EFFICIENCY, _ONE_WAY, _BOTH_WAYS = 0.66, 53e9, 84e9
# `auto` leaves this fraction of memory free, because the prediction is not exact and allocators leave gaps.
_SPARE = 0.03
# XLA's pool of host memory grows by powers of two; this fraction of it can be filled.
_POOL = 0.85


@dataclass(frozen=True)
class Plan:
    """A run with nothing left open, and the predicted memory use of its step at the peak."""

    config: TrainConfig  # nothing in `compute` but the executor is `auto`
    model_config: LlamaConfig
    device: Device
    mesh: Mapping[str, int]
    microbatches: int
    parts: Mapping[str, float]  # bytes on one device at the step's peak
    host: Mapping[str, float]  # bytes of host memory for one device
    model_flops: float  # FLOPs of one device per optimizer step, without recomputation
    recomputed_flops: float  # FLOPs that one device repeats per optimizer step
    waiting: float  # seconds per optimizer step that the device waits for transfers to and from host memory

    @property
    def total(self) -> float:
        """Bytes on one device."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the step fits on the device and its host."""
        return self.total <= self.device.memory and sum(self.host.values()) <= _POOL * self.device.pinned_memory

    @property
    def roomy(self) -> bool:
        """Whether the step fits with a margin for errors of the prediction."""
        return self.fits and self.total <= (1 - _SPARE) * self.device.memory

    @property
    def can_checkpoint(self) -> bool:
        """Whether host memory has room for a checkpoint's float32 parameters and moments on their way to disk."""
        on_the_way = 3 * self.parts["gradients"]  # parameters and two moments, each as large as the gradients
        gpu = self.device.platform == "gpu"
        room = _POOL * self.device.pinned_memory if gpu else 0.95 * self.device.host_memory
        return sum(self.host.values()) + on_the_way <= room

    @property
    def seconds(self) -> float:
        """A rough time of the optimizer step, for comparing the plans of one run."""
        compute = (self.model_flops + self.recomputed_flops) / (EFFICIENCY * self.device.flops)
        # Every microbatch reads the parameters three times, and reads and writes the gradient sums once.
        parameters = self.parts["parameters"] + self.parts.get("frozen parameters", 0.0)
        traffic = self.microbatches * (3 * parameters + 2 * self.parts["gradients"])
        return compute + traffic / self.device.bandwidth + self.waiting


def plan(config: TrainConfig, model_config: LlamaConfig, mesh_shape: Mapping[str, int], device: Device) -> Plan:
    """Predicts the memory of a step whose settings are all given.

    Args:
      config: the run; nothing in `compute` may be `auto`.
      mesh_shape: number of devices by mesh axis.

    Raises:
      InputError: the mesh does not divide the model or the batch; an unknown remat policy.
    """
    compute = config.compute
    policies = remat_by_layer(compute.remat, model_config.num_hidden_layers)
    step = _Step.of(config, model_config, mesh_shape, int(compute.microbatch_size))
    ways = mesh_shape["data"] * mesh_shape["fsdp"]
    if config.recipe.batch_size % (ways * step.rows):
        raise InputError(
            f"recipe.batch_size {config.recipe.batch_size} is not divisible by compute.microbatch_size {step.rows} x "
            f"{ways} devices of the mesh axes data and fsdp"
        )
    microbatches = config.recipe.batch_size // (ways * step.rows)
    counts, layers = step.counts, model_config.num_hidden_layers
    held, layer = _held(counts.trained, compute.dtype), _held(counts.trained_in_layers / layers, compute.dtype)
    optimizer = {name: held[name] for name in _OPTIMIZER}
    on_host, gathered_once = compute.optimizer_memory == "host", compute.gather == "step"
    rate = EFFICIENCY * device.flops

    gathered_layers, gathered_head = step.gathered_layers, step.gathered_head
    if gathered_once:
        gathered_layers = gathered_head = step.gathered_step
    # (kept activations, gathered parameters, workspace) of each phase. A layer's backward pass frees what it kept.
    phases = []
    forward_seconds = step.tokens * step.forward_flops / rate
    kept = leaving = offloaded = 0.0
    for policy in policies:
        size = step.kept(policy)
        if policy == "offload":
            offloaded, leaving = offloaded + size, leaving + size
        else:
            kept += size
        phases.append((kept + leaving, gathered_layers, step.forward_workspace))
        leaving = max(0.0, leaving - _ONE_WAY * forward_seconds)
    phases.append((kept + leaving, gathered_head, step.head_workspace))
    waiting = microbatches * leaving / _ONE_WAY
    for index in reversed(range(len(policies))):
        back = sum(
            step.kept(policy) for policy in policies[max(0, index - IN_FLIGHT) : index + 1] if policy == "offload"
        )
        phases.append((kept + back, gathered_layers, step.layer_workspace(policies[index])))
        kept -= step.kept(policies[index]) if policies[index] != "offload" else 0.0
    # Offloaded activations return during the backward pass, which takes about twice as long as the forward pass.
    waiting += microbatches * max(0.0, offloaded / _ONE_WAY - 2 * len(policies) * forward_seconds)
    # While one layer is updated, the state of the next layers arrives from the host and that of the last layers leaves.
    # The gradients of updated layers are already freed.
    passing = (2 * IN_FLIGHT + 1) * sum(layer[name] for name in _OPTIMIZER) - (IN_FLIGHT + 1) * layer["gradients"]
    phases.append((0.0, 0.0, passing if on_host else 0.0))
    waiting += 2 * sum(optimizer.values()) / _BOTH_WAYS if on_host else 0.0
    activations, gathered, workspace = max(phases, key=sum)
    return Plan(
        config=_with_compute(
            config,
            optimizer_memory="host" if on_host else "device",
            gather="step" if gathered_once else "layer",
        ),
        model_config=model_config,
        device=device,
        mesh=dict(mesh_shape),
        microbatches=microbatches,
        parts={
            "parameters": held["parameters"],
            **({"frozen parameters": step.bytes * counts.frozen} if counts.frozen else {}),
            **({} if on_host else optimizer),
            "gradients": held["gradients"],
            "kept activations": activations,
            "gathered parameters": gathered,
            "workspace": workspace,
        },
        host={**(optimizer if on_host else {}), **({"kept activations": offloaded} if offloaded else {})},
        model_flops=microbatches
        * step.tokens
        * flops_per_token(model_config, config.window, config.lora)
        / mesh_shape["tensor"],
        recomputed_flops=microbatches * step.tokens * sum(step.recomputed_flops(policy) for policy in policies),
        waiting=waiting,
    )


_OPTIMIZER = ("master rest", "moments")


def _held(parameters: float, dtype: str) -> dict[str, float]:
    """Returns the bytes of state for a number of parameters; see `master.split`."""
    narrow = jnp.dtype(dtype).itemsize
    rest = {"bfloat16": 2, "float16": 4, "float32": 0}[dtype]
    return {
        "parameters": narrow * parameters,
        "master rest": rest * parameters,
        "moments": 8 * parameters,
        "gradients": 4 * parameters,
    }


@dataclass(frozen=True)
class _Step:
    """Sizes of one device's part of a microbatch, and the memory and FLOPs that follow from them."""

    rows: int
    length: int  # tokens of a row on this device
    window: int  # tokens of the whole row
    bytes: int  # bytes of one number in the compute dtype
    hidden: int
    wide: int
    query: int
    key_value: int
    heads: int
    projections: Mapping[str, tuple[int, int]]  # from `_projections`
    vocabulary: int
    chunk: int  # tokens of a row whose logits are in memory at a time
    counts: "_Counts"
    layers: int
    shared: int  # devices that a layer's parameters are sharded over and gathered from
    head_is_trained: bool

    @classmethod
    def of(cls, config: TrainConfig, model_config: LlamaConfig, mesh: Mapping[str, int], rows: int) -> "_Step":
        tensor, context = mesh["tensor"], mesh["context"]
        if config.window % context:
            raise InputError(f"window {config.window} is not divisible by mesh context={context}")
        check_tensor_axis(tensor, model_config.num_key_value_heads)
        length = config.window // context
        tied = model_config.tie_word_embeddings
        return cls(
            rows=rows,
            length=length,
            window=config.window,
            bytes=jnp.dtype(config.compute.dtype).itemsize,
            hidden=model_config.hidden_size,
            wide=model_config.intermediate_size // tensor,
            query=model_config.num_attention_heads * model_config.head_dim // tensor,
            key_value=model_config.num_key_value_heads * model_config.head_dim // tensor,
            heads=model_config.num_attention_heads // tensor,
            projections=_projections(model_config, tensor),
            vocabulary=model_config.vocab_size // tensor,
            chunk=min(config.compute.loss_chunk, length),
            counts=_count(model_config, config.lora, tuple(mesh.items())),
            layers=model_config.num_hidden_layers,
            shared=mesh["fsdp"] * context,
            head_is_trained=config.lora is None or (tied and config.lora.train_embeddings),
        )

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def _residuals(self, policy: str) -> dict[str, float]:
        """Bytes per token of a layer's residuals under a policy, by the smallest policy that keeps them."""
        sizes = {
            "attention": self.bytes * self.query + 4 * self.heads,  # the output, and float32 log-sum-exp
            "qkv": self.bytes * self.projections["qkv"][0],
            "dots": self.bytes * self.projections["dots"][0],  # the residual stream between the halves, gate and up
        }
        if policy == "none":
            # Three float32 arrays for each of the two norms, the norms' outputs, and the arrays between gate and down.
            return {**sizes, "none": 24 * self.hidden + self.bytes * (self.hidden + self.query + 4 * self.wide)}
        policy = "dots" if policy == "offload" else policy
        return {name: sizes[name] for name in _KEEPING[1 : _KEEPING.index(policy) + 1]}

    def kept(self, policy: str) -> float:
        """Bytes of what one layer keeps for its backward pass: its input and its residuals."""
        return self.tokens * (self.bytes * self.hidden + sum(self._residuals(policy).values()))

    @property
    def _flops(self) -> dict[str, float]:
        """FLOPs per token of a layer's forward pass, by the smallest policy that keeps their result."""
        products = {policy: 2.0 * weights for policy, (_, weights) in self.projections.items()}
        return {"attention": 2.0 * self.window * self.query, **products}  # causal

    @property
    def forward_flops(self) -> float:
        """FLOPs per token of a layer's forward pass."""
        return sum(self._flops.values())

    def recomputed_flops(self, policy: str) -> float:
        """FLOPs per token that the backward pass of one layer repeats."""
        return sum(self._flops[name] for name in self._flops.keys() - self._residuals(policy).keys() - {_NEVER})

    @property
    def forward_workspace(self) -> float:
        """Bytes that a layer's forward pass needs and does not keep: the normed input, gate, up and their product."""
        return self.tokens * self.bytes * (self.hidden + 3 * self.wide) + self._tables

    def layer_workspace(self, policy: str) -> float:
        """Bytes that a layer's backward pass needs on top of what the policy keeps.

        The peak is in the MLP. It holds q, k, v, the attention output and the residual stream between the halves; the
        layer's normed input; gate, up and the gradients of gate, up and their product; and the gradients of the layer's
        output and of the normed input. Arrays that the policy keeps are not counted again.
        """
        recomputed = sum(self._residuals("dots").values()) - sum(
            size for name, size in self._residuals(policy).items() if name != "none"
        )
        gradients = self.bytes * (3 * self.hidden + 3 * self.wide)
        # Keys and values of the whole row, and their gradients, if the row is split over devices.
        row = 4 * self.bytes * self.key_value * (self.window - self.length)
        return self.tokens * (recomputed + gradients) + self.rows * row + self._tables

    @property
    def _tables(self) -> float:
        """Bytes of cosines and sines, and of the gradient passed from layer to layer."""
        return self.tokens * (4 * self.query / self.heads + self.bytes * self.hidden)

    @property
    def gathered_layers(self) -> float:
        """Bytes of a layer's gathered parameters, and of its gradients before they are scattered."""
        counts = self.counts
        one = (2 * counts.trained_in_layers + counts.frozen_in_layers) / self.layers
        return self.bytes * self.shared * one if self.shared > 1 else 0.0

    @property
    def gathered_step(self) -> float:
        """Bytes of all parameters, gathered once per step, and of one layer's gradients."""
        counts = self.counts
        number = counts.trained + counts.frozen + counts.trained_in_layers / self.layers
        return self.bytes * self.shared * number if self.shared > 1 else 0.0

    @property
    def gathered_head(self) -> float:
        """Bytes of the gathered output kernel, if it is sharded."""
        return self.bytes * self.hidden * self.vocabulary if self.shared > 1 else 0.0

    @property
    def head_workspace(self) -> float:
        """Bytes of the loss: one chunk's logits and their gradient, and the gradients of kernel and hidden states."""
        logits = self.rows * self.chunk * self.vocabulary * (4 + 4 + self.bytes)
        kernel = 4 * self.hidden * self.vocabulary if self.head_is_trained else 0
        return logits + kernel + 2 * self.bytes * self.tokens * self.hidden + self._tables


@functools.lru_cache(maxsize=64)
def _projections(model_config: LlamaConfig, tensor: int) -> dict[str, tuple[int, int]]:
    """Returns the numbers per token that a layer's projections give and their weights, by the policy in `_KEPT_BY`."""
    found: dict[str, tuple[int, int]] = {}
    for kernel in parameters(model_config):
        if kernel.layers and kernel.entry.leaf == "kernel":
            ways = [tensor if LOGICAL_TO_MESH[axis] == "tensor" else 1 for axis in kernel.entry.axes]
            wide_in, wide_out = (size // part for size, part in zip(kernel.unstacked, ways, strict=True))
            policy = _KEPT_BY.get(kernel.path[-2], "dots")
            results, weights = found.get(policy, (0, 0))
            found[policy] = results + wide_out, weights + wide_in * wide_out
    return found


class _Counts(NamedTuple):
    """Trained and frozen parameters on one device, and how many of each are in layers."""

    trained: float
    trained_in_layers: float
    frozen: float
    frozen_in_layers: float


@functools.lru_cache(maxsize=64)
def _count(model_config: LlamaConfig, lora: Lora | None, mesh: tuple[tuple[str, int], ...]) -> _Counts:
    names, sizes = zip(*mesh, strict=True)
    abstract = AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    entries = (*parameters(model_config), *adapters(model_config, lora))
    params = nest({entry.path: jax.ShapeDtypeStruct(entry.shape, jnp.float32) for entry in entries})
    shardings = parameter_shardings(abstract, params)  # type: ignore[arg-type]  # shapes need no devices
    shares = jax.tree.map(lambda leaf, at: float(math.prod(at.shard_shape(leaf.shape))), params, shardings)
    parts = split_trained(shares, lora)
    return _Counts(*(sum(jax.tree.leaves(tree)) for part in parts for tree in (part, part.get("layers", {}))))


def choose(config: TrainConfig, model_config: LlamaConfig, mesh_shape: Mapping[str, int], device: Device) -> Plan:
    """Chooses the `compute` settings that are `auto`: `microbatch_size`, `remat`, `optimizer_memory` and `gather`.

    Takes the fastest settings by `Plan.seconds` among those that fit with a margin. If none fit, takes the smallest
    and leaves it to `check` to refuse them.

    Raises:
      InputError: as for `plan`.
    """
    candidates = list(_candidates(config, model_config, mesh_shape, device))
    roomy = [found for found in candidates if found.roomy]
    if roomy:
        best = min(roomy, key=lambda found: (found.seconds, sum(found.host.values())))
        if config.compute.gather == "auto" and device.platform == "gpu":
            once = plan(_with_compute(best.config, gather="step"), model_config, mesh_shape, device)
            best = once if once.roomy else best
        return best
    return min(candidates, key=lambda found: found.total)


def _candidates(
    config: TrainConfig, model_config: LlamaConfig, mesh_shape: Mapping[str, int], device: Device
) -> Iterator[Plan]:
    compute: Any = config.compute
    memories = [compute.optimizer_memory]
    streaming = _streaming(config, device)
    if compute.optimizer_memory == "auto":
        memories = ["device", "host"] if streaming else ["device"]
    remats = [compute.remat]
    if compute.remat == "auto":
        remats = list(_remats(model_config.num_hidden_layers, streaming=streaming))
    sizes = [compute.microbatch_size]
    if compute.microbatch_size == "auto":
        sizes = _microbatch_sizes(config, mesh_shape)
    for memory in memories:
        for rows in sizes:
            for remat in remats:
                settled = _with_compute(config, optimizer_memory=memory, remat=remat, microbatch_size=rows)
                yield plan(settled, model_config, mesh_shape, device)


def _streaming(config: TrainConfig, device: Device) -> bool:
    """Returns whether the step's executor can keep arrays in host memory."""
    executor = config.compute.executor
    return executor == "layerwise" or (executor == "auto" and device.platform == "gpu")


def _remats(layers: int, *, streaming: bool) -> Iterator[str]:
    """Yields every policy, and every mix of two policies in which the first layers keep more or use host memory."""
    keeping = (*_KEEPING, "offload") if streaming else _KEEPING
    yield from keeping
    for less, more in itertools.combinations(keeping, 2):
        for count in range(1, layers):
            yield f"{more}:{count},{less}"


# This many tokens at a time keep a device busy; its remaining memory is better spent otherwise.
_MOST_TOKENS = 32768


def _microbatch_sizes(config: TrainConfig, mesh_shape: Mapping[str, int]) -> list[int]:
    """Returns the microbatch sizes to try: divisors of a device's rows, within `_MOST_TOKENS`."""
    rows = max(1, config.recipe.batch_size // (mesh_shape["data"] * mesh_shape["fsdp"]))
    most = max(1, _MOST_TOKENS * mesh_shape["context"] // config.window)
    return [size for size in range(1, min(rows, most) + 1) if rows % size == 0]


def _with_compute(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, **changes))


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Yields every mesh of `devices` devices without replicas, as sizes by axis, simplest first."""
    for tensor, context in itertools.product((1, 2, 4, 8), (2**power for power in range(9))):
        if devices % (tensor * context) == 0:
            yield {"data": 1, "fsdp": devices // (tensor * context), "context": context, "tensor": tensor}


def mesh_plans(config: TrainConfig, model_config: LlamaConfig, devices: int, device: Device) -> Iterator[Plan]:
    """Yields a plan for every mesh that divides model, batch and window, simplest first, whatever `config.mesh` is."""
    dtype = jnp.dtype(config.compute.dtype)
    needs = needs_of(model_config)
    backend = select(config.compute.attention, dtype, model_config.head_dim, device.platform, needs=needs)
    for sizes in meshes(devices):
        # Each device holds two chunks of a row.
        chunks = 2 * sizes["context"] * backend.chunk_multiple
        whole_rows = config.recipe.objective == "pretrain" or model_config.sliding_window is not None
        if sizes["context"] > 1 and (config.window % chunks or whole_rows):
            continue
        with contextlib.suppress(InputError):  # a dimension, or the batch, does not divide
            yield choose(config, model_config, sizes, device)


def preferred_meshes(config: TrainConfig, model_config: LlamaConfig, devices: int, device: Device) -> Iterator[Plan]:
    """Yields meshes to try: the simplest on which the step fits with a margin, then the one that needs least memory.

    Yields:
      One or two plans; none if no mesh with this number of devices divides model, batch and window.
    """
    simplest = least = None
    for found in mesh_plans(config, model_config, devices, device):
        if simplest is None and found.roomy:
            yield (simplest := found)
        least = found if least is None or found.total < least.total else least
    if least is not None and least is not simplest:
        yield least


def settle_mesh(config: TrainConfig, model_config: LlamaConfig, devices: int, device: Device) -> MeshConfig:
    """Returns the run's mesh; if it is `auto`, the first of `preferred_meshes`.

    Raises:
      InputError: no mesh with this number of devices divides model, batch and window.
    """
    if not isinstance(config.mesh, str):
        return config.mesh
    found = next(preferred_meshes(config, model_config, devices, device), None)
    if found is None:
        raise InputError(
            f"mesh auto: no mesh of {devices} devices divides recipe.batch_size {config.recipe.batch_size}, window "
            f"{config.window} and the model's dimensions; another number of devices, or another batch, is needed"
        )
    return MeshConfig(**found.mesh)


def mesh_told(mesh: Mapping[str, int]) -> str:
    """Formats a mesh as settings; except for fsdp, axes of one device are left out."""
    return ", ".join(f"mesh.{axis} {size}" for axis, size in mesh.items() if size > 1 or axis == "fsdp")


def check(found: Plan) -> None:
    """Refuses a step that does not fit.

    Raises:
      InputError: the step does not fit; the message gives the numbers, and the nearest settings that do fit.
    """
    if found.fits:
        return
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in found.parts.items() if size)
    problem = (
        f"the step needs {found.total / GIB:.1f} GiB on each {found.device.name} ({parts}); "
        f"it has {found.device.memory / GIB:.1f}"
    )
    if found.total <= found.device.memory:
        device = found.device
        limited = f", because of {PINNED_LIMIT}" if device.pinned_limit < PINNED_SHARE * device.host_memory else ""
        problem = (
            f"the step needs {sum(found.host.values()) / GIB:.1f} GiB of host memory for each device; arrays can fill "
            f"{_POOL * device.pinned_memory / GIB:.1f} of its {device.host_memory / GIB:.1f}{limited}"
        )
    remedies = list(itertools.islice(_remedies(found), 3))
    advice = f"what fits: {'; or '.join(remedies)}" if remedies else "no setting of remat, mesh or window makes it fit"
    raise InputError(f"{problem}; {advice}")


def _remedies(found: Plan) -> Iterator[str]:
    """Yields settings that fit, smallest change first."""
    config, model_config = found.config, found.model_config

    def fits(window: int, mesh: Mapping[str, int], lora: Lora | None = config.lora, **compute: Any) -> bool:
        changed = dataclasses.replace(_with_compute(config, **compute), window=window, lora=lora)
        try:
            return plan(changed, model_config, mesh, found.device).fits
        except InputError:
            return False

    least: dict[str, Any] = {"remat": "full", "microbatch_size": 1}
    changes: list[dict[str, Any]] = [{"remat": "full"}, least]
    if _streaming(config, found.device):
        least = {**least, "optimizer_memory": "host"}
        changes += [{"optimizer_memory": "host"}, {"remat": "full", "optimizer_memory": "host"}, least]
    for change in changes:
        if fits(config.window, found.mesh, **change):
            yield _told(change)
            break
    devices = math.prod(found.mesh.values())
    for other in preferred_meshes(_with_compute(config, **least), model_config, devices, found.device):
        if other.fits and other.mesh != found.mesh:
            yield f"{mesh_told(other.mesh)}, " + _told(least)
            break
    for factor, axis in itertools.product((2, 4, 8, 16, 32, 64), ("fsdp", "context")):
        mesh = {**found.mesh, axis: found.mesh[axis] * factor}
        if fits(config.window, mesh, **least):
            yield f"{math.prod(mesh.values())} devices with mesh.{axis} {mesh[axis]}, " + _told(least)
            break
    adapters = {"remat": "full", "microbatch_size": 1, "optimizer_memory": "device"}
    if config.lora is None and fits(config.window, found.mesh, Lora(), **adapters):
        yield f"adapters (lora.rank {Lora().rank}), compute.remat full, compute.microbatch_size 1"
    for factor in (2, 4, 8, 16, 32):
        if fits(config.window // factor, found.mesh, **least):
            yield f"window {config.window // factor}, " + _told(least)
            break


def _told(compute: Mapping[str, Any]) -> str:
    return ", ".join(f"compute.{name} {value}" for name, value in compute.items())
