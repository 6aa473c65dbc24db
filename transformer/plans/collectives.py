"""The collectives of a compiled program: over which axis of the mesh, how many bytes, how often, by which links, and whether
anything is computed meanwhile.

What is read is the program after all of XLA's passes, in the order in which it runs. libtpu writes a collective that runs
beside products in one of three ways: a `-start` and a `-done` with other instructions between them; a chain of fusions, of
which the first calls `AsyncCollectiveStart` and the last `AsyncCollectiveDone`; or a fusion of its own. What goes from slice
to slice is a `send` to the host and a `recv` from it; the program is that of one slice.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transformer.benchmarks.hlo import Instruction, array_types, attribute, bits_and_dims, callees, parse

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
COMPUTES = ("fusion", "convolution", "dot", "custom-call", "while", "conditional", "call", "reduce", "ragged-dot")
"""What takes long enough to hide a transfer."""


@dataclass(frozen=True)
class Collective:
    """Equal collectives of one place in the program."""

    kind: str
    axes: tuple[str, ...]
    """Of the mesh, over which it goes; empty for one among a single device."""
    group_size: int
    bytes: int
    """Of the whole array: what a gather or an all-reduce returns, what a scatter or an exchange takes, on each chip."""
    count: int
    """Times in a step."""
    crosses_slices: bool
    overlapped: bool
    """Whether other work is scheduled between its start and its end."""
    group: tuple[int, ...]
    """One of its groups, as positions in the mesh."""
    source: str
    """The operation of the model that it comes from."""

    @property
    def moved(self) -> float:
        """Bytes that a chip sends each time, by the algorithms of a ring: Chan et al. 2007, "Collective communication"."""
        share = (self.group_size - 1) / self.group_size
        if self.kind == "all-reduce":
            return 2 * share * self.bytes
        return self.bytes * (1.0 if self.kind in ("collective-permute", "collective-broadcast") else share)


@dataclass(frozen=True)
class MeshShape:
    """Names and sizes of the mesh's axes, and the slice of each of its devices in order."""

    sizes: Mapping[str, int]
    slices: Sequence[int]

    def axes_of(self, group: Sequence[int]) -> tuple[str, ...]:
        """Returns the axes along which the devices of a group differ."""
        places = np.unravel_index(np.asarray(group), tuple(self.sizes.values()))
        return tuple(name for name, where in zip(self.sizes, places, strict=True) if np.any(where != where[0]))


def collectives_of(hlo: str, mesh: MeshShape) -> list[Collective]:
    """Returns the collectives of one step, in the order of the program; of branches, those of each."""
    computations, entry = parse(hlo)
    return list(_Reader(computations, mesh).read(entry, 1))


