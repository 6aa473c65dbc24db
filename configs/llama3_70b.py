"""The shape of Llama 3 70B (Dubey et al. 2024, arXiv:2407.21783, table 3), 70,553,706,496 parameters.
"""

from configs import llama_1b
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        llama_1b.get_config(),
        model={
            "num_layers": 80,
            "num_heads": 64,
            "num_kv_heads": 8,
            "width": 8192,
            "feedforward_width": 28_672,
            "rotary_scaling": "none",
            "rotary_factor": 1.0,
            "tied_embeddings": False,
        },
        optimizer={"learning_rate": 1.5e-4, "final_ratio": 0.01, "warmup_steps": 8000},
        train={"num_steps": 25_000, "batch_size": 512},
    )
