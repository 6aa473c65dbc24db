"""Runs that begin with the parameters of another run, or of a model in Hugging Face's layout (`init_from`).

Everything that can be wrong is found before anything is written; what becomes of each parameter is told when the run begins.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from transformer.checkpointing import transfer
from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.fixed import FIXED
from transformer.checkpointing.loading import choose, load_parameters
from transformer.checkpointing.run import CHECKPOINTS, CONFIG, TOKENIZER, Run, for_platform, load_run
from transformer.config import Config, ConfigError, ModelConfig, get, place, replace, validate, write_atomically
from transformer.config.absolute import absolute_start
from transformer.data.prepared import Prepared
from transformer.data.tokenizers import KINDS, Tokenizer
from transformer.models.parameters import Tree, init_parameters, parameter_specs
from transformer.models.transformer import Transformer
from transformer.objectives import objective_of
from transformer.training.state import TrainState, abstract_state

PUBLISHED = "published"
"""Folder in a run's tokenizer/ that `transformer.huggingface.published` fills."""

_OF_ITS_OWN = ("architecture", "vocab_size", "num_labels", "num_positions", "num_future_tokens")
"""Keys of the model that follow from what the new run does."""


@dataclass(frozen=True)
class Source:
    """Where parameters come from."""

    label: str
    model: ModelConfig
    read: Callable[[Mesh], Tree]
    """Returns the parameters, laid out over a mesh."""
    tokenizer: Tokenizer | None
    published: Mapping[str, bytes]
    """Files of a published model's tokenizer, by name, that say more than its tokens, such as a chat template."""
    run: Run | None = None
    """None: a folder of Hugging Face's."""
    steps: tuple[int, ...] = ()
    """The run's checkpoints that are read, the one that was asked for last."""

    @property
    def step(self) -> int:
        return self.steps[-1]


def opened(config: Config, workdir: Any) -> tuple[Config, "Start | None"]:
    """Returns `config` with what its source decides (model and tokenizer, where the user has not), and how to begin.

    A run that has a checkpoint needs its source no more: it goes on with what it took from it then, and there is no
    beginning. Raises ConfigError for a source that cannot be read, or another one than the run began with.
    """
    if (workdir / CONFIG).exists():
        own = load_run(workdir)
        if problems := list(_other_start(own.config, config)):
            raise ConfigError([f"{workdir} is the directory of another run: start in another --workdir", *problems])
        directory = own.workdir / CHECKPOINTS
        if directory.is_dir():
            with Checkpoints(directory) as checkpoints:
                resumes = checkpoints.latest_step() is not None
            if resumes:
                return _completed(config, own.config.model, own.tokenizer, own, workdir), None
    source = _open_run(config) if config.init_from.run else _open_folder(config)
    config = _completed(config, _model_for(config, source), source.tokenizer, source.run, workdir)
    return validate(config), Start(source, workdir)


def on_base(config: Config, workdir: Any) -> Config:
    """Returns the configuration of an adapter with what its base decides: model and tokenizer, where the user has not."""
    base = load_run(place(config.adapter.base_run))
    # The head is the task's.
    model = dataclasses.replace(base.config.model, num_labels=config.model.num_labels)
    return validate(_completed(config, model, base.tokenizer, base, workdir))


def _other_start(old: Config, new: Config) -> Iterator[str]:
    wanted = absolute_start(new.init_from)
    for name, value in vars(old.init_from).items():
        if value != wanted[name]:
            yield f"init_from.{name} = {wanted[name]!r} contradicts the run, which has {value!r}"


def _open_run(config: Config) -> Source:
    start = config.init_from
    run = load_run(place(start.run))
    steps = choose(run, start.step, start.best, start.average)
    label = f"step {steps[-1]} of {start.run}"
    if len(steps) > 1:
        label = f"the mean of the steps {', '.join(map(str, steps))} of {start.run}"

    def read(mesh: Mesh) -> Tree:
        return load_parameters(run, mesh, steps[-1], average=len(steps))[1]

    published = run.workdir / TOKENIZER / PUBLISHED
    kept = {path.name: path.read_bytes() for path in published.iterdir()} if published.is_dir() else {}
    return Source(label, run.config.model, read, run.tokenizer, kept, run, tuple(steps))


def _open_folder(config: Config) -> Source:
    # Loaded by name: only runs that begin with such a folder have to know its layout.
    names = ("importing", "published", "reading")
    importing, published, reading = (importlib.import_module(f"transformer.huggingface.{name}") for name in names)
    folder = importing.folder_of(config.init_from.huggingface)
    family, model = reading.model_of(folder)
    reading.matched(folder, family, model)
    has_tokenizer = any(folder.has(name) for name in published.KINDS)
    tokenizer, _, kept = published.tokenizer_of(folder, model) if has_tokenizer else (None, "", {})

    def read(mesh: Mesh) -> Tree:
        return reading.read_parameters(folder, family, model, mesh)

    return Source(str(folder.path), model, read, tokenizer, kept)


