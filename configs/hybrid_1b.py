"""A hybrid of 963,909,504 parameters: three layers of Gated DeltaNet for each one of attention.

It learns as the models of that paper do (Yang et al. 2024, arXiv:2412.06464): half a million tokens a step, 100 billion in
all, the first of which warms up. The corpus is that of `gpt2_124m`.
"""

from configs import gpt2_124m
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        gpt2_124m.get_config(),
        data={"sequence_length": 4096},
        model={
            "layers": "3*gated_delta_net+attention",
            "num_layers": 16,
            "width": 2048,
            "num_heads": 16,
            "norm": "rmsnorm",
            "activation": "swiglu",
            "positions": "rotary",
            "biases": False,
            "remat": "full",
        },
        optimizer={"learning_rate": 4e-4, "warmup_steps": 0, "warmup_tokens": 1_000_000_000},
        train={"num_steps": 190_000, "batch_size": 128, "num_microbatches": 4},
        evaluation={"batch_size": 32, "num_batches": 50},
    )
