"""A small encoder that fills in masked tokens of SST-2's sentences (Socher et al. 2013), to begin a classifier with.

`sst2_from_pretrained` is that classifier. The sentences come from TFDS (glue/sst2) or, with `--data.path`, from records whose
field `sentence` holds them. Twice BERT's share of tokens is masked (Wettig et al. 2023, arXiv:2202.08005, found more than 15% to
serve better).
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        objective={"name": "masked_lm", "mask_rate": 0.3},
        data={
            "source": ("tfds:glue/sst2",),
            "validation_split": "validation",
            "text_field": "sentence",
            "tokenizer_vocab_size": 4096,
            "sequence_length": 128,
        },
        model={
            "architecture": "encoder",
            "num_layers": 2,
            "width": 128,
            "num_heads": 4,
            "num_positions": 128,
            "dropout": 0.1,
        },
        optimizer={"learning_rate": 2e-3, "warmup_steps": 200},
        # A row of 128 tokens holds about five sentences; of SST's 6,920 this reads each about forty times.
        train={"num_steps": 8000, "batch_size": 8},
        evaluation={"every_steps": 1000, "sample_tokens": 0},
        checkpoint={"every_steps": 1000},
    )
