"""The gradient of a batch whose microbatches pass through layers that are split over stages: a pipeline.

`jax.shard_map` over `stage` alone, so that the code is that of one stage with its own column of the schedule; the other
axes stay with the compiler, or with shard_maps inside. A stage keeps nothing of a microbatch but what came in. It computes
its layers again when the gradient comes back, and that is when losses and statistics are taken. The stages move in step, and
what only some have to do, embedding and loss, all do in the same tick: those whose result is not used would wait meanwhile.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from transformer.config import Config
from transformer.models.blocks import Stack, fold_in
from transformer.models.feedforward import Auxiliary
from transformer.models.parameters import Tree, bind, is_spec, parameter_specs
from transformer.models.transformer import Outputs, Transformer, apply, prefixed
from transformer.objectives import normalize, objective_of
from transformer.optimizers import trained_part
from transformer.parallel.schedules import IDLE, Table, schedule
from transformer.parallel.sharding import constrain, partition_spec

STAGE = "stage"

Sums = tuple[Array, dict[str, Array], dict[str, Any]]
"""Share of the loss, shares of its terms' means, and statistics as (sum, weight)."""


def make_gradient(
    config: Config, model: Transformer, layout: Any = None
) -> Callable[..., tuple[Tree, dict[str, Array]]]:
    """Returns what `training.step.make_gradient` does, for a mesh with stages."""
    pipeline = Pipeline(config, model)

    def gradient(
        params: Tree, batch: Mapping[str, Array], key: Any, used: Any = pipeline.parts, frozen: Tree | None = None
    ) -> Any:
        assert not frozen, "validation refuses adapters with stages"
        gradients, (loss, means, statistics), _ = pipeline(params, batch, key, used)
        gradients = gradients if layout is None else jax.lax.with_sharding_constraint(gradients, layout)
        reported = means | (normalize(statistics)[1] if statistics else {})
        return trained_part(config, gradients), {"loss": loss, **reported, "tokens": jnp.sum(batch["segment_ids"] > 0)}

    return gradient


class Seam:
    """Stands in for a stack whose layers run elsewhere: it shows what they are given, and returns what they have made."""

    def __init__(self, stack: Stack, made: Array | None):
        self.stack, self.causal, self._made = stack, stack.causal, made

    def __call__(self, x: Array, context: Any, cache: None, key: Any) -> tuple[Array, None, Auxiliary]:
        bias, norm = self.stack.bias, self.stack.final_norm
        self.x, self.key = x, key
        self.context = dataclasses.replace(context, bias=None if bias is None else bias())
        made = x if self._made is None else self._made if norm is None else norm(self._made)
        return made, None, {}


class Given(NamedTuple):
    """What all stages are given alike."""

    split: dict[str, Array]
    """The batch, [M, B, ...]."""
    key: Any
    weights: dict[str, Array]
    """Those of all terms of the loss in the whole batch."""
    zero: Sums
    used: Array
    """Microbatches that count; those beyond are padding."""