class _Reader:
    def __init__(self, computations: dict[str, list[Instruction]], mesh: MeshShape):
        self.computations, self.mesh = computations, mesh
        # Chains of fusions with a link besides their ends, wherever it is: a loop may lie between them.
        links = [found for found in computations.values() if not _marks(found, "Start", "Done")]
        self.hidden = {chain for found in links for i in found if _kind(i) and (chain := _chain(i))}

    def read(self, name: str, count: int) -> Iterator[Collective]:
        instructions = self.computations[name]
        for place, instruction in enumerate(instructions):
            if instruction.opcode == "while":
                body = attribute(instruction, "body") or ""
                yield from self.read(body, count * (trip_count(instruction, self.computations, instructions) or 1))
            elif instruction.opcode == "fusion":
                found = self._fused(instruction)
                for collective in (i for i in found if _kind(i)):
                    chain = _chain(collective)
                    if chain is None or _marks(found, "Start"):
                        is_scattered = _kind(collective) == "all-reduce" and _slices(found)
                        kind = "reduce-scatter" if is_scattered else None
                        yield self._collective(collective, found, count, chain in self.hidden, kind)
            elif _kind(instruction):
                overlapped = instruction.opcode.endswith("-start") and _works(instructions, place, instruction.name)
                yield self._collective(instruction, instructions, count, overlapped)
            elif instruction.opcode == "send" and (kind := _between_slices(instruction)):
                yield self._send(instruction, instructions, place, count, kind)
            elif instruction.opcode == "async-start":
                overlapped = _works(instructions, place, instruction.name)
                for called in callees(instruction):
                    for collective in (i for i in self.computations.get(called, ()) if _kind(i)):
                        yield self._collective(collective, self.computations[called], count, overlapped)
            elif instruction.opcode in ("call", "conditional", "custom-call"):
                for called in (c for c in callees(instruction) if c in self.computations):
                    yield from self.read(called, count)

    def _fused(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions inside a fusion, and inside those that it calls, if any is a collective."""
        found: list[Instruction] = []
        for called in callees(instruction):
            for inner in self.computations.get(called, ()):
                found += [inner, *(self._fused(inner) if inner.opcode == "fusion" else ())]
        return found if any(map(_kind, found)) else []

    def _collective(
        self,
        instruction: Instruction,
        siblings: Sequence[Instruction],
        count: int,
        overlapped: bool,
        kind: str | None = None,
    ) -> Collective:
        kind = kind or _kind(instruction) or ""
        types = {i.name: i.type for i in siblings}
        taken = sum(map(size_of, (types[name] for name in instruction.operands if name in types)))
        given = size_of(instruction.type)
        if instruction.opcode.endswith("-start"):
            given = max(given - taken, taken)  # the operand is part of the result
        groups = groups_of(instruction.attributes, len(self.mesh.slices))
        group = max(groups, key=len, default=(0,))
        axes = sorted({axis for one in groups for axis in self.mesh.axes_of(one)}, key=list(self.mesh.sizes).index)
        crosses = any(len({self.mesh.slices[device] for device in one}) > 1 for one in groups)
        size = self._ring(axes) if "permute" in kind else len(group)
        # A reduction may take wider numbers than those that it sends.
        whole = max(taken, given) if kind == "all-gather" else given if kind == "all-reduce" else taken or given
        source = re.search(r'op_name="([^"]*)"', instruction.attributes)
        name = _shortened(source.group(1)) if source else ""
        return Collective(kind, tuple(axes), size, whole, count, crosses, overlapped, tuple(group), name)

    def _send(
        self, send: Instruction, siblings: Sequence[Instruction], place: int, count: int, kind: str
    ) -> Collective:
        """Returns a collective between slices, which the hosts carry: each chip sends its part and receives the result."""
        types = {i.name: i.type for i in siblings}
        slices = len(set(self.mesh.slices))
        # Chips with the same place in every slice exchange with each other.
        group = tuple(range(0, len(self.mesh.slices), len(self.mesh.slices) // slices))
        place = next((n for n, i in enumerate(siblings) if i.opcode == "recv" and _meeting(i) == _meeting(send)), place)
        overlapped = _works(siblings, place, siblings[place].name)
        source = re.search(r'op_name="([^"]*)"', send.attributes)
        name = _shortened(source.group(1)) if source else ""
        size = size_of(types[send.operands[0]])
        return Collective(kind, self.mesh.axes_of(group), slices, size, count, True, overlapped, group, name)

    def _ring(self, axes: Sequence[str]) -> int:
        return math.prod(self.mesh.sizes[axis] for axis in axes)


def _kind(instruction: Instruction) -> str | None:
    name = instruction.opcode.removesuffix("-start")
    return name if name in KINDS else None


def _between_slices(instruction: Instruction) -> str | None:
    """Returns the kind of collective that a transfer to the host belongs to."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    return found.group(1).lower().replace("_", "-") if found else None


def _meeting(instruction: Instruction) -> str | None:
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes)
    return found.group(1) if found else None


def _chain(instruction: Instruction) -> str | None:
    found = re.search(r'chain_id="(\w+)"', instruction.attributes)
    return found.group(1) if found else None


def _marks(found: Sequence[Instruction], *ends: str) -> bool:
    """Returns whether a fusion holds one of the named ends of a chain."""
    return any(f'"AsyncCollective{end}"' in i.attributes for i in found for end in ends)


def _slices(found: Sequence[Instruction]) -> bool:
    return any(i.opcode == "dynamic-slice" for i in found)


def _works(instructions: Sequence[Instruction], start: int, name: str) -> bool:
    """Returns whether anything is computed before what has begun is waited for."""
    for instruction in instructions[start + 1 :]:
        if name in instruction.operands and instruction.opcode.endswith(("-done", "async-update")):
            return False
        if instruction.opcode in COMPUTES:
            return True
    return False


