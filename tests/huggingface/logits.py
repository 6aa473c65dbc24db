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
    experts = {"layers": "attention/experts", "num_experts": 8} if "expert" in axes else {}
    config = replace(Config(), model=experts, train={"batch_size": 8}, parallel={"fsdp": 1, **axes})
    return make_mesh(config, jax.devices()[: int(np.prod(list(axes.values()), dtype=int))])


def packed(ids: Sequence[np.ndarray], rows: int = 1) -> dict[str, np.ndarray]:
    """Returns a batch whose rows hold all texts one after another, then two columns of padding.

    An encoder-decoder writes them, and reads each backwards.
    """

    def columns(ids: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        segments = np.concatenate([np.full(len(text), number + 1) for number, text in enumerate(ids)])
        positions = np.concatenate([np.arange(len(text)) for text in ids])
        batch = {"inputs": np.concatenate(ids), "positions": positions, "segment_ids": segments}
        return {name: np.tile(np.pad(row, (0, 2))[None], (rows, 1)).astype(np.int32) for name, row in batch.items()}

    return columns(ids) | _read(columns([text[::-1] for text in ids]))


def padded(ids: Sequence[np.ndarray], rows: int | None = None) -> dict[str, np.ndarray]:
    """Returns a batch with a text in each row; an encoder-decoder writes it, and reads it backwards."""
    longest = max(len(text) for text in ids)
    chosen = [ids[row % len(ids)] for row in range(rows or len(ids))]

    def columns(ids: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        def filled(values: Any) -> np.ndarray:
            return np.stack([np.pad(values(text), (0, longest - len(text))) for text in ids]).astype(np.int32)

        places = filled(lambda text: np.arange(len(text)))
        return {"inputs": filled(np.asarray), "positions": places, "segment_ids": filled(np.ones_like)}

    return columns(chosen) | _read(columns([text[::-1] for text in chosen]))


def _read(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"encoder_{name}": array for name, array in batch.items()}


def our_logits(model: ModelConfig, params: Any, mesh: Mesh, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Returns float32 logits, those of the padding of the vocabulary left out; hidden states of an encoder without a head."""
    is_headless = model.architecture == "encoder" and not (model.head_transform or model.num_labels)
    network = Transformer(dataclasses.replace(model, scan_layers=False))

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        outputs = apply(network, params, batch)
        return outputs.hidden if is_headless else outputs.logits(outputs.hidden)

    with jax.set_mesh(mesh):
        return np.asarray(run(params, batch))[..., : model.num_labels or max(model.vocab_size or 0, model.width)]


def of_texts(logits: np.ndarray, batch: dict[str, np.ndarray], ids: Sequence[np.ndarray], is_packed: bool) -> list[Any]:
    """Returns the logits of each text, cut out of the batch."""
    if not is_packed:
        return [logits[row, : len(text)] for row, text in enumerate(ids)]
    starts = np.cumsum([0, *(len(text) for text in ids)])
    return [logits[0, start : start + len(text)] for start, text in zip(starts, ids, strict=False)]


def difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Returns norm(found - expected) / norm(expected), the worst of all texts; where one token is expected, of that."""
    return max(
        float(np.linalg.norm(one[: len(other)] - other) / np.linalg.norm(other))
        for one, other in zip(found, expected, strict=True)
    )
