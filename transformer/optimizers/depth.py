"""Learning rates by depth: what is far from the top, and general, moves less than what is near it."""

from typing import Any

import jax
import numpy as np

from transformer.config import Config
from transformer.models.parameters import ParameterSpec, Tree, is_spec


def depth_factors(config: Config, specs: Tree) -> Tree:
    """Returns the factor of each parameter's learning rate: `depth_rate` for each layer between it and the top.

    Of L layers, number l, counted from 1, has depth l, and embeddings, positions and a stack's bias have depth 0: the factor
    of depth d is rate^(L - d) (Howard & Ruder 2018, arXiv:1801.06146, section 3.2; as ELECTRA has it, Clark et al. 2020,
    arXiv:2003.10555, appendix B). Final norms and heads are above all layers: 1. Encoder and decoder count each for
    itself, and a table that both read is below the deeper one. Of stacked layers, the factors lie along the first dimension.
    """
    model, rate = config.model, config.optimizer.depth_rate
    depths = {"encoder": model.encoder_depth if model.has_decoder else model.num_layers, "decoder": model.num_layers}
    periods = {"encoder": len(model.encoder_kinds), "decoder": len(model.kinds)}
    deepest = max(depths[name] for name in specs if name in depths)

    def factor(path: Any, spec: ParameterSpec) -> Any:
        stack, *rest = [str(key.key) for key in path]
        if stack not in depths:
            return rate**deepest if spec.role == "embedding" else 1.0
        if rest[0] != "layers":
            return 1.0 if rest[0] == "final_norm" else rate ** depths[stack]
        assert spec.num_layers is not None, "layers are stacked"
        # Those of one place in the pattern's period are stacked together.
        place = int(rest[2]) if rest[1] == "blocks" else 0
        above = depths[stack] - 1 - place - periods[stack] * np.arange(spec.num_layers)
        return np.asarray(rate**above, np.float32).reshape(-1, *[1] * (len(spec.shape) - 1))

    return jax.tree_util.tree_map_with_path(factor, specs, is_leaf=is_spec)
