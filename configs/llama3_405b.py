"""The shape of Llama 3 405B (Dubey et al. 2024, arXiv:2407.21783, table 3), 405,853,388,800 parameters.

Four million tokens a step, as in the first part of the paper's run. The split is for TPU v5p: 2,048 chips in four slices of
8x8x8, each with a replica of its own that is split over 128 x 4 chips:

    transformer plan --config llama3_405b --topology v5p:8x8x8 --slices 4

One text's activations between layers are 34 GB, which no chip of 32 GB holds: on TPU v6e the length has to be split as well
(`parallel.context`), on H100s the layers (`parallel.stage`) or the length.
"""

from configs import llama3_70b
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        llama3_70b.get_config(),
        model={"num_layers": 126, "num_heads": 128, "width": 16_384, "feedforward_width": 53_248},
        optimizer={"learning_rate": 8e-5},
        train={"num_steps": 1_200_000},
        parallel={"tensor": 4},
    )
