"""Associative recall with two layers: the value of each key, asked for after all were told (arXiv:2312.04927).

The examples are made up, a new one every time; the corpus only has to be there. `transformer study recall` compares mixers.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        objective={"name": "associative_recall", "num_pairs": 16},
        data={"source": ("python_stdlib",), "tokenizer": "bytes", "sequence_length": 48},
        model={"layers": "attention/none", "num_layers": 2, "width": 64, "num_heads": 2, "initial_scale": 0.05},
        optimizer={"learning_rate": 1e-3, "schedule": "constant", "weight_decay": 0.0},
        train={"num_steps": 3000, "batch_size": 128},
        evaluation={"every_steps": 500, "num_batches": 8, "sample_tokens": 0},
        checkpoint={"every_steps": 500},
    )
