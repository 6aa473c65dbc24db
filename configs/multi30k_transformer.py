"""German to English on Multi30k, with a tiny Transformer of Vaswani et al. 2017 (arXiv:1706.03762), norms first.

On so few pairs larger ones only memorise more (Wu et al. 2021, arXiv:2105.14462, whose size this is).

Multi30k (Elliott et al. 2016, arXiv:1605.00459) has 29,000 captions in both languages, here in lower case and with spaces
between words and marks, a line each: https://github.com/multi30k/dataset, saved in the working directory as
multi30k/train.de, multi30k/train.en, multi30k/val.de and multi30k/val.en; test_2016.de and test_2016.en are for BLEU.
"""

from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        Config(),
        objective={"name": "seq2seq", "label_smoothing": 0.1},
        data={
            "source_path": ("multi30k/train.de",),
            "target_path": ("multi30k/train.en",),
            "validation_source_path": ("multi30k/val.de",),
            "validation_target_path": ("multi30k/val.en",),
            "tokenizer_vocab_size": 4000,
            "sequence_length": 128,
        },
        model={
            "architecture": "encoder_decoder",
            "num_layers": 4,
            "num_heads": 4,
            "width": 128,
            "feedforward_width": 256,
            "activation": "relu",
            "positions": "sinusoidal",
            "biases": True,
            "dropout": 0.2,
        },
        optimizer={"learning_rate": 3e-3, "warmup_steps": 400, "beta2": 0.98, "final_ratio": 0.0},
        # 16 rows of 128 tokens are about 130 pairs.
        train={"num_steps": 5000, "batch_size": 16},
        evaluation={"every_steps": 250, "sample_tokens": 0},
    )
