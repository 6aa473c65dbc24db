"""What can be wrong with where a run begins, and with what of it stays as it is."""

from collections.abc import Iterator

from transformer.config.init_from import InitFromConfig
from transformer.config.path_patterns import pattern_problems
from transformer.config.schema import Config

_OF_RUNS = ("step", "best", "average", "optimizer", "progress")
_PARTIAL = ("average", "include", "exclude", "rename", "layers")
"""Keys with which parameters are other than those that the source's optimizer has moved."""


def start_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each mistake in `init_from`."""
    start, default = config.init_from, InitFromConfig()
    given = [name for name in vars(default) if getattr(start, name) != getattr(default, name)]
    label = {name: f"init_from.{name} = {getattr(start, name)!r}" for name in vars(default)}
    if not (start.run or start.huggingface):
        yield f"{label[given[0]]}: name what to begin with, by init_from.run or init_from.huggingface"
        return
    if start.run and start.huggingface:
        yield f"{label['run']} and {label['huggingface']}: a run begins with one of them"
    elif start.huggingface:
        for name in (name for name in _OF_RUNS if name in given):
            yield f"{label[name]}: only a run has that, not {label['huggingface']}"
    if start.step is not None and start.best:
        yield f"{label['step']} and init_from.best = True: give one"
    if start.optimizer == "keep":
        for name in (name for name in _PARTIAL if name in given):
            reason = "the optimizer's state is that of all parameters as they were"
            yield f"{label[name]} with init_from.optimizer = 'keep': {reason}"
    for name in ("include", "exclude", "allow_missing", "allow_extra"):
        yield from pattern_problems(f"init_from.{name}", getattr(start, name))
    for pair in start.rename:
        if not all(pair.partition("=")[::2]):
            yield f"init_from.rename = {pair!r}: must be NEW=OLD, such as decoder=encoder"


def frozen_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each mistake in what is frozen."""
    optimizer = config.optimizer
    yield from pattern_problems("optimizer.frozen", optimizer.frozen)
    if optimizer.ema_decay:
        average = f"optimizer.ema_decay = {optimizer.ema_decay}"
        yield f"optimizer.frozen = {optimizer.frozen}: {average} averages all parameters; leave it at 0"
