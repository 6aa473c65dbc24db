"""Characters of Shakespeare with nanoGPT's CPU dimensions and budget (its README, "I only have a macbook")."""

from configs import shakespeare_char
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        shakespeare_char.get_config(),
        data={"sequence_length": 64},
        model={"num_layers": 4, "num_heads": 4, "width": 128, "dropout": 0.0},
        train={"num_steps": 2000, "batch_size": 12},
        evaluation={"every_steps": 100, "batch_size": 96, "sample_tokens": 0},
        checkpoint={"every_steps": 500},
    )
