"""The MLP: the same for every token."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from transformer.config import ModelConfig
from transformer.models.feedforward import Auxiliary
from transformer.models.layers import Linear, materialize, residual_std
from transformer.models.mixers import Context
from transformer.parallel.sharding import constrain

ACTIVATIONS = {
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
    "silu": jax.nn.silu,
    # The gates of Shazeer 2020 (arXiv:2002.05202).
    "swiglu": jax.nn.silu,
    "geglu": partial(jax.nn.gelu, approximate=True),
    "reglu": jax.nn.relu,
}


class MLP(nnx.Module):
    """Two linear maps around an activation, or a gated one."""

    def __init__(self, config: ModelConfig, num_layers: int):
        self.config = config
        self.up = Linear(config, (config.width, config.ff_width), ("embed", "mlp"))
        self.gate = Linear(config, (config.width, config.ff_width), ("embed", "mlp")) if config.gated else None
        self.down = Linear(config, (config.ff_width, config.width), ("mlp", "embed"), residual_std(config, num_layers))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Auxiliary]:
        activation = ACTIVATIONS[self.config.activation]
        hidden = self._hidden(self.up, x)
        if self.gate is None:
            hidden = activation(hidden)
        else:
            hidden = hidden * activation(self._hidden(self.gate, x))
        return self.down(materialize(hidden)), {}

    def _hidden(self, linear: Linear, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        return checkpoint_name(materialize(constrain(linear(x), "batch", "length", "mlp")), "feedforward_hidden")
