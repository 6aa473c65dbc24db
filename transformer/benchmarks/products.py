"""Matrix products of a compiled program: the longest chain that wait for each other, and the work and bytes of all.

The chain is what no parallel hardware shortens.

A program's operations form a graph of data dependence. From every input of a computation to every output leads a longest
path, counted in products; calls put paths together, and a loop of n turns raises its table of paths from turn to turn to the
power of n in the algebra of maximum and sum (Cuninghame-Green 1979, "Minimax algebra"). So a loop whose products do not feed
one another counts once, and one whose state passes through k products counts k n.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from transformer.benchmarks.hlo import Instruction, array_types, attribute, bits_and_dims, callees, parse, tuple_types

NO_PATH = -math.inf

Table = Float[np.ndarray, "I O"]
"""Products on the longest path from each input to each output of a computation; the first of both is the start of a path."""

_PRODUCTS = ("dot", "convolution", "ragged-dot")
_LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(gemm|matmul|dot)[^"]*"', re.IGNORECASE)


def longest_chain(hlo: str) -> int:
    """Returns the number of matrix products on the longest path of data dependence of a program, as `as_text()` prints it.

    Raises ValueError for a loop with products of which XLA does not know how often it turns.
    """
    computations, entry = parse(hlo)
    return int(max(0, np.max(_Program(computations).table(entry))))


@dataclass(frozen=True)
class Work:
    """What all products of a program amount to, each as often as it is computed."""

    flops: int = 0
    bytes: int = 0
    """Read and written by products, each for itself: operands and result."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> "Work":
        return Work(count * self.flops, count * self.bytes)


def work_of_products(hlo: str) -> Work:
    """Returns the work of a program on one device, as `as_text()` prints it; of branches that of the largest.

    Raises ValueError for a loop with products of which XLA does not know how often it turns, or a product that it does not
    describe.
    """
    computations, entry = parse(hlo)
    return _Program(computations).work(entry)


