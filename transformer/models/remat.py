"""What a layer keeps for its gradient; the rest is computed again (Chen et al. 2016, arXiv:1604.06174)."""

from collections.abc import Callable
from typing import Any

import jax

from transformer.config import ModelConfig


def rematerialized(config: ModelConfig, run: Callable[..., Any], prevent_cse: bool) -> Callable[..., Any]:
    """Returns `run`, one layer, so that it keeps no more than `config.remat` says."""
    policies, names = jax.checkpoint_policies, config.remat_names
    policy = {
        "full": lambda: None,
        "dots": lambda: policies.dots_with_no_batch_dims_saveable,
        "names": lambda: policies.save_only_these_names(*names),
        "offload": lambda: policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=names,
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[config.remat]()
    return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)