def size_of(kind: str) -> int:
    """Returns the bytes of all arrays in a type."""
    return sum(bits * math.prod(dims) for bits, dims in map(bits_and_dims, array_types(kind))) // 8


def _shortened(name: str) -> str:
    """Returns an operation's name without what every name has."""
    parts = [part for part in name.split("/") if part not in ("while", "body", "eval_jaxpr", "checkpoint")]
    is_backward = any("transpose(" in part for part in parts)
    kept = [part for part in parts if not part.startswith(("jit(", "jvp(", "transpose(")) and part != "layer"]
    return "/".join((["gradient"] if is_backward else []) + kept)


def trip_count(
    loop: Instruction, computations: Mapping[str, Sequence[Instruction]], around: Sequence[Instruction]
) -> int | None:
    """Returns how often a loop turns: what XLA knows, or what its counter says, None for neither.

    The counter is an element of the loop's tuple that begins at a constant, is compared with one, and grows by one.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known.group(1))
    condition = {i.name: i for i in computations.get(attribute(loop, "condition") or "", ())}
    test = next((i for i in condition.values() if i.opcode == "compare"), None)
    if test is None:
        return None
    sides = [condition.get(name) for name in test.operands]
    limit = next((_number(i) for i in sides if i is not None and i.opcode == "constant"), None)
    counter = next((i for i in sides if i is not None and i.opcode == "get-tuple-element"), None)
    if limit is None or counter is None or attribute(test, "direction") not in ("LT", "GT"):
        return None
    outside = {i.name: i for i in around}
    start = outside.get(loop.operands[0])
    place = int(attribute(counter, "index") or 0)
    first = outside.get(start.operands[place]) if start is not None and start.opcode == "tuple" else None
    while first is not None and first.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        first = outside.get(first.operands[0])
    begin = _number(first) if first is not None and first.opcode == "constant" else 0
    return limit - (begin or 0)


def _number(instruction: Instruction) -> int | None:
    return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None


def groups_of(attributes: str, num_devices: int) -> list[tuple[int, ...]]:
    """Returns the groups of devices that a collective's attributes name, in any of the ways in which XLA prints them.

    Of a permutation each pair is a group. Raises ValueError for a way that is not known.
    """
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs.group(1))]
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = [tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed.group(1))]
        return groups or [tuple(range(num_devices))]
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return [tuple(map(int, row)) for row in _tiled(*tiled.groups())]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes):
        return _named(*named.groups())
    raise ValueError(f"the groups of a collective are written in an unknown way: {attributes[:200]}")


def _tiled(dims: str, sizes: str, order: str | None) -> np.ndarray:
    """Returns the array of device numbers that XLA writes as `[dims]<=[sizes]T(order)`."""
    shape = [int(size) for size in sizes.split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    if order is not None:
        numbers = numbers.transpose([int(axis) for axis in order.split(",")])
    return numbers.reshape([int(size) for size in dims.split(",")])


def _named(axes: str, between: str, over: str) -> list[tuple[int, ...]]:
    """Returns groups written as axes of a mesh, `mesh['a'=4,'b'=2] {'b'}`, or as a part of an axis, `'a':(2)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    ids = re.search(r"\(?\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", between)
    if ids:
        numbers = _tiled(",".join(map(str, sizes.values())), ids.group(2) or ids.group(1), ids.group(3))
    else:
        numbers = np.arange(math.prod(sizes.values()))
    numbers = numbers.reshape(list(sizes.values()))
    dims: list[tuple[int, bool]] = []
    chosen = {name: (pre, size) for name, pre, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", over)}
    for name, size in sizes.items():
        pre, part = chosen.get(name, ("", ""))
        if part:
            left, middle = int(pre), int(part)
            dims += [(left, False), (middle, True), (size // left // middle, False)]
        else:
            dims.append((size, name in chosen))
    numbers = numbers.reshape([size for size, _ in dims])
    inside = [place for place, (_, is_in) in enumerate(dims) if is_in]
    outside = [place for place, (_, is_in) in enumerate(dims) if not is_in]
    rows = numbers.transpose(outside + inside).reshape(-1, math.prod(dims[place][0] for place in inside))
    return [tuple(map(int, row)) for row in rows]
