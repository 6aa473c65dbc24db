"""Recurrences over texts that are split over devices: each device runs its part, and states pass from one to the next.

What a part makes of the state before it is linear in that state. So each device finds the state that its part ends with
from none, and what becomes of a basis of states; from these all learn the state before their part at once, and run it. The
compiler merges what both runs compute alike, and drops outputs of the first, which nobody reads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from transformer.models.spans import Spans, own_part
from transformer.parallel.parts import AXIS, before, layout_of, on_parts


def run_over_parts(
    form: Callable[..., tuple[Array, Array]],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N P"],
    *gates: Array | None,
    spans: Spans,
    mixes_rows: bool,
) -> tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]:
    """Returns what `form(query, key, value, *gates, spans, state)` does from no state.

    `mixes_rows` tells whether a row of a state, one of a head's key dimensions, depends on other rows of the state
    before; otherwise each is multiplied by a number.
    """
    layout, apply = layout_of(query), jnp.matmul if mixes_rows else jnp.multiply

    def part(query: Array, key: Array, value: Array, gates: Any, spans: Spans) -> tuple[Array, Array]:
        spans = own_part(spans)
        rows = (query.shape[0], *query.shape[2:])
        basis = jnp.broadcast_to(jnp.eye(rows[-1]), (*rows, rows[-1])) if mixes_rows else jnp.ones((*rows, 1))
        nothing = jnp.zeros((*value.shape[:3], basis.shape[-1]), value.dtype)
        _, transition = form(query, key, nothing, *gates, spans, basis)
        _, own = form(query, key, value, *gates, spans, None)

        def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
            return apply(later[0], earlier[0]), later[1] + apply(later[0], earlier[1])

        _, state = before((transition, own), compose)
        output, state = form(query, key, value, *gates, spans, state)
        return output, jax.lax.all_gather(state, AXIS)[-1]

    specs = (*3 * (layout.activations,), layout.activations, layout.tokens)
    out_specs = (layout.activations, PartitionSpec(layout.batch, layout.heads))
    return on_parts(part, specs, out_specs)(query, key, value, gates, spans)
