"""What chips can do, and how many of them hang together: the numbers that a plan is made with, each with its source."""

import math
from dataclasses import dataclass
from itertools import combinations_with_replacement

from transformer.config import ConfigError, nearest


@dataclass(frozen=True)
class Chip:
    """One accelerator. Bandwidths are bytes a second, one way."""

    name: str
    platform: str
    peak_flops: float
    """Dense bfloat16 FLOP/s."""
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    """Of one link to a neighbour on the torus; of a GPU, of all its links to the others in its host."""
    torus_dims: int
    """Dimensions of the torus, with two links in each; 0: every chip of a slice reaches every other at full speed."""
    dcn_bandwidth: float
    """To chips of other slices, a chip's share of what its host has."""
    wrap_multiple: int = 0
    """A dimension of the torus is closed to a ring where its length is a multiple of this."""


_GIB = 2**30

CHIPS = {
    chip.name: chip
    for chip in (
        # Peaks, memory and DCN: cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e ("System architecture"). DCN is given for a
        # pod of 256 chips, 6.4 Tbit/s (v5e) and 25.6 Tbit/s (v6e), or for a chip, 50 Gbit/s (v5p); v4's is what "How to Scale
        # Your Model" gives a host, 25 GB/s, over its four chips. Links: that book, part 2, what one link carries one way
        # (jax-ml.github.io/scaling-book/tpus). Rings: the same; 16 chips on v5e and v6e, multiples of 4 on v4 and v5p.
        Chip("v4", "tpu", 275e12, 32 * _GIB, 1.228e12, 4.5e10, 3, 6.25e9, 4),
        Chip("v5e", "tpu", 197e12, 16 * _GIB, 8.19e11, 4.5e10, 2, 3.125e9, 16),
        Chip("v5p", "tpu", 459e12, 95 * _GIB, 2.765e12, 9e10, 3, 6.25e9, 4),
        Chip("v6e", "tpu", 918e12, 32 * _GIB, 1.638e12, 9e10, 2, 1.25e10, 16),
        # NVIDIA H100 SXM data sheet: 989 TFLOP/s without sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways; a 400 Gbit/s
        # card for each GPU, as in DGX H100.
        Chip("h100", "gpu", 989e12, 80 * 10**9, 3.35e12, 4.5e11, 0, 5e10),
    )
}


@dataclass(frozen=True)
class Topology:
    """Chips of one kind: slices of one shape, joined by the data-centre network."""

    chip: Chip
    shape: tuple[int, ...]
    """Of a slice; of GPUs, hosts and the GPUs of each."""
    num_slices: int = 1

    @property
    def name(self) -> str:
        """As it is given on the command line, without the number of slices."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    def __str__(self) -> str:
        slices = f"{self.num_slices} slices of " if self.num_slices > 1 else ""
        return f"{slices}{self.name}, {self.num_chips:,} chips"


def shapes(chip: Chip) -> list[tuple[int, ...]]:
    """Returns the shapes that slices of a chip come in (Cloud TPU's documentation of each; 3D ones in order of size)."""
    if chip.platform == "gpu":
        return [(hosts, 8) for hosts in (1, *range(2, 513))]
    if chip.torus_dims == 2:
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    # Below a cube of 64 chips there are four shapes; above, every side is a multiple of 4.
    most, longest = {"v4": (4096, 16), "v5p": (6144, 24)}[chip.name]
    sides = combinations_with_replacement(range(4, longest + 1, 4), 3)
    return [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *(shape for shape in sides if math.prod(shape) <= most)]


def parse_topology(text: str, num_slices: int = 1) -> Topology:
    """Returns the topology of a name such as `v5p:8x8x8`; raises ConfigError, with the nearest, for one that does not exist."""
    name, _, sides = text.partition(":")
    if name not in CHIPS:
        raise ConfigError(f"--topology = {text!r}: chips are {', '.join(CHIPS)}{nearest(name, tuple(CHIPS))}")
    chip, known = CHIPS[name], shapes(CHIPS[name])
    parts = sides.split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(parts) != len(known[0]):
        example = "x".join(map(str, known[-1]))
        raise ConfigError(
            f"--topology = {text!r}: must be {name}: and {len(known[0])} numbers, such as {name}:{example}"
        )
    if num_slices < 1:
        raise ConfigError(f"--slices = {num_slices}: must be at least 1")
    shape = tuple(map(int, parts))
    if tuple(sorted(shape)) not in {tuple(sorted(other)) for other in known}:
        found = "x".join(map(str, _nearest_shape(shape, known)))
        raise ConfigError(f"--topology = {text!r}: there is no slice of that shape (did you mean {name}:{found}?)")
    return Topology(chip, shape, num_slices)


def _nearest_shape(shape: tuple[int, ...], known: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the known shape whose sides are nearest in ratio."""

    def distance(other: tuple[int, ...]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(sorted(shape), sorted(other), strict=True))

    return min(known, key=distance)
