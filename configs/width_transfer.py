"""A small model under muP: the learning rate that is best at this width is the one for wider models.

Bytes of the Python standard library, so that the width and not the vocabulary decides; `transformer study mup` compares
widths and rates (Yang et al. 2022, arXiv:2203.03466).
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        data={"source": ("python_stdlib",), "tokenizer": "bytes", "sequence_length": 128},
        model={"num_layers": 2, "width": 128, "num_heads": 2, "parametrization": "mup", "base_width": 128},
        optimizer={"learning_rate": 2**-9, "warmup_steps": 20, "final_ratio": 0.0, "weight_decay": 0.0},
        train={"num_steps": 200, "batch_size": 16},
        evaluation={"every_steps": 200, "num_batches": 16, "sample_tokens": 0},
        checkpoint={"every_steps": 0},
        tracking={"tensorboard": False, "plot": False},
    )
