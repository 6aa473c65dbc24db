"""SST-2: is a sentence about a film positive or negative? A small classifier that begins with random values.

The sentences and labels come from TFDS (glue/sst2, Wang et al. 2018, arXiv:1804.07461) or, with `--data.path` and
`--data.validation-path`, from records (.jsonl, .csv, .tsv, .parquet) with the fields `sentence` and `label`.
"""

from configs import sst2_pretrain
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        sst2_pretrain.get_config(),
        objective={"name": "sequence_classification", "pooling": "mean"},
        data={"label_field": "label"},
        optimizer={"learning_rate": 1e-3, "warmup_steps": 20, "final_ratio": 0.0},
        train={"num_steps": 600},
        evaluation={"every_steps": 100},
        checkpoint={"every_steps": 100},
    )
