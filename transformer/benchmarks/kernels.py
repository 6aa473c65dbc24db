"""`transformer benchmark kernels`: each implementation of attention, and each mixer, by the length of the text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from transformer.arguments import Overrides, Recipe
from transformer.benchmarks.measure import JsonFile, Measurement, Result, machine, timed, too_small
from transformer.config import Config, ConfigError, LayerKind
from transformer.config.implementations import IMPLEMENTATIONS
from transformer.config.model import Mixer

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True)
class Options:
    """Time attention by every implementation that this machine has, and a layer of every mixer, forward and with gradient.

    Heads, widths and types are the recipe's; a text fills the batch. What needs more than --memory is compiled and not run.
    """

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Tokens of a text."""
    batch_size: int = 1
    """Texts."""
    only: tuple[str, ...] = ()
    """Names of implementations and mixers; none: all."""
    memory: float = 4.0
    """GiB that one may need."""
    rounds: int = 5
    """Times that each is timed."""
    json_file: JsonFile = ""
    """File to write the result to."""
    config: Overrides = field(default_factory=Config)


def run(options: Options) -> int:
    if problems := too_small(options, {"lengths": 1, "batch_size": 1, "rounds": 1, "memory": 0}):
        raise ConfigError(problems)
    known = (*IMPLEMENTATIONS, *get_args(Mixer)[1:])
    if unknown := [name for name in options.only if name not in known]:
        raise ConfigError(f"--only = {unknown[0]!r}: must be of {', '.join(known)}")
    from transformer.parallel import startup

    startup.start(options.config)

    import jax

    measurements: dict[str, Measurement] = {}
    needs: dict[str, int] = {}
    print(f"{'':<24}{'tokens':>8}{'forward, ms':>14}{'with gradient, ms':>20}{'MiB':>10}")
    for name in options.only or known:
        for length in options.lengths:
            size, row = options.batch_size, f"{name:<24}{length:>8}"
            made = _attention if name in IMPLEMENTATIONS else layer
            found = made(options.config, name, size, length)
            if isinstance(found, str):
                print(f"{row}  {found}", flush=True)
                continue
            function, arguments = found
            ahead = jax.jit(function).lower(*arguments).compile()
            both = jax.jit(_with_gradient(function)).lower(*arguments).compile()
            memory: Any = both.memory_analysis()
            label = f"{name}, {length} tokens"
            needs[label] = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
            if needs[label] > options.memory * 2**30:
                print(f"{row}{'':>34}{needs[label] / 2**20:>10,.0f}  not run", flush=True)
                continue
            calls: dict[str, Callable[[], Any]] = {
                "forward": lambda ahead=ahead, arguments=arguments: ahead(*arguments),
                "with gradient": lambda both=both, arguments=arguments: both(*arguments),
            }
            for part, seconds in timed(calls, options.rounds).items():
                measurements[f"{label}, {part}"] = Measurement(tuple(seconds), "s")
            first, second = (1e3 * measurements[f"{label}, {part}"].median for part in calls)
            print(f"{row}{first:>14.2f}{second:>20.2f}{needs[label] / 2**20:>10,.0f}", flush=True)
    if options.json_file:
        model = options.config.model
        subject = {
            "batch_size": options.batch_size,
            "heads": [model.num_heads, model.kv_heads, model.head_dim],
            "width": model.width,
            "compute_dtype": model.compute_dtype,
        }
        Result("kernels", subject, machine(), measurements, {"bytes": needs}).write(options.json_file)
    return 0


Call = tuple[Callable[..., "jax.Array"], tuple[Any, ...]]
"""A function and its arguments."""


def _attention(config: Config, name: str, size: int, length: int) -> Call | str:
    """Returns causal attention by one implementation, or why it cannot be computed here."""
    import importlib

    import jax
    import jax.numpy as jnp

    from transformer.models.dot_product import what_is_asked
    from transformer.models.masks import Mask, Tokens

    model, implementation = config.model, IMPLEMENTATIONS[name]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((size, length, heads, model.head_dim) for heads in (model.num_heads, model.kv_heads, model.kv_heads))
    arrays = tuple(jax.random.normal(key, shape, model.compute_dtype) for key, shape in zip(keys, shapes, strict=True))
    places = jnp.broadcast_to(jnp.arange(length), (size, length))
    tokens = Tokens(places, jnp.ones_like(places))
    asked = what_is_asked(arrays[0], arrays[2], Mask(tokens, tokens))
    if problems := [problem for _, problem in implementation.refusals(asked)]:
        return problems[0]
    attend = getattr(importlib.import_module(implementation.module), implementation.function)
    return lambda *inputs: attend(*inputs, Mask(tokens, tokens)), arrays


def layer(config: Config, name: str, size: int, length: int) -> Call:
    """Returns the mixer of one layer, its projections included."""
    import jax
    import jax.numpy as jnp

    from transformer.models.masks import Tokens
    from transformer.models.mixers import Context, make_mixer
    from transformer.models.parameters import bind, init_parameters
    from transformer.models.rotary import rotary_angles

    model = config.model
    mixer = make_mixer(model, LayerKind(name), model.num_layers)
    params = init_parameters(mixer, jax.random.key(0))
    places = jnp.broadcast_to(jnp.arange(length), (size, length))
    tokens = Tokens(places, jnp.ones_like(places))
    angles = rotary_angles(places, model, model.head_dim) if model.positions == "rotary" else None
    context = Context(tokens, tokens, rotary=angles)
    x = jax.random.normal(jax.random.key(1), (size, length, model.width), model.compute_dtype)
    return lambda params, x: bind(mixer, params)(x, context, None, 0)[0], (params, x)


def _with_gradient(function: Callable[..., "jax.Array"]) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    def both(*arguments: Any) -> Any:
        output, backward = jax.vjp(function, *arguments)
        return output, backward(jnp.ones_like(output))

    return both
