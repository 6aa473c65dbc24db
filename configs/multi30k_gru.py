"""German to English on Multi30k with recurrent networks, as it was done before the Transformer.

A GRU (Cho et al. 2014, arXiv:1406.1078) reads the sentence in both directions, and another writes the translation; before
each token its state reads the sentence by an additive score (Bahdanau et al. 2015, arXiv:1409.0473).
"""

from configs import multi30k_transformer
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        multi30k_transformer.get_config(),
        # 1.84 million parameters, as multi30k_transformer has.
        model={
            "layers": "gru/none",
            "num_layers": 1,
            "num_encoder_layers": 1,
            "cross_attention": "bahdanau",
            "recurrent_width": 368,
            "positions": "none",
            "dropout": 0.3,
        },
        optimizer={"learning_rate": 4e-3},
    )
