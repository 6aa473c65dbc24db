"""Characters of Shakespeare, as well as two CPU cores can learn them in twenty minutes."""

from configs import shakespeare_char
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        shakespeare_char.get_config(),
        model={
            "num_layers": 4,
            "num_heads": 4,
            "width": 256,
            "dropout": 0.0,
            "norm": "rmsnorm",
            "activation": "swiglu",
            "positions": "rotary",
        },
        # Small batches: many steps matter more than smooth ones when the budget is this short.
        optimizer={"learning_rate": 2e-3, "final_ratio": 0.02},
        train={"num_steps": 1600, "batch_size": 8},
        evaluation={"every_steps": 400, "batch_size": 32, "sample_tokens": 300},
        checkpoint={"every_steps": 200},
    )
