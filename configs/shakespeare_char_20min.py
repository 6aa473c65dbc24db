"""Characters of Shakespeare, as well as two CPU cores can learn them in twenty minutes."""

from configs import shakespeare_char
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        shakespeare_char.get_config(),
        data={"sequence_length": 256},
        model={"num_layers": 4, "num_heads": 4, "width": 256, "dropout": 0.1},
        optimizer={"learning_rate": 2e-3},
        train={"num_steps": 2000, "batch_size": 16},
        evaluation={"every_steps": 250},
    )
