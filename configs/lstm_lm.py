"""The demo's text, steps and number of parameters with an LSTM in the place of the Transformer."""

from configs import stdlib
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        stdlib.get_config(),
        # 4.1 million parameters, the embedding's among them, as the demo's 4.2.
        model={"layers": "lstm/none", "num_layers": 2, "recurrent_width": 480, "positions": "none"},
        optimizer={"learning_rate": 5e-3},
    )
