"""The shape of Llama 3.2 1B (Meta 2024), 1,235,814,400 parameters, pretrained from the beginning.

The peak rate is that of the 8B model in Dubey et al. (2024, arXiv:2407.21783, table 3), from which the 1B model was pruned
and distilled; warm-up and last rate are our choice. It wants Llama's own tokenizer, `tokenizer.json`, in the working directory or anywhere with
`--data.tokenizer-path FILE` (extra `hf`). The corpus is a sample of FineWeb.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        data={
            "source": ("hf:HuggingFaceFW/fineweb:sample-100BT",),
            "validation_documents": 0.0001,
            "tokenizer": "huggingface",
            "tokenizer_path": "tokenizer.json",
            "sequence_length": 8192,
        },
        model={
            "vocab_size": 128_256,
            "num_layers": 16,
            "num_heads": 32,
            "num_kv_heads": 8,
            "width": 2048,
            "feedforward_width": 8192,
            "activation": "swiglu",
            "norm": "rmsnorm",
            "rotary_base": 500_000.0,
            "rotary_scaling": "llama3",
            "rotary_factor": 32.0,
            "rotary_original_length": 8192,
            "remat": "full",
            "compute_dtype": "bfloat16",
        },
        optimizer={"learning_rate": 3e-4, "final_ratio": 0.01, "warmup_steps": 8000},
        # Four million tokens a step, a hundred billion in all.
        train={"num_steps": 25_000, "batch_size": 512},
        evaluation={"every_steps": 1000, "num_batches": 20},
        checkpoint={"every_steps": 1000},
    )
