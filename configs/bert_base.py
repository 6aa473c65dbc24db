"""BERT base (Devlin et al. 2018, arXiv:1810.04805): its encoder and its masked language model, 108,888,576 parameters.

As published but for the second objective and what belongs to it (next sentences, kinds of segments, the pooler), and for
the norm after the embedding and the layer before the output head, which later encoders leave out too. The books of
BooksCorpus are no longer given away, so the corpus is Wikipedia; the tokenizer is trained on it, and with the mask has as
many tokens as BERT's. Nor is there dropout of attention weights, a bias of the output head, or a first part on rows of 128.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        data={
            "source": ("hf:wikimedia/wikipedia:20231101.en",),
            "validation_documents": 0.001,
            "tokenizer_vocab_size": 30_521,
            "sequence_length": 512,
        },
        objective={"name": "masked_lm", "mask_rate": 0.15},
        model={
            "architecture": "encoder",
            "num_layers": 12,
            "num_heads": 12,
            "width": 768,
            "activation": "gelu_exact",
            "norm_placement": "post",
            "norm_epsilon": 1e-12,
            "biases": True,
            "positions": "learned",
            "num_positions": 512,
            "dropout": 0.1,
            "depth_scaled_init": False,
            "compute_dtype": "bfloat16",
        },
        optimizer={
            "learning_rate": 1e-4,
            "schedule": "linear",
            "final_ratio": 0.0,
            "warmup_steps": 10_000,
            "beta2": 0.999,
            "epsilon": 1e-6,
            "weight_decay": 0.01,
        },
        train={"num_steps": 1_000_000, "batch_size": 256},
        evaluation={"every_steps": 10_000, "num_batches": 100, "sample_tokens": 0},
        checkpoint={"every_steps": 10_000},
    )
