"""The base model of "Attention Is All You Need" (Vaswani et al. 2017, arXiv:1706.03762): English to German, WMT 2014.

TFDS downloads the 4.5 million pairs. The paper reports BLEU 27.3 on newstest2014 after 100,000 steps, with the average of the
last five checkpoints and beams of 4.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        objective={"name": "seq2seq", "label_smoothing": 0.1},
        data={
            "source": ("tfds:wmt14_translate/de-en",),
            "source_field": "en",
            "target_field": "de",
            "validation_documents": 0.0007,
            "tokenizer_vocab_size": 37_000,
            "sequence_length": 256,
        },
        model={
            "architecture": "encoder_decoder",
            "num_layers": 6,
            "num_heads": 8,
            "width": 512,
            "feedforward_width": 2048,
            "activation": "relu",
            "positions": "sinusoidal",
            "norm_placement": "post",
            "biases": True,
            "dropout": 0.1,
            # Embeddings of variance 1 once they are multiplied by sqrt(width), and Glorot's weights where D meets D.
            "initial_scale": 512**-0.5,
            "depth_scaled_init": False,
            "compute_dtype": "bfloat16",
        },
        # The paper's schedule, width^-0.5 min(step^-0.5, step * 4000^-1.5), has its peak after 4,000 steps.
        optimizer={
            "learning_rate": (512 * 4000) ** -0.5,
            "schedule": "inverse_sqrt",
            "warmup_steps": 4000,
            "beta2": 0.98,
            "epsilon": 1e-9,
            "weight_decay": 0.0,
            "clip_norm": 0.0,
        },
        # 96 packed rows of 256 tokens: the paper's 25,000 tokens of each language a step.
        train={"num_steps": 100_000, "batch_size": 96},
        evaluation={"every_steps": 2000, "sample_tokens": 0},
        checkpoint={"every_steps": 1000, "keep_latest": 5},
    )
