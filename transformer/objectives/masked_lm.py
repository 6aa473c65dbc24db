"""Masked language modelling: some tokens of a text from all the others (Devlin et al. 2019, arXiv:1810.04805)."""

import functools

import numpy as np

from transformer.config import Config
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.cross_entropy import TokenObjective

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that are replaced by MASK and by any token; the others stay (appendix C.2)."""


def _starts(tokenizer: Tokenizer, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Returns which tokens are the first of a word: after a space or with one in front, and at the start of a text."""
    opens, closes = _spaces(tokenizer, tuple(np.unique(tokens).tolist()))
    after = np.array([True, *(closes[token] for token in tokens[:-1].tolist())])
    return after | np.array([opens[token] for token in tokens.tolist()]) | np.append(True, np.diff(segments) != 0)


def _spaces(tokenizer: Tokenizer, tokens: tuple[int, ...]) -> tuple[dict[int, bool], dict[int, bool]]:
    pieces = {token: _piece(tokenizer, token) for token in tokens}
    opens = {token: piece[:1].isspace() for token, piece in pieces.items()}
    return opens, {token: not piece or piece[-1:].isspace() for token, piece in pieces.items()}


@functools.lru_cache(maxsize=2**18)
def _piece(tokenizer: Tokenizer, token: int) -> str:
    """Returns what a token adds to a text: some tokenizers drop the space before the first token of one."""
    (anchor,) = tokenizer.encode("a")[-1:].tolist()
    return tokenizer.decode([anchor, token])[len(tokenizer.decode([anchor])) :]


class MaskedLM(TokenObjective):
    """The tokens that were chosen, from all others."""

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the window with each token, or whole word, chosen with probability `mask_rate` and most of them replaced.

        MASK is `mask_token`, or the token after the tokenizer's. The targets are the tokens as they were; only the chosen ones have weight.
        """
        tokens = window["inputs"]
        is_text = ~np.isin(tokens, (tokenizer.bos, tokenizer.eos))
        units = np.arange(len(tokens))
        if config.objective.whole_words:
            units = np.cumsum(_starts(tokenizer, tokens, window["segment_ids"])) - 1
        chosen = (rng.random(len(tokens)) < config.objective.mask_rate)[units] & is_text
        fate = rng.random(len(tokens))
        own = config.objective.mask_token
        inputs = np.where(chosen & (fate < MASKED), tokenizer.vocab_size if own is None else own, tokens)
        drawn = rng.integers(0, tokenizer.vocab_size, len(tokens))
        inputs = np.where(chosen & (fate >= MASKED) & (fate < MASKED + RANDOM), drawn, inputs)
        return window | {"inputs": inputs, "targets": tokens, "weights": chosen.astype(np.float32)}

    def num_extra_tokens(self, config: Config) -> int:
        return int(config.objective.mask_token is None)
