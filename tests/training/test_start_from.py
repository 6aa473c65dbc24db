"""Runs that begin with the parameters of others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.loading import load_parameters
from transformer.checkpointing.run import CHECKPOINTS, for_platform, load_run
from transformer.checkpointing.transfer import flat
from transformer.config import Config, ConfigError, from_json, replace, to_json
from transformer.data.plain_tokenizers import ByteTokenizer, CharacterTokenizer
from transformer.data.prepare import prepare
from transformer.models.parameters import init_parameters, parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import make_mesh
from transformer.training import loop
from transformer.training.start_from import opened
from transformer.training.state import state_shardings

Make = Callable[..., Config]

QUIET = {"every_steps": 0, "sample_tokens": 0}


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that makes a run directory as an import leaves it: parameters alone, and nothing trained."""

    def make(config: Config, name: str = "source", steps: tuple[int, ...] = (0,)) -> Path:
        config = replace(config, model={"vocab_size": config.model.vocab_size or 260, "num_positions": 16})
        workdir = tmp_path / name
        ByteTokenizer().save(workdir / "tokenizer")
        (workdir / "corpus.json").write_text(json.dumps({"fingerprint": "none"}))
        (workdir / "config.json").write_text(to_json(config))
        model = Transformer(for_platform(config.model, "cpu"))
        with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
            for step in steps:
                checkpoints.save(step, init_parameters(model, jax.random.key(100 + step)))
        return workdir

    return make


def parameters_of(workdir: Path, **which: Any) -> dict[str, np.ndarray]:
    run = load_run(workdir)
    mesh = make_mesh(replace(run.config, parallel={"fsdp": 8, "replica": 1}))
    return jax.device_get(flat(load_parameters(run, mesh, **which)[1]))


def begun(config: Config, tmp_path: Path, own: Any = None) -> tuple[dict[str, np.ndarray], list[str], Config]:
    """Returns the parameters before the first step, what is told of them, and the configuration, without training."""
    from transformer.data.prepared import Prepared

    config, start = opened(config, tmp_path / "new")
    assert start is not None
    tokenizer: Any = own or start.source.tokenizer
    extra = {"vocab_size": config.model.vocab_size or 260, "num_positions": config.model.num_positions or 16}
    config = replace(config, model=extra)
    model = Transformer(for_platform(config.model, "cpu"))
    config = start.check(config, Prepared(tokenizer, "data", ()), model)
    optimizer = make_optimizer(config, parameter_specs(model))
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        shardings = state_shardings(model, optimizer, mesh)
        state = start.state(config, model, optimizer, shardings, loop.restore)
    assert jax.tree.map(lambda leaf: leaf.sharding, state.params) == shardings.params
    return jax.device_get(flat(state.params)), start.lines, config


