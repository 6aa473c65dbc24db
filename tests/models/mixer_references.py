"""What each linear mixer computes of one text without padding, in double precision and in the most direct way."""

from collections.abc import Callable
from typing import Any

import numpy as np

from transformer.config import ModelConfig
from transformer.models.performer import projections


def linear(p: Any, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def heads(x: np.ndarray, count: int, config: ModelConfig) -> np.ndarray:
    """[T, K * H] to [T, N, H]: each head as often as query heads share it."""
    return np.repeat(x.reshape(len(x), count, -1), config.num_heads // count, axis=1)


def projected(config: ModelConfig, p: Any, x: np.ndarray) -> list[np.ndarray]:
    counts = (config.num_heads, config.kv_heads, config.kv_heads)
    names = ("query", "key", "value")
    return [heads(linear(p[n], x), count, config) for n, count in zip(names, counts, strict=True)]


def convolved(p: Any, x: np.ndarray) -> np.ndarray:
    x, kernel = linear(p["linear"], x), p["convolution"]["kernel"]
    y = np.zeros_like(x) + p["convolution"].get("bias", 0)
    for t in range(len(x)):
        for tap in range(min(len(kernel), t + 1)):
            y[t] += kernel[tap] * x[t - tap]
    return silu(y)


def weighted(weights: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Weights [N, T, T], normalised over the past, and values [T, N, P] to [T, N, P]."""
    weights = np.tril(weights)
    return np.einsum("nts,snp->tnp", weights / weights.sum(-1, keepdims=True), value)


def recurrence(query: np.ndarray, key: np.ndarray, value: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """Decays [T, N, H] of each dimension of a key."""
    state, output = np.zeros((*key.shape[1:], value.shape[-1])), []
    for q, k, v, d in zip(query, key, value, decay, strict=True):
        state = d[..., None] * state + k[..., None] * v[:, None]
        output.append(np.einsum("nh,nhp->np", q, state))
    return np.array(output)


def normalized(config: ModelConfig, p: Any, x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_epsilon) * p["scale"]


def gated(config: ModelConfig, p: Any, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The norm of each head, the gate, and the output projection."""
    y = normalized(config, p["norm"], y).reshape(len(x), -1) * silu(linear(p["gate"], x))
    return linear(p["output"], y)


def linear_attention(config: ModelConfig, p: Any, x: np.ndarray) -> Any:
    query, key, value = projected(config, p["heads"], x)
    query, key = (np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))) for y in (query, key))
    output = weighted(np.einsum("tnh,snh->nts", query, key), value)
    return linear(p["output"], output.reshape(len(x), -1))


def performer(config: ModelConfig, p: Any, x: np.ndarray) -> Any:
    query, key, value = projected(config, p["heads"], x)
    directions = projections(config.num_heads, config.num_features, config.state_dim).astype(np.float64)

    def features(y: np.ndarray) -> np.ndarray:
        y = y / config.state_dim**0.25
        return np.exp(np.einsum("tnh,nmh->tnm", y, directions) - np.sum(y**2, -1, keepdims=True) / 2)

    output = weighted(np.einsum("tnm,snm->nts", features(query), features(key)), value)
    return linear(p["output"], output.reshape(len(x), -1))


def retention(config: ModelConfig, p: Any, x: np.ndarray) -> Any:
    query, key, value = projected(config, p["heads"], x)
    half = config.state_dim // 2
    turn = np.exp(1j * np.arange(len(x))[:, None, None] * config.rotary_base ** (-np.arange(half) / half))
    query, key = ((y[..., :half] + 1j * y[..., half:]) * turn for y in (query, key))
    scores = np.einsum("tnh,snh->nts", query, key.conj()).real / np.sqrt(config.state_dim)
    distance = np.abs(np.arange(len(x))[:, None] - np.arange(len(x)))
    decays = np.array([1 - 2.0 ** -(5 + n) for n in range(config.num_heads)])[:, None, None] ** distance
    output = np.einsum("nts,snp->tnp", np.tril(scores * decays), value)
    return gated(config, p, output - output.mean(-1, keepdims=True), x)


def gated_linear_attention(config: ModelConfig, p: Any, x: np.ndarray) -> Any:
    query, key, value = projected(config, p["heads"], x)
    raw = heads(linear(p["decay_up"], linear(p["decay_down"], x)), config.num_heads, config)
    output = recurrence(query / np.sqrt(config.state_dim), key, value, sigmoid(raw) ** (1 / 16))
    return gated(config, p, output, x)


def step_and_decay(p: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step = np.log1p(np.exp(linear(p["project"], x) + p["bias"]))
    return step, np.exp(-np.exp(p["log_rate"]) * step)


def gated_delta_net(config: ModelConfig, p: Any, x: np.ndarray) -> Any:
    counts = {"query": config.num_heads, "key": config.kv_heads, "value": config.kv_heads}
    query, key, value = (heads(convolved(p[name], x), count, config) for name, count in counts.items())
    query, key = (y / np.sqrt(np.sum(y**2, -1, keepdims=True) + 1e-6) for y in (query, key))
    beta, (_, decay) = sigmoid(linear(p["beta"], x)), step_and_decay(p["decay"], x)
    output = np.zeros_like(value)
    for n in range(config.num_heads):
        state = np.zeros((config.state_dim, config.head_dim))
        for t in range(len(x)):
            k = key[t, n]
            erase = np.eye(len(k)) - beta[t, n] * np.outer(k, k)
            state = decay[t, n] * erase @ state + beta[t, n] * np.outer(k, value[t, n])
            output[t, n] = query[t, n] @ state / np.sqrt(config.state_dim)
    return gated(config, p, output, x)


def mamba2(config: ModelConfig, p: Any, x: np.ndarray) -> Any:
    groups = 1 if config.num_kv_heads is None else config.num_kv_heads
    query, key = (heads(convolved(p[name], x), groups, config) for name in ("query", "key"))
    value = heads(convolved(p["value"], x), config.num_heads, config)
    step, decay = step_and_decay(p["decay"], x)
    decay = np.broadcast_to(decay[..., None], key.shape)
    output = recurrence(query, key, step[..., None] * value, decay) + p["skip"][:, None] * value
    output = output.reshape(len(x), -1) * silu(linear(p["gate"], x))
    return linear(p["output"], normalized(config, p["norm"], output))


REFERENCES: dict[str, Callable[..., np.ndarray]] = {
    "linear_attention": linear_attention,
    "performer": performer,
    "retention": retention,
    "gated_linear_attention": gated_linear_attention,
    "gated_delta_net": gated_delta_net,
    "mamba2": mamba2,
}