# What the source decides.


def _model_for(config: Config, source: Source) -> ModelConfig:
    """Returns the source's model as the new run needs it: of its architecture, vocabulary and length."""
    theirs, wanted = source.model, config.model.architecture
    architecture = theirs.architecture if wanted == ModelConfig().architecture else wanted
    changes: dict[str, Any] = {"architecture": architecture}
    if (theirs.architecture, architecture) == ("encoder", "encoder_decoder"):
        changes |= {"num_encoder_layers": theirs.num_layers, "encoder_layers": theirs.layers}
    elif (theirs.architecture, architecture) == ("encoder_decoder", "encoder"):
        changes |= {"num_layers": theirs.encoder_depth, "layers": theirs.encoder_layers or theirs.layers}
        changes |= {"num_encoder_layers": None, "encoder_layers": None}
    changes |= {name: getattr(config.model, name) for name in _OF_ITS_OWN[1:]}
    if _takes_tokenizer(config, source.tokenizer) and config.model.vocab_size is None:
        # As many rows as there are, so that what was padded stays so, and room for the objective's own tokens.
        assert source.tokenizer is not None
        needed = source.tokenizer.vocab_size + objective_of(config).num_extra_tokens(config)
        changes["vocab_size"] = max(needed, theirs.vocab_size or 0)
    if theirs.positions == "learned" and config.model.num_positions is None:
        lengths = (config.data.sequence_length, config.data.source_length or 0, theirs.num_positions or 0)
        changes["num_positions"] = max(lengths)
    return dataclasses.replace(theirs, **changes)


def _completed(
    config: Config, model: ModelConfig, tokenizer: Tokenizer | None, run: Run | None, workdir: Any
) -> Config:
    """Returns `config` with the keys of `model` where it has their defaults, and with the tokenizer, unless told otherwise."""
    default, data = ModelConfig(), {}
    names = [key.partition(".")[2] for key in FIXED if key.startswith("model.")]
    if config.init_from.model == "own":
        names = []
    changes = {name: getattr(model, name) for name in names if getattr(config.model, name) == getattr(default, name)}
    if _takes_tokenizer(config, tokenizer):
        assert tokenizer is not None
        data = _tokenizer_keys(config, tokenizer, run, workdir)
    return replace(config, model=changes, data=data)


def _takes_tokenizer(config: Config, tokenizer: Tokenizer | None) -> bool:
    told = config.data.tokenizer_path or config.data.prepared or config.init_from.tokenizer == "own"
    return tokenizer is not None and not told


def _tokenizer_keys(config: Config, tokenizer: Tokenizer, run: Run | None, workdir: Any) -> dict[str, Any]:
    """Returns the keys of `data` that name the tokenizer of a run, or a copy of it that is on this machine."""
    (kind,) = (name for name, (_, kind) in KINDS.items() if kind == type(tokenizer).__name__)
    directory = None if run is None else run.workdir / TOKENIZER
    if not isinstance(directory, Path) or not isinstance(workdir, Path):
        directory = Path(config.data.cache_dir).expanduser() / "tokenizers" / tokenizer.fingerprint
        tokenizer.save(directory)
    if kind == "sentencepiece":
        own = run.config.data.tokenizer if run is not None else ""
        kind = own if own in ("bpe", "unigram") else "bpe"
    return {"tokenizer": kind, "tokenizer_path": "" if kind == "bytes" else str(directory)}


# How the run begins.


