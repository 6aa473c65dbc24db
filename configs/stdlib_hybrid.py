"""The demo with three layers of Gated DeltaNet for each one of attention, as `hybrid_1b` has them."""

from configs import stdlib
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(stdlib.get_config(), model={"layers": "3*gated_delta_net+attention"})
