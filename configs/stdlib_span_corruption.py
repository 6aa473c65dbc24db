"""The demo's text and size for an encoder-decoder that puts removed spans back, as `t5_base` does."""

from configs import stdlib
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        stdlib.get_config(),
        # 284 tokens of text make 256 to read and 58 to write.
        data={"source_length": 256, "sequence_length": 58},
        objective={"name": "span_corruption"},
        model={"architecture": "encoder_decoder", "num_layers": 2},
        evaluation={"sample_tokens": 0},
    )
