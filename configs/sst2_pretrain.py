"""A small decoder that reads the sentences of SST-2 (Socher et al. 2013), to begin a classifier with: `sst2_from_pretrained`.

The sentences come from TFDS (glue/sst2) or, with `--data.path`, from records whose field `sentence` holds them; other text
beside them makes a better beginning.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        data={
            "source": ("tfds:glue/sst2",),
            "validation_split": "validation",
            "text_field": "sentence",
            "tokenizer_vocab_size": 4096,
            "sequence_length": 128,
        },
        model={"num_layers": 2, "width": 128, "num_heads": 4, "num_positions": 128},
        optimizer={"learning_rate": 3e-3, "warmup_steps": 50},
        train={"num_steps": 1000, "batch_size": 32},
        evaluation={"every_steps": 250, "sample_tokens": 0},
    )
