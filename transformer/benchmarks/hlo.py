"""A compiled program as XLA prints it (`as_text()`): its computations, and what each of their lines says."""

import re
from dataclasses import dataclass

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    """Names; of a parameter its number, of a constant its value."""
    attributes: str


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the computations, each with its result last, and the name of the one that is the program."""
    computations: dict[str, list[Instruction]] = {}
    entry, current, root = "", "", None
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            current, root = head.group(2), None
            computations[current] = []
            entry = current if head.group(1) else entry
        elif line.startswith("}"):
            if root is not None:
                computations[current].append(Instruction("ROOT", root.type, "tuple", (root.name,), ""))
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match.group(2), match.group(3))
            computations[current].append(instruction)
            root = instruction if match.group(1) else root
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    type_end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, rest = text[:type_end], text[type_end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end]
    if opcode in ("parameter", "constant"):
        operands = (inside.strip(),)
    else:
        operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
    return Instruction(name, kind, opcode, operands, rest[end + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns where the bracket at `start` is closed."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if not depth:
            return place
    raise ValueError(f"a bracket is not closed in {text!r}")


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    parts, depth, last = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append(text[last:place])
            last = place + 1
    return [*parts, text[last:]]


def tuple_types(kind: str) -> list[str]:
    """Returns the types in a tuple's type."""
    text = kind.strip()
    return [part.strip() for part in _split(text[1 : _closing(text, 0)]) if part.strip()]


def array_types(kind: str) -> list[str]:
    """Returns the types of the arrays in a type."""
    kind = re.sub(r"/\*.*?\*/", "", kind).strip()
    return [leaf for part in tuple_types(kind) for leaf in array_types(part)] if kind.startswith("(") else [kind]


def attribute(instruction: Instruction, name: str) -> str | None:
    found = re.search(rf"[ ,]{name}=%?([\w.\-]+)", instruction.attributes)
    return None if found is None else found.group(1)


def _braces(text: str, name: str) -> str:
    found = re.search(rf"{name}=\{{([^}}]*)\}}", text)
    return "" if found is None else found.group(1)


def callees(instruction: Instruction) -> list[str]:
    """Returns the computations that an instruction passes its operands to; of a conditional its branches."""
    if instruction.opcode == "conditional":
        names = re.findall(r"%?([\w.\-]+)", _braces(instruction.attributes, "branch_computations"))
        return names + [n for key in ("true_computation", "false_computation") if (n := attribute(instruction, key))]
    name = attribute(instruction, "calls") or (
        attribute(instruction, "to_apply") if instruction.opcode == "call" else None
    )
    return [] if name is None else [name]


def bits_and_dims(kind: str) -> tuple[int, tuple[int, ...]]:
    """Returns the bits of an element and the shape of a type, such as `f32[4,8]{1,0}`."""
    found = re.match(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", kind)
    assert found is not None, kind
    bits = 8 if found.group(1) == "pred" else int(found.group(2) or 0)  # a token has none
    return bits, tuple(int(size) for size in found.group(3).split(",") if size)
