"""Associative recall with two layers: the value of each key, asked for after all were told (arXiv:2312.04927).

The examples are made up, a new one every time; the corpus only has to be there. `transformer study recall` compares mixers.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        objective={"name": "associative_recall", "num_pairs": 16},
        data={"source": ("python_stdlib",), "tokenizer": "bytes", "sequence_length": 48},
        model={"num_layers": 2, "width": 64, "num_heads": 1},
        optimizer={"learning_rate": 4e-3, "warmup_steps": 50, "final_ratio": 0.02},
        train={"num_steps": 1500, "batch_size": 64},
        evaluation={"every_steps": 250, "num_batches": 16, "sample_tokens": 0},
        checkpoint={"every_steps": 500},
    )
