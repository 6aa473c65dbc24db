"""Characters of Shakespeare with nanoGPT's GPU dimensions (github.com/karpathy/nanoGPT, train_shakespeare_char.py).

The text is 1.1 MB: https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt,
saved as tiny_shakespeare.txt in the working directory, or anywhere with `--data.path FILE`.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        data={
            "path": ("tiny_shakespeare.txt",),
            "validation_tail": 0.1,
            "tokenizer": "characters",
            "sequence_length": 256,
        },
        model={"num_layers": 6, "num_heads": 6, "width": 384, "dropout": 0.2},
        optimizer={"learning_rate": 1e-3, "final_ratio": 0.1, "warmup_steps": 100, "beta2": 0.99, "weight_decay": 0.1},
        train={"num_steps": 5000, "batch_size": 64},
        evaluation={"every_steps": 250, "sample_tokens": 500},
    )