@dataclass
class Start:
    """The beginning of a run from a source: `check` first, then `state`."""

    source: Source
    workdir: Any
    lines: list[str] = field(default_factory=list)
    """What was loaded, what is new, what was left, and what is otherwise than in the source."""
    plan: transfer.Transfer = field(default_factory=transfer.Transfer)
    has_its_tokenizer: bool = False

    def check(self, config: Config, prepared: Prepared, model: Transformer) -> Config:
        """Returns the configuration that the run keeps, which needs the source no more.

        Raises ConfigError, with everything at once, if the run cannot begin so. Writes nothing.
        """
        start, source = config.init_from, self.source
        problems: list[str] = []
        specs = parameter_specs(Transformer(for_platform(source.model, jax.default_backend())))
        try:
            self.plan = transfer.transfer(start, specs, parameter_specs(model), source.label)
        except ConfigError as error:
            problems += error.problems
        problems += self._problems_of_tokens(prepared.tokenizer)
        if start.optimizer == "keep":
            problems += self._problems_of_optimizer(config)
        if start.progress == "keep" and source.step >= config.train.num_steps:
            steps = f"train.num_steps = {config.train.num_steps}"
            problems.append(f"{steps}: nothing is left to do after {source.label} (init_from.progress = 'keep')")
        if problems:
            raise ConfigError(problems)
        self.lines = [f"begins with {source.label}", *(f"  {line}" for line in self._told(config, prepared))]
        theirs = source.tokenizer
        self.has_its_tokenizer = theirs is not None and theirs.fingerprint == prepared.tokenizer.fingerprint
        if self.has_its_tokenizer and config.data.tokenizer_path and isinstance(self.workdir, Path):
            return replace(config, data={"tokenizer_path": str(self.workdir / TOKENIZER)})
        return config

    def _problems_of_tokens(self, tokenizer: Tokenizer) -> Iterator[str]:
        theirs = self.source.tokenizer
        tables = {*self.plan.same, *self.plan.fitted} & {"embedding", "head"}
        if theirs is None or theirs.fingerprint == tokenizer.fingerprint or not tables:
            return
        if tokenizer.vocab_size > theirs.vocab_size and all(
            tokenizer.decode([number]) == theirs.decode([number]) for number in range(theirs.vocab_size)
        ):
            return  # it has grown
        names = " and ".join(sorted(tables))
        advice = f"use the source's, or leave {names} out by init_from.exclude"
        yield f"data.tokenizer: another one than that of {self.source.label}, so that {names} would mean other tokens; {advice}"

    def _problems_of_optimizer(self, config: Config) -> Iterator[str]:
        keeps, run, plan = "init_from.optimizer = 'keep'", self.source.run, self.plan
        assert run is not None, "validated"
        for key in (key for key in FIXED if key.startswith("optimizer.")):
            if get(config, key) != get(run.config, key):
                yield f"{key} = {get(config, key)!r}: {keeps}, and the source has {get(run.config, key)!r}"
        if others := [*plan.fitted, *plan.new, *plan.left]:
            yield f"{keeps}: {', '.join(others)} would not be as the optimizer has left them"
        with Checkpoints(run.workdir / CHECKPOINTS) as checkpoints:
            if not checkpoints.is_resumable(self.source.step):
                yield f"{keeps}: {self.source.label} holds parameters alone"

    def _told(self, config: Config, prepared: Prepared) -> Iterator[str]:
        start, source = config.init_from, self.source
        yield from self.plan.lines()
        for key in FIXED:
            section, _, name = key.partition(".")
            if "encoder" in name and source.model.architecture != "encoder_decoder":
                continue  # there is one stack, and which keys tell of it follows from the architecture
            if section == "model":
                theirs = getattr(source.model, name)
            elif source.run is not None and start.progress == "keep":
                theirs = get(source.run.config, key)
            else:
                continue
            if theirs != get(config, key):
                yield f"{key} = {get(config, key)!r}, and {theirs!r} in the source"
        if source.run is not None:
            corpus = (
                "the source's"
                if source.run.data_fingerprint == prepared.fingerprint
                else "another one than the source's"
            )
            place = f", read on from step {source.step}" if start.progress == "keep" else ", from its beginning"
            yield f"corpus: {corpus}{place}"
        if source.tokenizer is None:
            yield "tokenizer: the source has none, and data.tokenizer is taken to be that which it was trained with"
        yield f"optimizer: {'the state of the source' if start.optimizer == 'keep' else 'a fresh state'}"

    def state(
        self,
        config: Config,
        model: Transformer,
        optimizer: Any,
        shardings: TrainState,
        restore: Callable[..., TrainState],
    ) -> TrainState:
        """Returns the state before the run's first step, each array made where it will live."""
        start, source = config.init_from, self.source
        if jax.process_index() == 0 and isinstance(self.workdir, Path):
            for name, content in source.published.items() if self.has_its_tokenizer else ():
                write_atomically(self.workdir / TOKENIZER / PUBLISHED / name, content)
        first = source.step if start.progress == "keep" else 0
        if start.optimizer == "keep":
            assert source.run is not None, "validated"
            with Checkpoints(source.run.workdir / CHECKPOINTS) as checkpoints:
                state = restore(checkpoints, source.step, abstract_state(model, optimizer, shardings))
            counters = (jnp.full((), first, jnp.int32), jnp.zeros((), jnp.int32))
            counters = jax.device_put(counters, (shardings.step, shardings.nonfinite_steps))
            return dataclasses.replace(state, step=counters[0], nonfinite_steps=counters[1])
        mesh: Any = shardings.step.mesh
        same, others = transfer.arrays(self.plan, transfer.flat(source.read(mesh)))

        def begin(same: dict[str, Any], others: dict[str, Any]) -> TrainState:
            fitted = {path: self.plan.fitted[path][1](array) for path, array in others.items()}
            params = transfer.filled(init_parameters(model, jax.random.key(config.seed)), same | fitted)
            return TrainState(jnp.int32(first), params, optimizer.init(params), jnp.int32(0))

        return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(same, others)
