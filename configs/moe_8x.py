"""GPT-2 small with eight experts in the place of each MLP: 520,829,184 parameters.

A token passes through two experts of each layer, and so through 181,090,560 parameters. The load is evened out by the loss
of Switch (Fedus et al. 2021, arXiv:2101.03961), and the router's logits are kept small by that of ST-MoE (Zoph et al. 2022,
arXiv:2202.08906), with the weights that the papers give. No choice is dropped.
"""

from configs import gpt2_124m
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        gpt2_124m.get_config(),
        model={
            "layers": "attention/experts",
            "num_experts": 8,
            "experts_per_token": 2,
            "balance_loss": 0.01,
            "router_z_loss": 0.001,
        },
    )
