"""The size of a vocabulary where there is no data to ask."""

from transformer.config import Config, ConfigError, known_vocab_size
from transformer.objectives import objective_of


def without_data(config: Config) -> int:
    """Returns the tokens of the tokenizer, as the configuration tells them, or leaves them in `model.vocab_size`.

    Raises ConfigError where only the data tells.
    """
    size = known_vocab_size(config.data)
    if size is None and config.model.vocab_size is not None:
        size = config.model.vocab_size - objective_of(config).num_extra_tokens(config)
    if size is None:
        tokenizer = f"data.tokenizer = {config.data.tokenizer!r}"
        raise ConfigError(f"model.vocab_size is needed: with {tokenizer} only the data tells it")
    return size
