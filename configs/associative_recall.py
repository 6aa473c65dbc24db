"""Associative recall: the value of each key, asked for after all were told (Arora et al. 2023, arXiv:2312.04927).

A layer that sees one token back, so that a value can be told from its key, then the layer that has to remember; no MLPs. The
examples are made up, a new one every time; the corpus only has to be there. `transformer study recall` compares mixers.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        objective={"name": "associative_recall", "num_pairs": 16},
        data={"source": ("python_stdlib",), "tokenizer": "bytes", "sequence_length": 48},
        model={
            "layers": "attention.window/none+attention/none",
            "window": 2,
            "num_layers": 2,
            "width": 64,
            "num_heads": 2,
            "initial_scale": 0.05,
        },
        optimizer={"learning_rate": 1e-3, "schedule": "constant", "weight_decay": 0.0},
        train={"num_steps": 500, "batch_size": 64},
        evaluation={"every_steps": 100, "num_batches": 8, "sample_tokens": 0},
        checkpoint={"every_steps": 500},
    )
