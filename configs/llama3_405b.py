"""The shape of Llama 3 405B (Dubey et al. 2024, arXiv:2407.21783, table 3), 405,853,388,800 parameters."""

from configs import llama3_70b
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        llama3_70b.get_config(),
        model={"num_layers": 126, "num_heads": 128, "width": 16_384, "feedforward_width": 53_248},
        optimizer={"learning_rate": 8e-5},
        train={"num_steps": 1_200_000, "batch_size": 512},
        parallel={"tensor": 4},
    )
