"""The demo's text and size for an encoder that fills in masked tokens, as `bert_base` does."""

from configs import stdlib
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        stdlib.get_config(),
        objective={"name": "masked_lm"},
        model={"architecture": "encoder"},
        evaluation={"sample_tokens": 0},
    )
