"""What our model computes of texts that lie packed, or padded, in a batch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.config import Config, ModelConfig, replace
from transformer.models.transformer import Transformer, apply
from transformer.parallel.sharding import make_mesh


def mesh_of(**axes: int) -> Mesh:
    """Returns a mesh of these sizes, of one device without any."""
    config = replace(Config(), train={"batch_size": 8}, parallel={"fsdp": 1, **axes})
    return make_mesh(config, jax.devices()[: int(np.prod(list(axes.values()), dtype=int))])


def packed(ids: Sequence[np.ndarray], rows: int = 1) -> dict[str, np.ndarray]:
    """Returns a batch whose rows hold all texts one after another, then two columns of padding."""
    segments = np.concatenate([np.full(len(text), number + 1) for number, text in enumerate(ids)])
    positions = np.concatenate([np.arange(len(text)) for text in ids])
    batch = {"inputs": np.concatenate(ids), "positions": positions, "segment_ids": segments}
    return {name: np.tile(np.pad(row, (0, 2))[None], (rows, 1)).astype(np.int32) for name, row in batch.items()}


def padded(ids: Sequence[np.ndarray], rows: int | None = None) -> dict[str, np.ndarray]:
    """Returns a batch with a text in each row."""
    longest = max(len(text) for text in ids)
    chosen = [ids[row % len(ids)] for row in range(rows or len(ids))]

    def filled(values: Any) -> np.ndarray:
        return np.stack([np.pad(values(text), (0, longest - len(text))) for text in chosen]).astype(np.int32)

    ones = filled(np.ones_like)
    return {"inputs": filled(np.asarray), "positions": filled(lambda text: np.arange(len(text))), "segment_ids": ones}


def our_logits(model: ModelConfig, params: Any, mesh: Mesh, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Returns float32 logits, those of the padding of the vocabulary left out."""
    network = Transformer(dataclasses.replace(model, scan_layers=False))

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        outputs = apply(network, params, batch)
        return outputs.logits(outputs.hidden)

    with jax.set_mesh(mesh):
        return np.asarray(run(params, batch))[..., : model.vocab_size]


def of_texts(logits: np.ndarray, batch: dict[str, np.ndarray], ids: Sequence[np.ndarray], is_packed: bool) -> list[Any]:
    """Returns the logits of each text, cut out of the batch."""
    if not is_packed:
        return [logits[row, : len(text)] for row, text in enumerate(ids)]
    starts = np.cumsum([0, *(len(text) for text in ids)])
    return [logits[0, start : start + len(text)] for start, text in zip(starts, ids, strict=False)]


def difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Returns norm(found - expected) / norm(expected), the worst of all texts."""
    return max(
        float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in zip(found, expected, strict=True)
    )
