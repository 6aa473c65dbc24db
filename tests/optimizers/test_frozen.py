"""Parameters that are not trained."""

from typing import Any

import jax
import numpy as np
import pytest

from transformer.checkpointing.transfer import flat
from transformer.config import ConfigError, problems_of, replace
from transformer.config.path_patterns import matches
from transformer.models.parameters import parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import OPTIMIZERS, make_optimizer
from transformer.parallel.sharding import make_mesh
from transformer.training.state import create_state, state_shardings
from transformer.training.step import make_train_step

FROZEN = ("embedding", "re:decoder/layers/(mixer|mixer_norm)/.*")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_has_no_state(tiny_config: Any, name: str) -> None:
    """Neither moments nor averages, whatever the rule; with a router's biases beside it."""
    experts = {"layers": "attention/experts", "balance_bias_rate": 1e-3, "num_experts": 2, "experts_per_token": 1}
    config = tiny_config(optimizer={"name": name, "frozen": FROZEN}, model=experts)
    model = Transformer(config.model)
    specs = parameter_specs(model)
    shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, "float32"), specs)
    optimizer = make_optimizer(config, specs)
    state = jax.eval_shape(optimizer.init, shapes)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    trained = [path for path in flat(specs) if not matches(FROZEN, path)]
    assert 0 < len(trained) < len(flat(specs))
    moments = {path for path in flat(specs) if any(found.endswith("/" + path) for found in names)}
    assert moments <= set(trained)
    assert moments == set() if name == "sgd" else moments >= {"decoder/final_norm/scale"}
    updates, after = jax.eval_shape(lambda p, s: optimizer.update(p, s, p, rate=0.1), shapes, state)
    assert flat(updates).keys() == set(trained) and jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("parts", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_what_is_frozen_stays_to_the_bit(tiny_config: Any, tiny_batch: Any, parts: int) -> None:
    """On eight devices; what is trained moves as it does when all of it is, and the norm is of its gradient alone."""
    optimizer = {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "clip_norm": 0.0}
    split: Any = {"fsdp": 4, "tensor": 2}
    whole = tiny_config(model={"num_layers": 1}, optimizer=optimizer, train={"num_microbatches": parts}, parallel=split)
    model, batch, mesh = Transformer(whole.model), tiny_batch(whole), make_mesh(whole)
    after, norms = {}, {}
    with jax.set_mesh(mesh):
        for frozen in ((), FROZEN):
            config = replace(whole, optimizer={"frozen": frozen})
            rule = make_optimizer(config, parameter_specs(model))
            shardings = state_shardings(model, rule, mesh)
            state = create_state(config, model, rule, shardings)
            before = flat(jax.device_get(state.params))
            state, metrics = jax.jit(make_train_step(config, model, rule, shardings))(state, batch)
            after[frozen], norms[frozen] = flat(jax.device_get(state.params)), float(metrics["gradient_norm"])
    squares = 0.0
    for name, values in before.items():
        moved = after[FROZEN][name] - values
        if matches(FROZEN, name):
            assert after[FROZEN][name].tobytes() == values.tobytes() != after[()][name].tobytes(), name
        else:
            expected = after[()][name] - values
            assert np.linalg.norm(moved - expected) <= 1e-5 * np.linalg.norm(expected) != 0, name
            squares += float(np.sum(np.square(expected / 0.1)))
    assert norms[FROZEN] == pytest.approx(squares**0.5, rel=1e-4) and norms[()] > norms[FROZEN]


def test_patterns_that_choose_nothing_are_mistakes(tiny_config: Any) -> None:
    config = tiny_config()
    specs = parameter_specs(Transformer(config.model))
    for frozen, message in (
        (("decoder/layer/*",), r"'decoder/layer/\*': no parameter matches"),
        (("*",), "nothing is left to train"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_optimizer(replace(config, optimizer={"frozen": frozen}), specs)
    for optimizer, message in (
        ({"frozen": ("re:(",)}, "is no regular expression"),
        ({"frozen": ("",)}, "is no pattern"),
        ({"frozen": ("embedding",), "ema_decay": 0.9}, "averages all parameters"),
        ({"depth_rate": 1.5}, "must be at most 1"),
    ):
        assert [message in problem for problem in problems_of(replace(config, optimizer=optimizer))] == [True]