class Pipeline:
    """The program of one model and one schedule. Its main stack is the one that the loss reads; the encoder of a decoder
    runs before it, all microbatches forward, and after the decoder all gradients back."""

    def __init__(self, config: Config, model: Transformer):
        self.config, self.model, self.objective = config, model, objective_of(config)
        self.stages, self.rounds = config.parallel.stage, config.parallel.rounds
        self.parts = config.train.num_microbatches
        self.stacks = [name for name in ("encoder", "decoder") if getattr(model, name) is not None]
        self.table = schedule(config.parallel.schedule, self.stages, self.parts, self.rounds)

    def __call__(self, params: Tree, batch: Mapping[str, Array], key: Any, used: Any) -> tuple[Tree, Sums, Array]:
        """Returns gradient, sums, and what passed through the stages, [ticks, stages, 6].

        The last are pairs (microbatch, groups of layers passed) that travelled with what they tell of: with the input that
        went forward, with the kept one that was taken up again, and with the gradient that came for it.
        """
        assert jax.sharding.get_abstract_mesh().shape[STAGE] == self.stages
        # Only the weights are used, so the compiler drops the forward pass that this seems to cost.
        whole = self.objective.terms(self.config.objective, apply(self.model, params, batch), batch)
        weights = {name: weight for name, (_, weight) in (whole.losses | whole.auxiliary).items()}
        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), weights, whole.statistics))
        # Part m takes rows m, m + M, ...: each device keeps the rows that it holds.
        split = {n: x.reshape(-1, self.parts, *x.shape[1:]).swapaxes(0, 1) for n, x in batch.items()}
        given = Given(split, key, weights, zero, jnp.int32(used))

        outer = dict(params)
        for name in self.stacks:
            outer[name] = {part: tree for part, tree in params[name].items() if part != "layers"}
        *reading, main = self.stacks
        by_stage, all_alike = PartitionSpec(None, STAGE), PartitionSpec()
        run = self._mapped(self.table, self._run_main, (by_stage, all_alike, all_alike, all_alike, by_stage))
        layers = self._staged(main, params[main]["layers"], self.rounds)
        if not reading:
            to_layers, to_outer, _, sums, log = run(layers, outer, None, given)
            gradients = dict(to_outer)
        else:
            (encoder,) = reading
            first = schedule("gpipe", self.stages, self.parts)
            read = self._mapped(first, self._run_encoder, (PartitionSpec(STAGE), PartitionSpec(STAGE), all_alike))

            def memory_of(layers: Tree, outer: Tree) -> Any:
                memory, losses, sums = read(self._staged(encoder, layers, 1), outer, given)
                return (memory[-1], jnp.sum(losses)), sums

            (memory, _), back, before = jax.vjp(memory_of, params[encoder]["layers"], outer, has_aux=True)
            to_layers, to_outer, to_memory, after, log = run(layers, outer, memory, given)
            to_encoder, more = back((to_memory, jnp.ones(())))
            sums = jax.tree.map(jnp.add, before, after)
            gradients = dict(jax.tree.map(jnp.add, to_outer, more))
            gradients[encoder] = gradients[encoder] | {"layers": to_encoder}
        to_layers = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), to_layers, params[main]["layers"])
        gradients[main] = gradients[main] | {"layers": to_layers}
        return gradients, sums, log

    def _mapped(self, table: Table, function: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
        """Returns `function` run by each stage: on its own layers and columns of the table, and all of what follows."""
        names = ("forward", "forward_round", "forward_slot", "backward", "backward_round", "backward_slot")
        columns = {name: jnp.asarray(getattr(table, name)) for name in names}
        by_stage = PartitionSpec(None, STAGE)

        def local(stage: Array, columns: dict[str, Array], layers: Tree, *rest: Any) -> Any:
            # The number of a stage as data: a partition's own number is not to be had while other axes are the compiler's.
            mine = {name: column[:, 0] for name, column in columns.items()}
            layers = jax.tree.map(lambda leaf: leaf[:, 0] if leaf.shape[0] > 1 else leaf[0, 0], layers)
            return function(stage[0], mine, layers, *rest)

        def run(layers: Tree, *rest: Any) -> Any:
            in_specs = (PartitionSpec(STAGE), by_stage, by_stage, *[PartitionSpec()] * len(rest))
            mapped = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names={STAGE}, check_vma=False)
            return mapped(jnp.arange(self.stages), columns, layers, *rest)

        return run

    def _staged(self, name: str, layers: Tree, rounds: int) -> Tree:
        """Returns a stack's parameters as [rounds, stages, layers of a group, ...].

        With several rounds, a stage's groups are not those that it holds in the state, which is in the order of the layers:
        parameters travel once a step, and gradients back.
        """
        sizes = jax.sharding.get_abstract_mesh().shape

        def place(spec: Any, leaf: Array) -> Array:
            leaf = leaf.reshape(rounds, self.stages, -1, *leaf.shape[1:])
            rest = partition_spec(spec.axes[1:], spec.shape[1:], sizes)
            return jax.lax.with_sharding_constraint(leaf, PartitionSpec(None, STAGE, None, *rest))

        return jax.tree.map(place, parameter_specs(getattr(self.model, name).layers), layers, is_leaf=is_spec)

    def seams(self, outer: Tree, part: Tree, key: Any, **made: Array | None) -> tuple[dict[str, Seam], Outputs]:
        """Runs all of the model but its layers, which have made what is given, if anything."""
        model = bind(self.model, outer)
        seams = {name: Seam(getattr(model, name), made.get(name)) for name in self.stacks}
        for name, seam in seams.items():
            setattr(model, name, seam)
        return seams, model(part, key)

    def run_layers(self, name: str, layers: Tree, seam: Seam, x: Array, group: Array, weights: Tree) -> Any:
        """Runs one group of a stack's layers; returns output, and the layers' own share of the loss with its sums."""
        first = group * len(jax.tree.leaves(layers)[0])
        y, _, found = seam.stack.run(layers, x, seam.context, None, seam.key, first)
        found = found if name == self.stacks[-1] else prefixed(name, found)
        loss, means = normalize(found["losses"], weights) if found.get("losses") else (jnp.zeros(()), {})
        return y, loss, (means, found.get("statistics", {}))

    def part(self, given: Given, number: Array) -> tuple[dict[str, Array], Any]:
        """Returns a microbatch and its key, those of the first for a stage that rests."""
        return _read(given.split, number), fold_in(given.key, jnp.maximum(number, 0))

    def move(self, value: Any, by: int) -> Any:
        """Sends what a stage made to the next, or to the one before; round the ring where there are several rounds."""
        pairs = [(stage, (stage + by) % self.stages) for stage in range(self.stages)]
        pairs = [pair for pair in pairs if self.rounds > 1 or pair[1] - pair[0] == by]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, STAGE, pairs), value)

    def _run_encoder(self, stage: Array, columns: Any, layers: Tree, outer: Tree, given: Given) -> Any:
        """Returns what the stage made of all microbatches, its share of the loss, and the sums of all stages."""

        def tick(arrived: Array, number: Array) -> Any:
            part, key = self.part(given, number)
            seam = self.seams(outer, part, key)[0]["encoder"]
            x = jnp.where((stage == 0) | (number == IDLE), seam.x, self.move(arrived, 1))
            y, loss, sums = self.run_layers("encoder", layers, seam, x, stage, given.weights)
            counts = (number != IDLE) & (number < given.used)
            return y, (y, *jax.tree.map(lambda value: jnp.where(counts, value, 0), (loss, sums)))

        like = jax.eval_shape(lambda: self.seams(outer, *self.part(given, stage))[0]["encoder"].x)
        ticks = columns["forward"][: self.parts + self.stages - 1]
        start = constrain(jnp.zeros(like.shape, like.dtype), "batch", "length", "hidden")
        _, (made, losses, (means, statistics)) = jax.lax.scan(jax.checkpoint(tick), start, ticks)
        loss = jnp.sum(losses)
        total = _add(given.zero, jax.tree.map(lambda value: jnp.sum(value, axis=0), (losses, means, statistics)))
        return made[None, self.stages - 1 :], loss[None], jax.lax.psum(jax.lax.stop_gradient(total), STAGE)

    def _run_main(
        self,
        stage: Array,
        columns: Any,
        layers: Tree,
        outer: Tree,
        memory: Float[Array, "M B S D"] | None,
        given: Given,
    ) -> Any:
        """Returns the stage's gradients of its layers, and of all stages those of the other parameters and of `memory`, the
        sums, and the log."""
        work = Stage(self, stage, layers, outer, memory, given)
        # Stages that have nothing yet compute with a first input that is none of theirs, and not with zeros.
        number = jnp.int32(0)
        x, label, slots = work.front(outer, _read(memory, number), number), jnp.full(2, IDLE), self.table.num_slots
        state: State = {
            "kept": (jnp.broadcast_to(x, (slots, *x.shape)), jnp.broadcast_to(label, (slots, 2))),
            "ahead": (x, label),
            "back": (x, label),
            "layers": jax.tree.map(jnp.zeros_like, layers),
            "rest": jax.tree.map(jnp.zeros_like, (outer, memory)),
            "sums": given.zero,
        }
        rows, logs = columns | self._flags(), []
        goes, comes = (np.any(half != IDLE, axis=1) for half in (self.table.forward, self.table.backward))
        # Two loops, before and after the first gradient. With a third one for the last ticks, which only go back, XLA keeps a
        # second copy of all gradients; there a branch leaves the first half out.
        for phase in (~comes, comes):
            always, never = goes[phase].all(), not goes[phase].any()

            def tick(
                state: State, row: Any, always: bool = always, never: bool = never, back: bool = comes[phase].any()
            ) -> Any:
                idle = jnp.full(2, IDLE)
                arrived, kept = self.move(state["ahead"], 1), state["kept"]
                if always:
                    ahead, kept, went = work.forward(arrived, kept, row)
                elif never:
                    ahead, went = arrived, idle
                else:
                    ahead, kept, went = jax.lax.cond(
                        row["goes"],
                        lambda arrived, kept: work.forward(arrived, kept, row),
                        lambda arrived, kept: (arrived, kept, idle),
                        arrived,
                        kept,
                    )
                state = state | {"ahead": ahead, "kept": kept}
                state, came = work.backward(state, row) if back else (state, jnp.tile(idle, 2))
                return state, jnp.concatenate([went, came])

            state, log = jax.lax.scan(tick, state, {key: column[phase] for key, column in rows.items()})
            logs.append(log)
        of_rest, sums = jax.lax.psum((state["rest"], state["sums"]), STAGE)
        of_layers = state["layers"] if self.rounds > 1 else jax.tree.map(lambda leaf: leaf[None], state["layers"])
        of_layers = jax.tree.map(lambda leaf: leaf[:, None], of_layers)
        return of_layers, *of_rest, sums, jnp.concatenate(logs)[:, None]

    def _flags(self) -> dict[str, Array]:
        """Returns for each tick, all stages alike, whether any goes forward, and whether a microbatch enters at the first, has
        its loss taken at the last, or its gradient comes out at the first."""
        table = self.table
        flags = {
            "goes": np.any(table.forward != IDLE, axis=1),
            "enters": table.forward_round[:, 0] == 0,
            "ends": table.backward_round[:, -1] == self.rounds - 1,
            "leaves": table.backward_round[:, 0] == 0,
        }
        return {name: jnp.asarray(flag) for name, flag in flags.items()}