class _Program:
    def __init__(self, computations: dict[str, list[Instruction]]):
        self.computations = computations
        self.tables: dict[str, Table] = {}
        self.works: dict[str, Work] = {}

    def work(self, name: str) -> Work:
        """Returns the work of the products of a computation and of what it calls."""
        if name not in self.works:
            types = {instruction.name: instruction.type for instruction in self.computations[name]}
            found = (self._work(instruction, types) for instruction in self.computations[name])
            self.works[name] = sum(found, Work())
        return self.works[name]

    def _work(self, instruction: Instruction, types: dict[str, str]) -> Work:
        if instruction.opcode == "while":
            body = self.work(attribute(instruction, "body") or "")
            return body.times(_turns(instruction, has_products=body.flops > 0) or 0)
        if _is_product(instruction):
            return _work_of_product(instruction, types)
        called = [name for name in callees(instruction) if name in self.computations]
        return max((self.work(name) for name in called), key=lambda work: work.flops, default=Work())

    def table(self, name: str) -> Table:
        """Returns the table of a computation, its outputs and inputs being the arrays in its tuples, in order."""
        if name not in self.tables:
            self.tables[name] = self._table(self.computations[name])
        return self.tables[name]

    def _table(self, instructions: list[Instruction]) -> Table:
        parameters = sorted((i for i in instructions if i.opcode == "parameter"), key=lambda i: int(i.operands[0]))
        sizes = [len(array_types(i.type)) for i in parameters]
        num_inputs = 1 + sum(sizes)
        # Of each array of each instruction: the longest path to it from each input.
        paths: dict[str, np.ndarray] = {}
        first = 1
        for parameter, size in zip(parameters, sizes, strict=True):
            paths[parameter.name] = np.full((num_inputs, size), NO_PATH)
            paths[parameter.name][first + np.arange(size), np.arange(size)] = 0
            paths[parameter.name][0] = 0
            first += size
        types = {instruction.name: instruction.type for instruction in instructions}
        for instruction in instructions:
            if instruction.opcode != "parameter":
                paths[instruction.name] = self._paths(instruction, paths, types, num_inputs)
        return np.concatenate([_start(num_inputs), paths[instructions[-1].name]], axis=1)

    def _paths(
        self, instruction: Instruction, paths: dict[str, np.ndarray], types: dict[str, str], num_inputs: int
    ) -> np.ndarray:
        given = [paths[name] for name in instruction.operands if name in paths]
        start = _start(num_inputs)
        whole = np.concatenate([start, *given], axis=1)
        if instruction.opcode == "tuple":
            return whole[:, 1:]
        if instruction.opcode == "get-tuple-element":
            index = int(attribute(instruction, "index") or 0)
            sizes = [len(array_types(part)) for part in tuple_types(types[instruction.operands[0]])]
            return given[0][:, sum(sizes[:index]) : sum(sizes[: index + 1])]
        if instruction.opcode == "while":
            return _through(whole, self._loop(instruction))[:, 1:]
        called = callees(instruction)
        if instruction.opcode == "conditional":
            found = [
                _through(np.concatenate([start, argument], axis=1), self.table(name))
                for name, argument in zip(called, given[1:], strict=True)
            ]
            decided = np.max(given[0], axis=1, keepdims=True)
            return np.maximum(np.max(np.stack(found), axis=0), decided)[:, 1:]
        if called and called[0] in self.computations:
            return _through(whole, self.table(called[0]))[:, 1:]
        longest = np.max(whole, axis=1, keepdims=True)
        return np.repeat(longest + _is_product(instruction), len(array_types(instruction.type)), axis=1)

    def _loop(self, instruction: Instruction) -> Table:
        body = self.table(attribute(instruction, "body") or "")
        turns = _turns(instruction, has_products=bool(np.max(body) > 0))
        if turns is None:
            # Without products a path is one or none, and any there is shows within as many turns as there are arrays.
            body = np.maximum(body, _identity(len(body)))
        power, result, count = body, None, len(body) if turns is None else turns
        while count:
            if count % 2:
                result = power if result is None else _through(result, power)
            power, count = _through(power, power), count // 2
        return _identity(len(body)) if result is None else result


def _is_product(instruction: Instruction) -> bool:
    return instruction.opcode in _PRODUCTS or bool(_LIBRARY_PRODUCT.search(instruction.attributes))


def _turns(instruction: Instruction, has_products: bool) -> int | None:
    """Returns how often a loop turns, None where that is not known; raises ValueError if it has products."""
    turns = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes)
    if turns is None and has_products:
        raise ValueError(f"how often the loop {instruction.name} turns is not known, and there are products in it")
    return None if turns is None else int(turns.group(1))


def _work_of_product(instruction: Instruction, types: dict[str, str]) -> Work:
    """Returns the work of one product from the shapes of its operands and what it contracts."""
    given = [bits_and_dims(array_types(types[name])[0]) for name in instruction.operands[:2]]
    result = bits_and_dims(array_types(instruction.type)[0])
    found = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.attributes)
    if found is None:
        raise ValueError(f"what the product {instruction.name} contracts is not known")
    contracted = math.prod(given[0][1][int(dim)] for dim in found.group(1).replace('"', "").split(",") if dim)
    moved = sum(bits * math.prod(shape) for bits, shape in (*given, result)) // 8
    return Work(2 * contracted * math.prod(result[1]), moved)


def _start(num_inputs: int) -> np.ndarray:
    """Returns the paths to the start: from itself."""
    return _identity(num_inputs)[:, :1]


def _through(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the longest paths through two tables, one after the other."""
    result = np.full((first.shape[0], second.shape[1]), NO_PATH)
    for middle in range(first.shape[1]):
        result = np.maximum(result, first[:, middle, None] + second[None, middle])
    return result


def _identity(size: int) -> Table:
    return np.where(np.eye(size, dtype=bool), 0.0, NO_PATH)
