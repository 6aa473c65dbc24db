"""The shape of Llama 2 7B (Touvron et al. 2023, arXiv:2307.09288), 6,738,415,616 parameters.

Four million tokens a step, two trillion in all, and the rates are those of the paper. It is here because other code bases
publish what its step needs. The split is for 256 chips of TPU v5e, a text a chip at a time.
"""

from configs import llama_1b
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        llama_1b.get_config(),
        data={"sequence_length": 4096},
        model={
            "vocab_size": 32_000,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": None,
            "width": 4096,
            "feedforward_width": 11_008,
            "rotary_base": 10_000.0,
            "rotary_scaling": "none",
            "rotary_factor": 1.0,
            "tied_embeddings": False,
        },
        optimizer={"learning_rate": 3e-4, "final_ratio": 0.1, "warmup_steps": 2000},
        train={"num_steps": 500_000, "batch_size": 1024, "num_microbatches": 4},
        evaluation={"batch_size": 256},
    )