State = dict[str, Any]
"""What a stage holds between ticks: inputs it has `kept`; what it sent `ahead` and `back`, with labels; the gradients of its
`layers` and of the `rest`, parameters that are in no layer and memory; and the `sums`."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """The work of one stage. A microbatch is labelled (its number, groups of layers passed) on its way through."""

    pipeline: Pipeline
    stage: Array
    layers: Tree
    outer: Tree
    memory: Float[Array, "M B S D"] | None
    given: Given

    @property
    def name(self) -> str:
        return self.pipeline.stacks[-1]

    def seam(self, outer: Tree, source: Array | None, number: Array) -> Seam:
        """Returns where the main stack stands in the model, for one microbatch and what it reads."""
        part, key = self.pipeline.part(self.given, number)
        return self.pipeline.seams(outer, part, key, encoder=source)[0][self.name]

    def front(self, outer: Tree, source: Array | None, number: Array) -> Array:
        """Returns what goes into the first layer."""
        return self.seam(outer, source, number).x

    def through(
        self, layers: Tree, outer: Tree, source: Array | None, x: Array, number: Array, group: Array
    ) -> tuple[tuple[Array, Array], Any]:
        """Returns what a group of layers makes of `x` and its share of the loss, and its sums."""
        seam = self.seam(outer, source, number)
        y, loss, sums = self.pipeline.run_layers(self.name, layers, seam, x, group, self.given.weights)
        return (y, loss), sums

    def loss(self, outer: Tree, source: Array | None, y: Array, number: Array) -> tuple[Array, Any]:
        """Returns the loss of a microbatch for what the last layer made of it, and its sums."""
        part, key = self.pipeline.part(self.given, number)
        _, outputs = self.pipeline.seams(outer, part, key, **{"encoder": source, self.name: y})
        terms = self.pipeline.objective.terms(self.pipeline.config.objective, outputs, part)
        loss, means = normalize(terms.losses | terms.auxiliary, self.given.weights)
        return loss, (means, terms.statistics)

    def of_round(self, layers: Tree, number: Array) -> Tree:
        """Returns the layers of one round. A single one has no dimension for it: the compiler then adds to gradients in place,
        where it would copy them."""
        return layers if self.pipeline.rounds == 1 else _read(layers, number)

    def forward(self, arrived: Any, kept: Any, row: Any) -> tuple[Any, Any, Array]:
        """Returns what the stage sends on, what it keeps, and the label of what came in."""
        number, group, outer = row["forward"], row["forward_round"] * self.pipeline.stages + self.stage, self.outer
        x, label = arrived
        source = _read(self.memory, number)
        x = jax.lax.cond(row["enters"], lambda: jnp.where(group == 0, self.front(outer, source, number), x), lambda: x)
        label = jnp.where(group == 0, jnp.stack([number, group]), label)
        before = _read(kept, row["forward_slot"])
        new = jax.tree.map(lambda new, old: jnp.where(number == IDLE, old, new), (x, label), before)
        kept = _write(kept, row["forward_slot"], new)
        (y, _), _ = self.through(self.of_round(self.layers, row["forward_round"]), outer, source, x, number, group)
        return (y, label + _PASSED), kept, label

    def backward(self, state: State, row: Any) -> tuple[State, Array]:
        """Returns the state after a gradient has passed, and the labels of the input that was kept and of the gradient."""
        number, group = row["backward"], row["backward_round"] * self.pipeline.stages + self.stage
        is_first, is_last = group == 0, group == self.pipeline.stages * self.pipeline.rounds - 1
        # Of a stage that rests nothing counts, though it computes as the others do.
        counts = (number != IDLE) & (number < self.given.used)
        source = _read(self.memory, number)
        x, label = _read(state["kept"], row["backward_slot"])
        gradient, arrived_label = self.pipeline.move(state["back"], -1)
        arguments = (self.of_round(self.layers, row["backward_round"]), self.outer, source, x)
        through, loss = partial(self.through, number=number, group=group), partial(self.loss, number=number)
        (y, share), pull, found = jax.vjp(through, *arguments, has_aux=True)
        sums = _add(state["sums"], _where(counts, (share, *found)))

        def collect(rest: Any, to_outer: Tree, to_source: Array | None) -> Any:
            of_outer, of_memory = rest
            of_source = jax.tree.map(jnp.add, _read(of_memory, number), to_source)
            return jax.tree.map(jnp.add, of_outer, to_outer), _write(of_memory, number, of_source)

        def end(gradient: Array, rest: Any, sums: Sums) -> Any:
            share, pull, found = jax.vjp(loss, self.outer, source, y, has_aux=True)
            *to_rest, to_y = pull(_where(counts & is_last, jnp.ones(())))
            sums = _add(sums, _where(counts & is_last, (share, *found)))
            return jnp.where(is_last, to_y, gradient), collect(rest, *to_rest), sums

        gradient, rest, sums = jax.lax.cond(row["ends"], end, lambda *same: same, gradient, state["rest"], sums)
        to_layers, *to_rest, to_x = pull((_where(counts, gradient), _where(counts, jnp.ones(()))))
        rest = collect(rest, *to_rest)

        def leave(rest: Any) -> Any:
            _, pull = jax.vjp(lambda outer, source: self.front(outer, source, number), self.outer, source)
            return collect(rest, *pull(_where(is_first, to_x)))

        rest = jax.lax.cond(row["leaves"], leave, lambda same: same, rest)
        place = row["backward_round"]
        of_layers = jax.tree.map(jnp.add, self.of_round(state["layers"], place), to_layers)
        of_layers = of_layers if self.pipeline.rounds == 1 else _write(state["layers"], place, of_layers)
        state = state | {"back": (to_x, label), "layers": of_layers, "rest": rest, "sums": sums}
        return state, jnp.concatenate([label, jnp.where(is_last, label + _PASSED, arrived_label)])


def _read(tree: Any, place: Array) -> Any:
    """Returns entry number `place` of the first dimension of every array, the first for a stage that rests."""
    return jax.tree.map(lambda all: jax.lax.dynamic_index_in_dim(all, jnp.maximum(place, 0), keepdims=False), tree)


def _write(tree: Any, place: Array, new: Any) -> Any:
    """Returns the arrays with that entry replaced."""
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda all, one: put(all, one, jnp.maximum(place, 0), 0), tree, new)


_PASSED = np.array([0, 1], np.int32)


def _where(condition: Array, values: Any) -> Any:
    """Returns `values`, or zeros."""
    return jax.tree.map(lambda value: jnp.where(condition, value, 0).astype(value.dtype), values)


def _add(total: Any, more: Any) -> Any:
    """Returns sums with some of them added to."""
    if isinstance(total, dict):
        return total | {name: _add(total[name], value) for name, value in more.items()}
    if isinstance(total, tuple):
        return tuple(map(_add, total, more))
    return total + more
