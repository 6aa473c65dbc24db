"""The keys of low-rank adapters."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained in the place of the matrices of a base, which stays as it is."""

    kind: Literal["none", "lora", "dora"] = "none"
    """`lora` adds a product of two narrow matrices to linear maps; `dora` lets the norms of their columns learn as well."""
    base_run: str = ""
    """Directory of the run that the adapter is for; the adapter's own run does not hold it."""
    rank: int = 8
    """Width between the two matrices (R)."""
    alpha: float = 16.0
    """Their product counts alpha / rank times."""
    rank_stabilized: bool = False
    """It counts alpha / sqrt(rank) times instead, so that large ranks learn as fast."""
    targets: tuple[str, ...] = ("*",)
    """Linear maps of the layers that get one: names (query, key, value, output, up, gate, down) or paths, * for any part."""
    also_trained: tuple[str, ...] = ("classifier",)
    """Parameters of the base that are trained as a whole, and kept with the adapter: names of modules or paths, * for any part."""
    dropout: float = 0.0
    """Share of what goes into an adapter that is dropped."""
    base: Literal["none", "int8", "int4", "nf4"] = "none"
    """Type in which the base's linear maps are kept, to save memory (QLoRA; extra `quantization`); none: as they are."""
    base_block: int = 64
    """Inputs of a linear map whose weights share a scale, if it is kept in fewer bits."""

    @property
    def scale(self) -> float:
        """Hu et al. 2021 (arXiv:2106.09685), section 4.1; Kalajdzievski 2023 (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)
