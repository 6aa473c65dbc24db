"""The big model of "Attention Is All You Need" (Vaswani et al. 2017, arXiv:1706.03762): BLEU 28.4 after 300,000 steps."""

from configs import aiayn_base
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        aiayn_base.get_config(),
        model={
            "num_heads": 16,
            "width": 1024,
            "feedforward_width": 4096,
            "dropout": 0.3,
            "initial_scale": 1024**-0.5,
        },
        optimizer={"learning_rate": (1024 * 4000) ** -0.5},
        train={"num_steps": 300_000},
        checkpoint={"keep_latest": 20},
    )
