"""The training loop, from a configuration to a finished run; read `run`, then `Loop.train`."""

import contextlib
import importlib
import itertools
import time
from collections import deque
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import jax
from jax.sharding import Mesh

from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.run import CHECKPOINTS, CONFIG, Place, make_model, open_run, resolve
from transformer.config import Config, source_length, validate
from transformer.data.batches import train_batches
from transformer.data.prepared import Prepared, prepare_apart
from transformer.models.parameters import Tree, join, num_parameters, parameter_specs
from transformer.models.transformer import Transformer
from transformer.objectives import objective_of, with_examples, with_window
from transformer.optimizers import is_averaged, make_optimizer, replace_average, trained_part
from transformer.parallel.sharding import global_array, local_rows, make_mesh, use_rules
from transformer.training import DIVERGED
from transformer.training.evaluation import Evaluator
from transformer.training.preemption import Signals
from transformer.training.report import Report
from transformer.training.state import TrainState, abstract_state, create_state, state_shardings
from transformer.training.step import compile_step, make_train_step


def run(config: Config, workdir: PurePath) -> int:
    """Trains until `train.num_steps`, from where `begin` says.

    Returns the exit status: 0 when the run is finished, 143 after SIGTERM and 130 after SIGINT with the state saved,
    DIVERGED when too many gradients in a row were not finite. Raises ConfigError for a mistake of the user's, before
    anything is compiled.
    """
    validate(config)
    # Loaded by name: how a run ends that cannot go on is no part of how it goes.
    guarded = importlib.import_module("transformer.training.guard").Guard(config, workdir)
    with guarded as guard, Signals() as signals, use_rules(config):
        # The source that a new run begins with, the mesh and the data, and what of the configuration depends on them.
        start = None
        if config.init_from.run or config.init_from.huggingface:
            # Loaded by name: most runs begin with nothing.
            config, start = importlib.import_module("transformer.training.start_from").opened(config, workdir)
        if config.adapter.kind != "none":
            config = importlib.import_module("transformer.training.start_from").on_base(config, workdir)
        mesh = make_mesh(config)
        is_writer = jax.process_index() == 0
        prepared = prepare_apart(with_window(config), show_progress=is_writer)
        config = resolve(config, prepared.tokenizer.vocab_size, prepared.num_labels)
        prepared = with_examples(prepared, objective_of(config), config)

        # Model and optimizer, and where each array of their state lives.
        model = make_model(config, jax.default_backend())
        optimizer = make_optimizer(config, parameter_specs(model))
        shardings = state_shardings(model, optimizer, mesh, config.parallel)
        if start is not None:
            config = start.check(config, prepared, model)
        base = None
        if config.adapter.kind != "none":
            base = importlib.import_module("transformer.checkpointing.bases").begin(config, prepared.tokenizer, workdir)

        guard.agree(fingerprint_of_the_data=prepared.fingerprint, beginning=str(start and start.lines))
        # Loaded by name: a reader of one run needs no other places than a local directory.
        with importlib.import_module("transformer.checkpointing.places").opened(workdir, is_writer) as place:
            open_run(place.files, config, prepared, is_writer)
            place.upload()
            guard.meet(workdir / CONFIG)

            with jax.set_mesh(mesh), Checkpoints(place.workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
                state = begin(config, model, optimizer, shardings, checkpoints, start)
                is_new = checkpoints.latest_step() is None
                if base is not None:
                    moments = jax.jit(optimizer.init, out_shardings=shardings.opt_state) if is_new else None
                    state = base.under(state, model, mesh, place.files if is_writer else None, moments)
                if objective_of(config).HAS_REFERENCE:
                    reference = importlib.import_module("transformer.training.reference")
                    begun = join(state.params, state.frozen) if is_new else None
                    prepared = reference.referenced(config, prepared, place.files, model, mesh, begun, is_writer)

                # Steps, and between them validations, samples and checkpoints.
                with Report(config, place, int(jax.device_get(state.step)), is_writer) as report:
                    if start is not None:
                        report.message("\n".join(start.lines))
                    loop = Loop(config, place, prepared, model, mesh, checkpoints, signals, report, guard)
                    return loop.train(state, make_train_step(config, model, optimizer, shardings), shardings)


def begin(
    config: Config, model: Transformer, optimizer: Any, shardings: TrainState, checkpoints: Checkpoints, start: Any
) -> TrainState:
    """Returns the state that a run begins with, the first of: the latest checkpoint in its own directory, whatever mesh it was
    saved from; what `init_from` names, `start`; random values from the seed."""
    latest = checkpoints.latest_step()
    if latest is not None:
        return restore(checkpoints, latest, abstract_state(model, optimizer, shardings))
    if start is not None:
        return start.state(config, model, optimizer, shardings, restore)
    return create_state(config, model, optimizer, shardings)


def restore(checkpoints: Checkpoints, step: int, abstract: TrainState) -> TrainState:
    """Returns the state of checkpoint `step`, laid out as `abstract` says."""
    stored = checkpoints.restore(step, params=abstract.params, rest=_rest(abstract))
    evaluated, rest = stored["params"], stored["rest"]
    opt_state = replace_average(rest["opt_state"], evaluated)
    return TrainState(rest["step"], rest.get("params", evaluated), opt_state, rest["nonfinite_steps"])


def _rest(state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint has of a state besides the parameters that are evaluated."""
    opt_state = replace_average(state.opt_state, ())
    rest = {"step": state.step, "opt_state": opt_state, "nonfinite_steps": state.nonfinite_steps}
    return rest | ({"params": state.params} if is_averaged(state.opt_state) else {})


class Loop:
    """One run under way."""

    def __init__(
        self,
        config: Config,
        place: Place,
        prepared: Prepared,
        model: Transformer,
        mesh: Mesh,
        checkpoints: Checkpoints,
        signals: Signals,
        report: Report,
        guard: Any,
    ):
        self.config, self.place, self.prepared, self.model, self.mesh = config, place, prepared, model, mesh
        self.checkpoints, self.signals, self.report, self.guard = checkpoints, signals, report, guard
        self.evaluator = Evaluator(config, prepared, model, mesh)
        alone = jax.process_count() == 1
        self.vote = signals if alone else importlib.import_module("transformer.training.voting").Vote(mesh, signals)
        # Model FLOPs, all pairs of tokens counted as is usual in published MFU, over the peak of the devices where it is known.
        # Loaded by name: the costs of all kinds of layers are more than a reader of one run needs.
        flops = importlib.import_module("transformer.models.flops")
        self.flops_per_token = flops.training_flops_per_token(
            config.model, config.data.sequence_length, source_length=source_length(config)
        )
        if config.adapter.kind != "none":
            adapters = importlib.import_module("transformer.models.adapters")
            length, source = config.data.sequence_length, source_length(config)
            self.flops_per_token += adapters.flops_per_token(model, length, source)
        self.peak_flops = flops.peak_flops(mesh.devices.flat[0].device_kind, mesh.size)

    def train(self, state: TrainState, train_step: Any, shardings: TrainState) -> int:
        """Runs the steps that are left and returns the exit status."""
        last = self.config.train.num_steps
        step = int(jax.device_get(state.step))
        self.report.message(f"resuming after step {step} of {last}" if step else f"starting a run of {last} steps")
        batches = self._batches(step)
        if step < last:
            first = next(batches)
            compiled = self._compile(train_step, state, first, shardings)
            batches = itertools.chain([first], batches)
        profile = self.config.profile
        traced = range(max(profile.start_step, step + 1), max(profile.start_step, 1) + profile.num_steps)
        status, pending = 0, None
        self.signals.defer()
        self._tick()

        with jax.transfer_guard("disallow"), contextlib.ExitStack() as trace:
            is_resumed = step == self.checkpoints.latest_step()
            if is_resumed and self._due(step)[0] and not self.checkpoints.is_validated(step):
                loss, status = self._validate(step, state)  # a signal came in between
                if loss is not None:
                    self.report.sync()
                    self.checkpoints.add_loss(step, loss)
            while step < last and not status:
                if traced and step + 1 == traced.start:
                    trace.enter_context(jax.profiler.trace(str(self.place.files / "profile")))
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                    state, metrics = compiled(state, next(batches))
                    step += 1
                    newest = (step, metrics, self.vote.cast())
                # The device is at work on this step while the host reads the metrics of the one before.
                status = self._settle(pending)
                pending = newest
                if step + 1 == traced.stop:
                    jax.block_until_ready(metrics)
                    trace.close()
                if status or any(self._due(step)):
                    status, pending = self._settle(pending) or status, None
                    status = self._pause(step, state, status)

        self.checkpoints.wait()
        if not status:
            self.report.message(f"finished: {self.place.workdir} holds the run")
        return status

    def _compile(self, train_step: Any, state: TrainState, batch: dict[str, Any], shardings: TrainState) -> Any:
        """Compiles the step ahead of time, once, or loads it, and reports what it costs."""
        how, start = "loaded", time.perf_counter()

        def compile_it() -> Any:
            nonlocal how
            how = "compiled"
            return compile_step(train_step, state, batch, shardings, self.mesh)

        # Loaded by name: where programs are kept is no part of how a run goes.
        stored = importlib.import_module("transformer.checkpointing.programs").stored_program
        compiled = stored(self.config, self.mesh, (state, batch), compile_it)
        seconds = time.perf_counter() - start
        memory: Any = compiled.memory_analysis()
        arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        tokens = self.config.train.batch_size * self.config.data.sequence_length
        told = f"{num_parameters(self.model):,} parameters"
        if state.frozen or self.config.optimizer.frozen:
            specs = trained_part(self.config, parameter_specs(self.model))
            told = importlib.import_module("transformer.models.adapters").share(self.model, specs)
        shape = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        self.report.message(
            f"{told}; mesh {shape or 'of one device'}; "
            f"{how} in {seconds:.1f} s; per device {arguments / 2**20:,.0f} MiB of "
            f"arguments, {temporary / 2**20:,.0f} MiB of temporaries; {self.flops_per_token * tokens:.3g} FLOPs a step"
        )
        return compiled

    def _batches(self, step: int) -> Iterator[dict[str, Any]]:
        """Yields global batches from the one after `step` on, their transfer begun two steps ahead."""
        size = self.config.train.batch_size
        rows = local_rows(self.mesh, size)
        ahead: deque[dict[str, Any]] = deque()
        for local in train_batches(self.config, self.prepared, step, rows):
            ahead.append(global_array(self.mesh, rows, size, local))
            if len(ahead) > 2:
                yield ahead.popleft()
        yield from ahead

    def _due(self, step: int) -> tuple[bool, bool]:
        """Returns whether a validation and a checkpoint follow `step`."""
        intervals = (self.config.evaluation.every_steps, self.config.checkpoint.every_steps)
        last = step == self.config.train.num_steps
        validates, saves = (last or (every > 0 and step % every == 0) for every in intervals)
        return validates, saves

    def _tick(self) -> float:
        """Returns the seconds since the last call."""
        now = time.perf_counter()
        seconds, self._last_tick = now - getattr(self, "_last_tick", now), now
        return seconds

    def _settle(self, pending: Any) -> int:
        """Waits for a dispatched step, writes its metrics, and returns the exit status that it calls for, 0 for none."""
        if pending is None:
            return 0
        step, metrics, vote = pending
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        seconds = self._tick()
        self.guard.beat(step)
        nonfinite = values.pop("nonfinite_steps")
        rate = values["tokens"] / seconds
        named = {"step": step, "split": "train", "loss": values.pop("loss"), **values}
        record = named | {"step_seconds": seconds, "tokens_per_second": rate}
        self.report.train(record, rate * self.flops_per_token / self.peak_flops if self.peak_flops else None)
        if nonfinite:
            self.report.message(f"step {step}: the gradient is not finite; skipped ({nonfinite} in a row)")
        if nonfinite >= self.config.train.max_nonfinite_steps:
            self.report.message(f"stopping: {nonfinite} steps in a row had a gradient that is not finite")
            return DIVERGED
        signal = self.vote.read(vote)
        return 128 + signal if signal else 0

    def _pause(self, step: int, state: TrainState, status: int) -> int:
        """Validates, samples and saves what is due after `step`, in this order: a checkpoint has all before it. After a
        signal, whose sender will not wait long, it only saves; the run that resumes begins by validating."""
        validates, saves = self._due(step)
        loss = None
        if validates and not status:
            loss, status = self._validate(step, state)
        self.report.sync()
        if saves or status:
            self.guard.beat(step, "saving a checkpoint")
            self.checkpoints.save(step, state.evaluated(), _rest(state), loss)
        if status > 128:
            self.checkpoints.wait()
            self.report.message(f"stopped by a signal after step {step}; saved, the same command goes on from here")
        self._tick()
        self.guard.beat(step)
        return status

    def _validate(self, step: int, state: TrainState) -> tuple[float | None, int]:
        """Returns the validation loss and 0, or None and the exit status of a signal that came meanwhile."""
        params = join(state.evaluated(), state.frozen)
        self.guard.beat(step, "validating", compiles=True)
        result = self.evaluator(params, lambda: self.guard.beat(step, "validating") or self.vote.read(self.vote.cast()))
        if "interrupted_by" in result:
            return None, 128 + result["interrupted_by"]
        self.report.validation({"step": step, "split": "validation", **result})
        self._sample(step, params)
        return result["loss"], 0

    def _sample(self, step: int, params: Tree) -> None:
        prompt, length = self.config.evaluation.sample_prompt, self.config.evaluation.sample_tokens
        if length > 0:
            # Loaded only by runs that sample.
            sample = importlib.import_module("transformer.inference.samples").sample
            self.guard.beat(step, "sampling", compiles=True)
            text = sample(self.config, self.model, params, self.prepared.tokenizer, prompt, length)
            if text is not None:
                self.report.sample(step, prompt, text)
