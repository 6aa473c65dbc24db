"""The model that `transformer benchmark rnn` changes the mixer of: bytes, two layers, and little besides."""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        data={"source": ("python_stdlib",), "tokenizer": "bytes", "sequence_length": 1024},
        model={"num_layers": 2, "width": 256, "num_heads": 4, "scan_layers": False},
        train={"batch_size": 16},
        evaluation={"sample_tokens": 0},
    )
