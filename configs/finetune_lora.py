"""A LoRA adapter for the demo's model: one that has read Python alone learns to write these pages of documentation.

python train.py --config configs/stdlib.py --workdir runs/stdlib
python train.py --config configs/finetune_lora.py --workdir runs/lora
"""

from configs import stdlib
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        stdlib.get_config(),
        data={"path": ("docs/*.md",), "validation_documents": 0.2},
        adapter={"kind": "lora", "base_run": "runs/stdlib"},
        optimizer={"learning_rate": 5e-3, "weight_decay": 0.0},
        train={"num_steps": 100},
        evaluation={"num_batches": 0, "sample_prompt": "The model "},
    )
