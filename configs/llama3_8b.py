"""The shape of Llama 3 8B (Dubey et al. 2024, arXiv:2407.21783, table 3), 8,030,261,248 parameters.

Four million tokens a step. By arithmetic it fits, a text on each chip at a time, on 64 chips of TPU v6e or 16 of v5p, and on
32 H100s, split by `fsdp` alone: `--parallel.fsdp -1`, the default. Over several slices or islands of GPUs, a replica of the
parameters for each: `--parallel.replica`. docs/plans.md has the commands that check it.
"""

from configs import llama_1b
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        llama_1b.get_config(),
        model={
            "num_layers": 32,
            "width": 4096,
            "feedforward_width": 14_336,
            "rotary_scaling": "none",
            "rotary_factor": 1.0,
            "tied_embeddings": False,
        },
        # The peak rate of the paper's table 3; fifteen trillion tokens are 3,600,000 of these steps.
        optimizer={"learning_rate": 3e-4, "final_ratio": 0.01, "warmup_steps": 8000},
        train={"num_steps": 250_000, "batch_size": 512},
    )