def test_a_cooldown_equals_the_uninterrupted_run(
    make_run: Make,
    tmp_path: Path,
    read_state: Any,
    read_lines: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two runs with constant phases that coincide; from a step of the longer one the end of the shorter one is computed."""
    wsd = {"schedule": "wsd", "warmup_steps": 2, "decay_share": 0.5, "final_ratio": 0.0}
    whole = make_run(optimizer=wsd, train={"num_steps": 8}, evaluation=QUIET, checkpoint={"every_steps": 0})
    prepared = prepare(whole, show_progress=False)
    monkeypatch.setattr(loop, "prepare_apart", lambda config, show_progress: prepared)
    assert loop.run(whole, tmp_path / "whole") == 0
    every = {"every_steps": 4, "keep_latest": 9}
    long = replace(whole, optimizer={"decay_share": 0.25}, train={"num_steps": 12}, checkpoint=every)
    assert loop.run(long, tmp_path / "long") == 0
    start = {"run": str(tmp_path / "long"), "step": 4, "optimizer": "keep", "progress": "keep"}
    branch = replace(whole, init_from=start)
    capsys.readouterr()
    assert loop.run(branch, tmp_path / "branch") == 0
    told = capsys.readouterr().out
    assert "corpus: the source's, read on from step 4" in told and "optimizer: the state of the source" in told

    left, right = read_state(tmp_path / "whole"), read_state(tmp_path / "branch")
    assert left.keys() == right.keys()
    assert [name for name in left if left[name].tobytes() != right[name].tobytes()] == []
    lines = read_lines(tmp_path / "whole")
    assert read_lines(tmp_path / "branch") == [line for line in lines if line["step"] > 4]
    assert lines[3]["learning_rate"] > lines[6]["learning_rate"] > lines[7]["learning_rate"]
    assert read_lines(tmp_path / "long")[7]["loss"] != lines[7]["loss"]

    # What is branched needs its source no more; it knows where it began.
    shutil.rmtree(tmp_path / "long")
    resumed, begins = opened(branch, tmp_path / "branch")
    assert begins is None and resumed.data.tokenizer == "bytes"
    assert from_json((tmp_path / "branch" / "config.json").read_text()).init_from.run == start["run"]
    with pytest.raises(ConfigError, match=r"init_from.run = 'elsewhere' contradicts the run, which has"):
        opened(replace(branch, init_from={"run": "elsewhere"}), tmp_path / "branch")


def test_a_run_begins_with_what_another_has(make_run: Make, make_source: Callable[..., Path], tmp_path: Path) -> None:
    """The model and the tokenizer are the source's where the configuration says nothing; the rest is as if from scratch."""
    model = {"num_layers": 2, "width": 16, "num_heads": 2, "feedforward_width": 32, "positions": "learned"}
    source = make_source(make_run(model=model), steps=(0, 3))
    config = replace(make_run(), model={"num_layers": 4, "width": 256, "num_heads": 4}, init_from={"run": str(source)})
    params, lines, config = begun(config, tmp_path)
    expected = parameters_of(source)
    assert params.keys() == expected.keys()
    assert [name for name in params if params[name].tobytes() != expected[name].tobytes()] == []
    assert (config.model.num_layers, config.model.width, config.model.positions) == (2, 16, "learned")
    assert config.data.tokenizer == "bytes" and config.data.tokenizer_path == ""
    assert lines[0] == f"begins with step 3 of {source}" and lines[-1] == "  optimizer: a fresh state"
    assert "  corpus: another one than the source's, from its beginning" in lines
    assert not any("begins as new" in line or "left" in line for line in lines)

    mean, lines, _ = begun(replace(config, init_from={"average": 2}), tmp_path)
    both = [parameters_of(source, step=step) for step in (0, 3)]
    for name, values in mean.items():
        np.testing.assert_allclose(values, (both[0][name] + both[1][name]) / 2, rtol=1e-6, atol=1e-7)
    assert lines[0] == f"begins with the mean of the steps 0, 3 of {source}"
    # Parameters alone cannot be gone on with, in their own directory or by keeping an optimizer's state.
    with pytest.raises(ConfigError, match=r"init_from.optimizer = 'keep': step 3 of .* holds parameters alone"):
        begun(replace(config, init_from={"optimizer": "keep"}), tmp_path)
    with (
        pytest.raises(ConfigError, match=r"checkpoint 3 of .* holds parameters alone"),
        Checkpoints(source / CHECKPOINTS) as c,
    ):
        c.restore(3, params={}, rest={"opt_state": {}})


def test_a_start_in_parts(make_run: Make, make_source: Callable[..., Path], tmp_path: Path) -> None:
    """More tokens, longer texts, fewer layers, and parameters that only one of the models has."""
    model = {"num_layers": 4, "positions": "learned", "tied_embeddings": False}
    source = make_source(make_run(model=model))
    old = parameters_of(source)
    begins = {"run": str(source), "layers": "spread", "exclude": ("head",)}
    config = make_run(model={"num_layers": 2, "vocab_size": 270}, data={"sequence_length": 40}, init_from=begins)
    params, lines, _ = begun(config, tmp_path)
    assert np.array_equal(params["embedding"][:260], old["embedding"][:260])
    np.testing.assert_allclose(
        params["embedding"][260:270], np.tile(old["embedding"][:260].mean(0), (10, 1)), rtol=1e-5
    )
    assert not params["embedding"][270:].any() and params["embedding"].shape == (384, 16)
    assert np.array_equal(params["positions"], np.concatenate([old["positions"]] * 3)[:40])
    kernel = "decoder/layers/mixer/query/kernel"
    assert np.array_equal(params[kernel], old[kernel][[0, 2]])
    assert np.array_equal(params["decoder/final_norm/scale"], old["decoder/final_norm/scale"])
    assert params["head"][:270].std() == pytest.approx(0.02, rel=0.1) and params["head"].shape == (384, 16)
    told = "\n".join(lines)
    for line in (
        "loaded: embedding: the rows of 10 more tokens begin as the mean of the 260 old ones",
        "loaded: positions: 16 positions over again up to 40",
        f"loaded: {kernel}: 0, 2 of its 4 groups of layers, counted from 0",
        "begins as new: head",
        "left: head",
        "model.num_layers = 2, and 4 in the source",
    ):
        assert line in told, told

    problems = _problems(replace(config, init_from={"layers": "all", "exclude": ()}, model={"head_width": 4}), tmp_path)
    assert len([line for line in problems if kernel in line]) == 1
    assert f"{kernel} is (2, 16, 8), and (4, 16, 16) in step 0 of {source}" in "\n".join(problems)
    # A stack with another name, and one whose second half reads an encoder that there is not.
    both = {"architecture": "encoder_decoder", "num_encoder_layers": 4, "num_layers": 4}
    begins = {"run": str(source), "rename": ("encoder=decoder",), "allow_missing": ("decoder/layers/cross*",)}
    pairs: Any = {"objective": {"name": "span_corruption"}, "model": both, "init_from": begins}
    params, lines, config = begun(make_run(**pairs), tmp_path)
    assert np.array_equal(params["encoder/layers/mixer/key/kernel"], old["decoder/layers/mixer/key/kernel"])
    assert np.array_equal(params["decoder/layers/mixer/key/kernel"], old["decoder/layers/mixer/key/kernel"])
    assert "encoder/final_norm/scale (from decoder/final_norm/scale)" in lines[2]
    (fresh,) = [line for line in lines if "begins as new" in line]
    assert all(name.startswith("decoder/layers/cross") for name in fresh.partition(": ")[2].split(", "))
    missing = _problems(replace(config, init_from={"allow_missing": ()}), tmp_path)
    assert len(missing) == 5 and all("is not in step 0" in line and "allow_missing" in line for line in missing)


def test_an_encoder_becomes_that_of_an_encoder_decoder(
    make_run: Make, make_source: Callable[..., Path], tmp_path: Path
) -> None:
    """Whose depths and layers follow from it; its token for masks is kept, so that no row changes its number."""
    model = {"architecture": "encoder", "num_layers": 3, "vocab_size": 261}
    source = make_source(make_run(objective={"name": "masked_lm"}, model=model))
    old = parameters_of(source)
    begins = {"run": str(source), "allow_missing": ("decoder/*",)}
    config = make_run(
        objective={"name": "span_corruption"}, model={"architecture": "encoder_decoder"}, init_from=begins
    )
    params, _, config = begun(config, tmp_path)
    assert (config.model.num_encoder_layers, config.model.num_layers, config.model.vocab_size) == (3, 1, 360)
    assert np.array_equal(params["embedding"][:261], old["embedding"][:261])
    assert all(np.array_equal(params[name], old[name]) for name in old if name != "embedding")


def _problems(config: Config, tmp_path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        begun(config, tmp_path)
    return list(caught.value.problems)


def test_every_mistake_is_told_before_anything_is_written(
    make_run: Make, make_source: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(make_run(model={"biases": True}))
    config = make_run(model={"biases": False}, init_from={"run": str(source), "model": "own"})
    problems = _problems(config, tmp_path)
    assert len(problems) == 9 and all(f"of step 0 of {source} is not in the model" in line for line in problems)
    assert problems[0].startswith("decoder/final_norm/bias (16,)")
    for change, message in (
        ({"step": 7}, "has no checkpoint of step 7; there are: 0"),
        ({"best": True}, "has no checkpoint with a validation loss"),
        ({"average": 3}, "3 checkpoints cannot be averaged"),
        ({"run": str(tmp_path)}, "is not a run directory"),
        ({"include": ("decoder/layer/*",)}, r"init_from.include = 'decoder/layer/\*': no parameter matches"),
        ({"exclude": ("*",), "allow_extra": ("*",)}, "leave nothing to load"),
        ({"progress": "keep", "optimizer": "keep", "run": str(make_source(make_run(optimizer={"name": "lion"}), "lion"))},
         "optimizer.name = 'adamw': init_from.optimizer = 'keep', and the source has 'lion'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            begun(replace(config, init_from=change), tmp_path)
    # Another tokenizer would give the rows of the table other meanings.
    own = make_run(data={"tokenizer": "characters"}, init_from={"run": str(source), "tokenizer": "own"})
    with pytest.raises(ConfigError, match=r"another one than that of step 0 .* embedding would mean other tokens"):
        begun(own, tmp_path, CharacterTokenizer("abc"))
    prepared = prepare(make_run(), show_progress=False)
    monkeypatch.setattr(loop, "prepare_apart", lambda config, show_progress: prepared)
    with pytest.raises(ConfigError, match="nothing is left to do after step 20"):
        late = make_source(make_run(), "late", steps=(20,))
        loop.run(make_run(init_from={"run": str(late), "progress": "keep"}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_begins_with_a_published_model(make_run: Make, tmp_path: Path) -> None:
    """All of it is the folder's, with not a word on the model; and so from a run that was imported from it."""
    import tokenizers

    from transformer.huggingface.families import family_of
    from transformer.huggingface.folder import Folder
    from transformer.huggingface.importing import import_model
    from transformer.huggingface.writing import write

    published = tmp_path / "published"
    published.mkdir()
    words = {word: number for number, word in enumerate(("<s>", "</s>", *map(chr, range(97, 123)), " "))}
    splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    splitter.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    splitter.save(str(published / "tokenizer.json"))
    (published / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    shape = {"num_layers": 2, "width": 16, "num_heads": 4, "num_kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm"}
    model = make_run(model=shape | {"vocab_size": 40, "num_positions": 32, "feedforward_width": 24}).model
    params = init_parameters(Transformer(for_platform(model, "cpu")), jax.random.key(7))
    write(published, family_of("llama"), model, params)
    expected = jax.device_get(flat(params))

    config = replace(Config(), parallel={"fsdp": 4, "tensor": 2}, data={"cache_dir": str(tmp_path / "cache")})
    config = replace(config, init_from={"huggingface": str(published)})
    found, lines, resolved = begun(config, tmp_path)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name].tobytes() != expected[name].tobytes()] == []
    assert lines[0] == f"begins with {published}" and resolved.model.vocab_size == 40
    assert resolved.data.tokenizer == "huggingface" and resolved.data.tokenizer_path == str(
        tmp_path / "new" / "tokenizer"
    )
    assert (tmp_path / "new" / "tokenizer" / "published" / "tokenizer_config.json").exists()

    import_model(Folder(published), tmp_path / "imported", Config(), make_mesh(config))
    config = replace(config, init_from={"huggingface": "", "run": str(tmp_path / "imported")})
    again, lines, _ = begun(config, tmp_path)
    assert [name for name in again if again[name].tobytes() != expected[name].tobytes()] == []
    with pytest.raises(ConfigError, match="holds parameters alone"):
        begun(replace(config, init_from={"optimizer": "keep"}), tmp_path)
    (published / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        begun(replace(config, init_from={"run": "", "huggingface": str(published)}), tmp_path)
