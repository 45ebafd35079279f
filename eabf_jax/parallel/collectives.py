"""Counts the bytes that a compiled program's collectives move, from the program's text."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

# Scopes (`jax.named_scope`) that name the data a collective carries. Collectives that the compiler inserts have no
# scope; neither have some reduce-scatters that it fuses with their padding.
CARRIED = ("parameters", "parameter_gradients", "keys_values", "key_value_gradients", "embedding")

# Bytes that each of n devices sends per byte of the result, with ring algorithms.
_SENT: dict[str, Callable[[float], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1.0,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str  # an all-reduce counts as a reduce-scatter if each device keeps only its own part
    carries: str  # a name in `CARRIED`, or "other"
    sent: float  # bytes that one device sends in one run of the program


def collectives(text: str) -> list[Collective]:
    """Lists the collectives of a program.

    In a loop that counts to a constant, as `jax.lax.scan` does, a collective counts once per iteration. Other loops
    count once.

    Args:
      text: the optimised program, from `Compiled.as_text()`.

    Returns:
      One entry per instruction.
    """
    computations, entry = _parse(text)
    found: list[Collective] = []

    seen: set[str] = set()

    def visit(name: str, times: int) -> None:
        for instruction in computations.get(name, ()):
            kind = instruction.opcode.removesuffix("-start")
            if kind in _SENT:
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                # An asynchronous collective can appear twice, where it starts and where it ends, with one channel.
                # Channel 1 does not identify a collective: all collectives of shard_map use it.
                if channel is None or channel[1] == "1" or channel[1] not in seen:
                    found_kind, size = _sent(instruction, kind, name)
                    found.append(Collective(found_kind, _carried(instruction.rest), times * size))
                if channel is not None:
                    seen.add(channel[1])
            elif instruction.opcode == "while" and (loop := _WHILE.search(instruction.rest)):
                visit(loop[2], times * _trips(computations.get(loop[1], [])))
            else:
                for called in _called(instruction.rest):
                    visit(called, times)

    visit(entry, 1)
    return found


def collective_bytes(text: str, by: str = "kind") -> dict[str, float]:
    """Sums the bytes that one device sends in one run of a program.

    Args:
      text: as for `collectives`.
      by: the field of `Collective` to group by, "kind" or "carries".

    Returns:
      Bytes by value of that field; values that do not occur are left out.
    """
    found: dict[str, float] = defaultdict(float)
    for collective in collectives(text):
        found[getattr(collective, by)] += collective.sent
    return dict(found)


def _carried(rest: str) -> str:
    """Returns the innermost scope of an instruction that is in `CARRIED`, or "other"."""
    path = re.search(r'op_name="([^"]*)"', rest)
    scopes = [scope for scope in path[1].split("/") if scope in CARRIED] if path else []
    return scopes[-1] if scopes else "other"


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, inside = "", ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            inside = opened[2]
            computations[inside] = []
            entry = inside if opened[1] else entry
        elif inside and (match := _INSTRUCTION.match(line)):
            computations[inside].append(_Instruction(*match.groups()))
    return computations, entry


def _called(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for names in _BRANCHES.findall(rest):
        yield from (name.strip().removeprefix("%") for name in names.split(","))


def _trips(condition: list[_Instruction]) -> int:
    """Returns the iterations of a loop that counts from 0 to a constant; 1 for other conditions."""
    constants = [re.match(r"(\d+)\)", item.rest) for item in condition if item.opcode == "constant"]
    bounds = [int(match[1]) for match in constants if match]
    return max(bounds, default=1) or 1


def _sent(instruction: _Instruction, kind: str, computation: str) -> tuple[str, float]:
    sizes = [
        _BYTES.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in _ARRAY.findall(instruction.type)
        if dtype != "u32" or shape  # u32 scalars are the handles of asynchronous collectives
    ]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]  # operands first, then results
    devices = _group_size(instruction.rest)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter", sum(sizes) * (devices - 1) / devices
    return kind, sum(sizes) * _SENT[kind](devices)


def _group_size(rest: str) -> int:
    """Returns the number of devices in a collective's group; XLA writes groups in three ways."""
    if named := re.search(r"replica_groups=(?:@?\w*)?mesh\[(.*?)\] ?\{(.*?)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        # A part of an axis is written 'name':(offset)size.
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    return 1
