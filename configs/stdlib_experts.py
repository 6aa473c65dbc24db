"""The demo with four experts, of which a token takes one, in the place of every second MLP."""

from configs import stdlib
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        stdlib.get_config(),
        model={
            "layers": "attention+attention/experts",
            "num_experts": 4,
            "experts_per_token": 1,
            "balance_loss": 0.01,
            "router_z_loss": 0.001,
        },
    )
