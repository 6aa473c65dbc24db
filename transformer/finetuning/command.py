"""`transformer merge` and `unmerge`: an adapter into the matrices of its base, and out of them again."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from transformer.arguments import Overrides, Workdir
from transformer.config import AdapterConfig, Config, ConfigError, place, replace
from transformer.run_options import RunOptions

Output = Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="(required)")]


@dataclass(frozen=True)
class MergeOptions(RunOptions):
    """Make a run of an adapter and its base together: a model like any other, of the same size as the base."""

    output: Output = ""
    """The run directory to make."""
    config: Overrides = field(default_factory=Config)


@dataclass(frozen=True)
class UnmergeOptions:
    """Make a run of a merged one without the adapter that is in it: the base again, to rounding."""

    workdir: Workdir = ""
    """The merged run."""
    adapter: Annotated[str, tyro.conf.arg(name="from", metavar="DIR", help_behavior_hint="(required)")] = ""
    """The run of the adapter."""
    output: Output = ""
    """The run directory to make."""
    step: int | None = None
    """Checkpoint of the adapter that was merged; None: the latest."""
    config: Overrides = field(default_factory=Config)


def merge(options: MergeOptions, run: Any, config: Config, mesh: Any) -> int:
    import jax

    from transformer.checkpointing.loading import load_merged
    from transformer.checkpointing.new_run import check_new, write_run
    from transformer.parallel.sharding import use_rules

    target = _target(options.output, check_new)
    _adapter_of(run, options.workdir)
    with jax.set_mesh(mesh), use_rules(config):
        _, params, step = load_merged(run, mesh, options.step, options.best, options.average)
        write_run(target, replace(run.config, adapter=AdapterConfig()), run, params, step)
    print(f"{options.output}: the adapter of step {step} and its base, merged")
    return 0


def unmerge(options: UnmergeOptions, run: Any, config: Config, mesh: Any) -> int:
    import jax

    from transformer.checkpointing.loading import load_adapter, load_parameters
    from transformer.checkpointing.new_run import check_new, write_run
    from transformer.checkpointing.run import load_run
    from transformer.models.adapters import unmerged
    from transformer.parallel.sharding import use_rules

    target = _target(options.output, check_new)
    if run.config.adapter.kind != "none":
        raise ConfigError(f"--workdir = {options.workdir!r} holds an adapter, and nothing that it is merged with")
    if not options.adapter:
        raise ConfigError("--from is missing: name the run of the adapter")
    adapter = load_run(place(options.adapter))
    _adapter_of(adapter, options.adapter)
    with jax.set_mesh(mesh), use_rules(config):
        _, params, step = load_parameters(run, mesh)
        model, trained, _ = load_adapter(adapter, mesh, options.step)
        write_run(target, run.config, run, unmerged(model, params, trained), step)
    print(f"{options.output}: {options.workdir} without the adapter of {options.adapter}")
    return 0


def _target(output: str, check: Any) -> Any:
    if not output:
        raise ConfigError("--output is missing: name the run directory to make")
    check(place(output), "--output")
    return place(output)


def _adapter_of(run: Any, name: str) -> None:
    if run.config.adapter.kind == "none":
        raise ConfigError(f"{name} holds no adapter: its adapter.kind is 'none'")
