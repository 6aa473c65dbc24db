"""`transformer benchmark decode`: how soon the first token of a text comes, and how fast the others, by batch and prompt."""

import time
from dataclasses import dataclass, field
from typing import Any

from transformer.arguments import Overrides, Recipe
from transformer.benchmarks.measure import JsonFile, Measurement, Result, machine, tell, too_small
from transformer.config import Config, ConfigError, replace, validate


@dataclass(frozen=True)
class Options:
    """Generate with the model of a recipe, untrained, from prompts that are made up.

    Every number of prompts is tried with every length, on one device; texts end at their limit alone.
    """

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Prompts side by side."""
    prompt_tokens: tuple[int, ...] = (32, 256)
    """Tokens of each prompt."""
    new_tokens: int = 32
    """Tokens to generate."""
    rounds: int = 5
    """Times that each is timed."""
    json_file: JsonFile = ""
    """File to write the result to."""
    config: Overrides = field(default_factory=Config)


def run(options: Options) -> int:
    # The first of the new tokens counts apart.
    if problems := too_small(options, {"batch_sizes": 1, "prompt_tokens": 1, "rounds": 1, "new_tokens": 2}):
        raise ConfigError(problems)
    from transformer.parallel import startup

    startup.start(options.config)

    import jax

    from transformer.checkpointing.run import for_platform, resolve
    from transformer.inference.prompts import can_generate, max_new_tokens
    from transformer.models.parameters import init_parameters, num_parameters
    from transformer.models.transformer import Transformer
    from transformer.objectives import vocabulary, with_window

    config = validate(options.config)
    config = resolve(with_window(config), vocabulary.without_data(config))
    config = replace(config, model={"attention_implementation": "auto"})
    model = Transformer(for_platform(config.model, jax.default_backend()))
    if not can_generate(model):
        raise ConfigError(f"model.architecture = {config.model.architecture!r}: this model writes no text")
    room = max_new_tokens(model, max(options.prompt_tokens))
    if room is not None and options.new_tokens > room:
        positions = f"model.num_positions = {config.model.num_positions}"
        raise ConfigError(
            f"--prompt-tokens and --new-tokens are more than {positions}: give fewer, or --model.num-positions"
        )
    params = jax.jit(lambda: init_parameters(model, jax.random.key(config.seed)))()
    cases = [(size, length) for size in options.batch_sizes for length in options.prompt_tokens]
    seconds: dict[tuple[int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    for number in range(-1, options.rounds):
        tell("compiling" if number < 0 else f"round {number + 1} of {options.rounds}")
        for case in cases:
            found = generated(model, params, *case, options.new_tokens)
            if number >= 0:  # the first compiles
                seconds[case].append(found)
    measurements = {}
    for (size, length), found in seconds.items():
        label = f"batch {size}, prompt {length}"
        firsts, others = zip(*found, strict=True)
        measurements[f"{label}: first token"] = Measurement(firsts, "s")
        measurements[f"{label}: each further"] = Measurement(tuple(s / (options.new_tokens - 1) for s in others), "s")
        rates = tuple(size * (options.new_tokens - 1) / s for s in others)
        measurements[f"{label}: rate"] = Measurement(rates, "tokens/s")
    subject = {"parameters": num_parameters(model), "new_tokens": options.new_tokens}
    result = Result("decode", subject, machine(), measurements, {})
    print(text_of(result, cases))
    if options.json_file:
        result.write(options.json_file)
    return 0


def generated(model: Any, params: Any, size: int, length: int, new_tokens: int) -> tuple[float, float]:
    """Returns the seconds up to the first token of `size` texts after `length` tokens, and those up to the last."""
    import jax
    import numpy as np

    from transformer.inference.generate import first_tokens, further_tokens
    from transformer.inference.prompts import bucket
    from transformer.inference.sampling import Sampling

    def columns(prefix: str, width: int) -> dict[str, np.ndarray]:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (size, width)).astype(np.int32)
        places = np.broadcast_to(np.arange(width, dtype=np.int32), ids.shape)
        return {f"{prefix}inputs": ids, f"{prefix}positions": places, f"{prefix}segment_ids": np.ones_like(ids)}

    reads = model.encoder is not None
    batch = columns("encoder_", length) | columns("", 1) if reads else columns("", length)
    numbers = {"seed": np.uint32(0), "rows": np.zeros((size, 2), np.int32), "ends": np.array([-1], np.int32)}
    draw = Sampling(temperature=0.0).arrays() | numbers | {"forbidden": np.zeros(0, np.int32)}
    batch, draw, limit = jax.device_put((batch, draw, np.int32(new_tokens)))
    start = time.perf_counter()
    state = first_tokens(model, params, batch, draw, bucket(batch["inputs"].shape[1] + new_tokens))
    jax.block_until_ready(state)
    first = time.perf_counter()
    state = further_tokens(model, params, state, draw, limit)
    assert int(state["number"]) == new_tokens
    return first - start, time.perf_counter() - first


def text_of(result: Result, cases: list[tuple[int, int]]) -> str:
    """Returns the medians as a table to read."""
    rows = [f"{'batch':>6}{'prompt':>8}{'first token, ms':>18}{'each further, ms':>18}{'tokens/s':>12}"]
    for size, length in cases:
        parts = ("first token", "each further", "rate")
        first, further, rate = (result.measurements[f"batch {size}, prompt {length}: {part}"].median for part in parts)
        rows.append(f"{size:>6}{length:>8}{1e3 * first:>18.1f}{1e3 * further:>18.2f}{rate:>12,.0f}")
    return "\n".join(rows)
