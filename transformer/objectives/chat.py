"""Chat tuning: what the assistant says, token by token, from all that was said before.

The weights of the examples are 1 where the assistant has said the target and 0 elsewhere (Ouyang et al. 2022, arXiv:2203.02155,
section 3.5, trains on demonstrations alike).
"""

from transformer.objectives.cross_entropy import TokenObjective


class Chat(TokenObjective):
    """The assistant's words."""
