"""Models of the tests of generation: so small, and of so few shapes, that one compilation serves many tests."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.run import CHECKPOINTS
from transformer.config import CheckpointConfig, Config, ModelConfig, replace, to_json
from transformer.data.plain_tokenizers import CharacterTokenizer
from transformer.data.tokenizers import BOS, PAD, Tokenizer
from transformer.inference.text import ends_of
from transformer.models.parameters import ParameterSpec, Tree, map_specs, parameter_specs
from transformer.models.transformer import Transformer, apply

TOKENIZER = CharacterTokenizer("abcdefgh ")
"""Thirteen tokens, of which eleven can be drawn: the end, the unknown, and nine characters."""

ENDLESS = CharacterTokenizer(TOKENIZER.characters)
"""The same, but its end, a row that only pads the tables, is never drawn."""
ENDLESS.eos = 100

SEVERAL = CharacterTokenizer(TOKENIZER.characters)
"""The same, but a text ends at an a too, as at one of the several ends of a published model."""
SEVERAL.more_ends = tuple(TOKENIZER.encode("a").tolist())


@functools.cache
def build(seed: int = 3, vocab_size: int = TOKENIZER.vocab_size, **changes: Any) -> tuple[Transformer, Tree]:
    """The same model for the same changes: what is compiled for it serves several tests."""
    config = ModelConfig(
        vocab_size=vocab_size,
        num_layers=1,
        width=16,
        num_heads=2,
        tied_embeddings=False,
        scan_layers=False,
        attention_implementation="reference",
    )
    model = Transformer(dataclasses.replace(config, **changes))
    rng = np.random.default_rng(seed)

    def value(spec: ParameterSpec) -> jax.Array:
        return jnp.asarray(
            np.full(spec.shape, spec.role == "norm") + 0.7 * rng.standard_normal(spec.shape), jnp.float32
        )

    return model, map_specs(value, parameter_specs(model))


@functools.partial(jax.jit, static_argnums=0)
def _uncached(model: Transformer, params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    outputs = apply(model, params, batch)
    return outputs.logits(outputs.hidden)


def uncached_logits(
    model: Transformer,
    params: Tree,
    texts: list[list[int]],
    num_prefix_tokens: int = 0,
    source: str | None = None,
    tokenizer: Tokenizer = TOKENIZER,
) -> np.ndarray:
    """Logits [B, T, V] from one pass without a cache, float64, -inf for what is never drawn; padded to 32 x 32 tokens."""
    count = len(texts)
    texts = texts + [[BOS]] * (-count % 32)

    def columns(name: str, rows: list[list[int]]) -> dict[str, np.ndarray]:
        lengths, index = np.array([[len(row)] for row in rows]), np.arange(32)[None]
        return {
            f"{name}inputs": np.stack([np.pad(row, (0, 32 - len(row))) for row in rows]).astype(np.int32),
            f"{name}positions": np.minimum(index, lengths - 1).astype(np.int32),
            f"{name}segment_ids": (index < lengths).astype(np.int32),
        }

    batch = columns("", texts) | {"prefix": np.broadcast_to(np.arange(32) < num_prefix_tokens, (len(texts), 32))}
    if source is not None:
        batch |= columns("encoder_", [[*tokenizer.encode(source).tolist(), tokenizer.eos]] * len(texts))
    logits = np.array(_uncached(model, params, batch), np.float64)[:count, :, : model.config.vocab_size]
    logits[:, :, [PAD, BOS]] = -np.inf
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def all_texts(
    model: Transformer, params: Tree, tokenizer: Tokenizer, prompt: str, max_tokens: int
) -> dict[tuple[int, ...], float]:
    """Log-probability of every text of up to `max_tokens` tokens after a prompt, those with an end and those that reach
    the limit; a decoder continues the prompt, an encoder-decoder reads it. Each step is one pass over all of them."""
    is_read = model.encoder is not None
    begin = [BOS] if is_read else [BOS, *tokenizer.encode(prompt).tolist()]
    tokens = [token for token in range(tokenizer.vocab_size) if token not in (PAD, BOS)]
    found: dict[tuple[int, ...], float] = {}
    open_texts: dict[tuple[int, ...], float] = {(): 0.0}
    for length in range(1, max_tokens + 1):
        rows = [[*begin, *text] for text in open_texts]
        logits = uncached_logits(model, params, rows, source=prompt if is_read else None, tokenizer=tokenizer)
        scores = log_softmax(logits[:, len(begin) + length - 2])
        longer = {
            (*text, token): score + scores[row, token]
            for row, (text, score) in enumerate(open_texts.items())
            for token in tokens
        }
        ends = {text for text in longer if text[-1] in ends_of(tokenizer) or length == max_tokens}
        found |= {text: longer[text] for text in ends}
        open_texts = {text: score for text, score in longer.items() if text not in ends}
    assert np.isclose(np.exp(list(found.values())).sum(), 1)
    return found


def make_run(
    directory: Path,
    tokenizer: Tokenizer = TOKENIZER,
    seed: int = 3,
    objective: str = "",
    num_marks: int = 0,
    **changes: Any,
) -> Path:
    """Writes a run directory with the parameters of `build`, as if they had been trained."""
    model, params = build(seed, tokenizer.vocab_size + num_marks, **changes)
    usual = {"decoder": "causal", "encoder": "masked_lm", "encoder_decoder": "seq2seq"}
    objective = objective or usual[model.config.architecture]
    config = replace(
        Config(),
        model=dataclasses.asdict(model.config) | {"num_positions": 32},
        data={"tokenizer": "characters", "sequence_length": 16},
        objective={"name": objective},
        train={"batch_size": 8},
        parallel={"fsdp": 1, "tensor": 1},
        compilation_cache_dir="",
    )
    if objective == "seq2seq":
        config = replace(config, data={"source_path": ("x",), "target_path": ("x",)})
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(to_json(config))
    (directory / "corpus.json").write_text('{"fingerprint": "x"}')
    tokenizer.save(directory / "tokenizer")
    with Checkpoints(directory / CHECKPOINTS, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, params, {"step": jax.numpy.int32(1)})
        checkpoints.wait()
    return directory
