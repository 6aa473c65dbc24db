"""Sequence to sequence: each token of a text from those before it and a whole other text, as in translation.

Sutskever et al. 2014 (arXiv:1409.3215); Bahdanau et al. 2014 (arXiv:1409.0473); Vaswani et al. 2017 (arXiv:1706.03762).
"""

from transformer.objectives.cross_entropy import TokenObjective


class Seq2Seq(TokenObjective):
    """A text from another."""
