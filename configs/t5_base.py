"""T5 v1.1 base, 247,577,856 parameters: the encoder-decoder of Raffel et al. (2019, arXiv:1910.10683) with gated feed-forward
layers (Shazeer 2020, arXiv:2002.05202), a head of its own, and no dropout while it is pretrained.

Span corruption makes 512 tokens to read and 114 to write of 568 tokens of text. Batch and number of steps are those of the
paper's baseline (its section 3.1); the rate rises to 0.01 first, where theirs begins at it. The tokenizer is trained on the corpus: 32,000 tokens, and 100 that stand for spans; the
table is as large as T5's.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        data={
            "source": ("hf:allenai/c4:en",),
            "validation_documents": 0.0005,
            "tokenizer": "unigram",
            "tokenizer_vocab_size": 32_000,
            "source_length": 512,
            "sequence_length": 114,
        },
        objective={"name": "span_corruption", "mask_rate": 0.15, "mean_span_length": 3.0, "z_loss": 1e-4},
        model={
            "architecture": "encoder_decoder",
            "vocab_size": 32_128,
            "num_layers": 12,
            "num_heads": 12,
            "width": 768,
            "feedforward_width": 2048,
            "activation": "geglu",
            "norm": "rmsnorm",
            "norm_epsilon": 1e-6,
            "positions": "relative",
            "attention_scale": 1.0,
            "tied_embeddings": False,
            "depth_scaled_init": False,
            "compute_dtype": "bfloat16",
        },
        optimizer={
            "name": "adafactor",
            "learning_rate": 1e-2,
            "schedule": "inverse_sqrt",
            "warmup_steps": 10_000,
            "weight_decay": 0.0,
            "clip_norm": 0.0,
        },
        train={"num_steps": 524_288, "batch_size": 128},
        evaluation={"every_steps": 10_000, "num_batches": 100, "sample_tokens": 0},
        checkpoint={"every_steps": 10_000},
    )
