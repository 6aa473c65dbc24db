"""An encoder that fills in masked tokens of Multi30k's captions, in both languages; `seq2seq_from_pretrained` begins with it.

It has the shape of the encoder in `multi30k_transformer`, with rotary positions, and reads the same files; that they are
translations of one another it is not told.
"""

from configs import multi30k_transformer
from transformer.config import Config, DataConfig, replace


def get_config() -> Config:
    base = multi30k_transformer.get_config()
    pairs = ("source_path", "target_path", "validation_source_path", "validation_target_path")
    return replace(
        base,
        objective={"name": "masked_lm", "mask_rate": 0.3, "label_smoothing": 0.0},
        data={
            **{name: getattr(DataConfig(), name) for name in pairs},
            "path": ("multi30k/train.en", "multi30k/train.de"),
            "validation_tail": 0.02,
        },
        # With sinusoidal positions 2,000 steps learn how frequent tokens are and no more.
        model={"architecture": "encoder", "positions": "rotary", "dropout": 0.1},
        optimizer={"learning_rate": 2e-3},
    )
