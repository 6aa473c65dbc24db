"""GPT-2 with 124 million parameters, trained as nanoGPT does (github.com/karpathy/nanoGPT, train_gpt2.py).

The corpus is a sample of FineWeb, for OpenWebText needs a loading script, which `datasets` no longer runs. The tokenizer is
trained on the corpus, with GPT-2's number of tokens; for GPT-2's own pass
`--data.tokenizer huggingface --data.tokenizer-path tokenizer.json`.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        data={
            "source": ("hf:HuggingFaceFW/fineweb:sample-10BT",),
            "validation_documents": 0.0005,
            "tokenizer_vocab_size": 50_257,
            "sequence_length": 1024,
        },
        model={
            "vocab_size": 50_257,
            "num_layers": 12,
            "num_heads": 12,
            "width": 768,
            "biases": True,
            "positions": "learned",
            "compute_dtype": "bfloat16",
        },
        optimizer={"learning_rate": 6e-4, "warmup_steps": 2000},
        # Half a million tokens a step; on eight devices a microbatch is nanoGPT's twelve sequences for each.
        train={"num_steps": 600_000, "batch_size": 480, "num_microbatches": 5},
        evaluation={"every_steps": 1000, "num_batches": 200, "batch_size": 96},
        checkpoint={"every_steps": 1000},
    )
