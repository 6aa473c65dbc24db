"""The shape of Llama 3 70B (Dubey et al. 2024, arXiv:2407.21783, table 3), 70,553,706,496 parameters.

Four million tokens a step. Splits, a text on each data-parallel device at a time, to be checked by `transformer plan`
(docs/plans.md):

- TPU v5p, 256 chips and more: `fsdp` alone, `--parallel.fsdp -1`, the default;
- TPU v6e, 256 chips: `--parallel.tensor 4`, for a chip has 32 GB, and more slices by `--parallel.replica`;
- H100, 512 and more: `--parallel.tensor 8`, inside a host, and `--parallel.fsdp` across hosts.
"""

from configs import llama3_8b
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        llama3_8b.get_config(),
        model={"num_layers": 80, "num_heads": 64, "width": 8192, "feedforward_width": 28_672},
        optimizer={"learning_rate": 1.5e-4},
    )
