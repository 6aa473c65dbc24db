"""The demo: the Python standard library's own source, on two CPU cores, in a few minutes."""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        data={"source": ("python_stdlib",), "tokenizer": "bpe", "tokenizer_vocab_size": 4096, "sequence_length": 256},
        model={"num_layers": 4, "width": 256, "num_heads": 4},
        optimizer={"learning_rate": 2e-3, "warmup_steps": 30, "final_ratio": 0.02},
        train={"num_steps": 250, "batch_size": 8},
        evaluation={"every_steps": 50, "num_batches": 20, "sample_prompt": "def ", "sample_tokens": 100},
        checkpoint={"every_steps": 50},
    )
