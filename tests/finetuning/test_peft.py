"""Adapters in PEFT's format: what is written is read as it was, PEFT computes the same with it, and what PEFT writes is read."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from transformer.config import AdapterConfig, Config, ConfigError, ModelConfig, replace
from transformer.huggingface import peft
from transformer.huggingface.exporting import family_for
from transformer.huggingface.header import read_header
from transformer.huggingface.table import Family
from transformer.huggingface.translation import read_config
from transformer.huggingface.writing import write, write_tensors
from transformer.models.adapters import adapted, begun, merged
from transformer.models.parameters import Tree, divide, init_parameters, join, parameter_specs
from transformer.models.transformer import Transformer, apply

VOCAB = 97
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 30, "n_layer": 2, "n_head": 5, "n_positions": 64},
    "llama": {
        **{"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 30, "intermediate_size": 44, "head_dim": 6},
        **{"num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 1, "max_position_embeddings": 64},
    },
}
HEADLESS: dict[str, dict[str, Any]] = {
    "bert": {
        **{"model_type": "bert", "architectures": ["BertModel"], "vocab_size": VOCAB, "hidden_size": 30},
        **{"intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 5, "max_position_embeddings": 64},
    }
}
ADAPTERS = {
    "lora": AdapterConfig(kind="lora", rank=3, alpha=6.0),
    "stabilized": AdapterConfig(kind="lora", rank=4, rank_stabilized=True, targets=("query", "value", "down")),
    "dora": AdapterConfig(kind="dora", rank=2),
}


def model_of(name: str) -> tuple[Family, ModelConfig]:
    from transformer.huggingface.families import family_of

    theirs = (MODELS | HEADLESS)[name]
    family = family_of(theirs["model_type"])
    return family, read_config(family, theirs, name)


def ready(model: ModelConfig) -> ModelConfig:
    return replace(Config(model=model), model={"scan_layers": False}).model


def made(name: str, adapter: AdapterConfig) -> tuple[Family, Transformer, Tree, Tree, Tree]:
    """Returns the family, the model with an adapter that has learnt, its base's parameters, its own, and the frozen ones."""
    from transformer.checkpointing.bases import frozen
    from transformer.parallel.sharding import make_mesh

    family, config = model_of(name)
    base = init_parameters(Transformer(ready(config)), jax.random.key(0))
    base = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, base)
    model = adapted(Transformer(ready(config)), adapter)
    held = jax.tree.map(lambda leaf: leaf, base)
    one = make_mesh(replace(Config(), parallel={"fsdp": 1}, train={"batch_size": 8}), jax.devices()[:1])
    rest = frozen(model, held, one)
    trained = begun(divide(init_parameters(model, jax.random.key(1)), parameter_specs(model))[0], held)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32), trained)
    return family, model, base, trained, rest


def save(path: Path, given: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    path.mkdir()
    write_tensors(path / peft.WEIGHTS, [(name, value.shape) for name, value in tensors.items()], tensors.items())
    (path / peft.CONFIG).write_text(json.dumps(given | {"task_type": "CAUSAL_LM"}))


def test_what_is_written_is_read_as_it_was(tmp_path: Path) -> None:
    for name, kind in itertools.product(MODELS, ADAPTERS):
        adapter = ADAPTERS[kind]
        family, model, _, trained, _ = made(name, adapter)
        if (name, kind) == ("gpt2", "stabilized"):
            # The key between them has no adapter: B's rows for it are zero, and so it gets one that does nothing.
            continue
        given, tensors = peft.written(model, trained, family)
        folder = tmp_path / f"{name}-{kind}"
        save(folder, given, tensors)
        stored = read_header(folder / peft.WEIGHTS)[0]
        found, arrays = peft.read(given, stored, model.config, family, str(folder))
        assert found.scale == adapter.scale and found.rank == adapter.rank, (name, kind)
        assert found.targets == tuple(sorted(adapter.targets)), (name, kind)
        own = peft._flat(trained)
        assert own.keys() == arrays.keys(), (name, kind)
        for path, leaf in own.items():
            assert np.array_equal(arrays[path], leaf), (name, kind, path)


def test_a_class_without_a_head_has_other_names(tmp_path: Path) -> None:
    """BertModel is `bert` itself; in BertForMaskedLM its modules are below that name, and either is read."""
    family, model, _, trained, _ = made("bert", ADAPTERS["lora"])
    given, tensors = peft.written(model, trained, family)
    assert not any(name.startswith("base_model.model.bert.") for name in tensors)
    for number, more in enumerate(("", "bert.")):
        renamed = {name.replace(peft.PREFIX, peft.PREFIX + more): value for name, value in tensors.items()}
        folder = tmp_path / str(number)
        save(folder, given, renamed)
        stored = read_header(folder / peft.WEIGHTS)[0]
        config = replace(Config(model=model.config), model={"scan_layers": None}).model
        found, arrays = peft.read(given, stored, config, family, str(folder))
        assert found.targets == ("*",)
        for path, leaf in peft._flat(trained).items():
            assert np.array_equal(arrays[path], leaf), path


def test_what_is_not_for_this_base_is_refused(tmp_path: Path) -> None:
    family, model, _, trained, _ = made("llama", ADAPTERS["lora"])
    given, tensors = peft.written(model, trained, family)
    for number, (change, rename, message) in enumerate(
        [
            ({"modules_to_save": ["lm_head"]}, {}, r"modules_to_save = \['lm_head'\]"),
            ({"peft_type": "IA3"}, {}, "peft_type = 'IA3'"),
            ({"init_lora_weights": "pissa_niter_4"}, {}, "changes the base itself"),
            ({"init_lora_weights": "lora_ga"}, {}, "changes the base itself"),
            ({"alora_invocation_tokens": [5, 6]}, {}, "alora_invocation_tokens = "),
            ({"lora_alpha": "x"}, {}, "lora_alpha = 'x' is not a number"),
            ({"lora_alpha": float("nan")}, {}, "lora_alpha = nan is not a number"),
            ({"lora_dropout": "x"}, {}, "lora_dropout = 'x' is not a number"),
            ({"alpha_pattern": ["a"]}, {}, r"alpha_pattern = \['a'\] is not an object"),
            ({"alpha_pattern": {"q_proj": "z"}}, {}, r"alpha_pattern\['q_proj'\] = 'z' is not a number"),
            ({"alpha_pattern": {"(q_proj": 1}}, {}, "'\\(q_proj' is no regular expression"),
            ({}, {"layers.1.": "layers.7."}, r"layers.7.\S+ \(3, 30\) is of no linear map of the base"),
        ]
    ):
        renamed = {}
        for name, value in tensors.items():
            for old, new in rename.items():
                name = name.replace(old, new)
            renamed[name] = value
        folder = tmp_path / str(number)
        save(folder, given | change, renamed)
        with pytest.raises(ConfigError, match=message):
            peft.read(given | change, read_header(folder / peft.WEIGHTS)[0], model.config, family, str(folder))
    wide = replace(Config(model=model.config), model={"feedforward_width": 50}).model
    save(tmp_path / "wide", given, tensors)
    with pytest.raises(ConfigError, match=r"up_proj has lora_A \(3, 30\) and lora_B \(44, 3\).*30 to 50"):
        peft.read(given, read_header(tmp_path / "wide" / peft.WEIGHTS)[0], wide, family, "wide")


@pytest.mark.parametrize(
    ("pattern", "scaled"),
    [
        ("q_proj", ["query", "query"]),
        (".*q_proj", ["query", "query"]),
        (r"model\.layers\.[01]\.self_attn\.(q|v)_proj", ["query", "query", "value", "value"]),
        ("^model.layers.0.self_attn.q_proj", ["query"]),
        ("proj", []),
    ],
)
def test_patterns_of_alpha_are_those_of_peft(pattern: str, scaled: list[str], tmp_path: Path) -> None:
    """Regular expressions, of the whole name or of an end of it after a dot."""
    family, model, _, trained, _ = made("llama", ADAPTERS["lora"])
    given, tensors = peft.written(model, trained, family)
    given["alpha_pattern"] = {pattern: 60.0}
    save(tmp_path / "adapter", given, tensors)
    stored = read_header(tmp_path / "adapter" / peft.WEIGHTS)[0]
    found, arrays = peft.read(given, stored, model.config, family, "adapter")
    own = peft._flat(trained)
    products = {path: arrays[path] * found.scale / (own[path] * 2) for path in own if path.endswith("lora_b")}
    layers = [(path.split("/")[-2], factor) for path, ratio in products.items() for factor in ratio[:, 0, 0]]
    assert sorted(name for name, factor in layers if abs(factor - 10) < 1e-4) == scaled
    assert all(abs(factor - 10) < 1e-4 or abs(factor - 1) < 1e-5 for _, factor in layers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_the_same_and_back(name: str, kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    library, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    family, model, base, trained, rest = made(name, ADAPTERS[kind])
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", family, model.config, base)
    given, tensors = peft.written(model, trained, family)
    save(tmp_path / "adapter", given, tensors)
    tokens = np.random.default_rng(1).integers(3, VOCAB, (2, 20), dtype=np.int32)

    def theirs(folder: Path) -> Any:
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        return library.PeftModel.from_pretrained(plain, folder).eval()

    def their_logits(network: Any) -> np.ndarray:
        with torch.no_grad():
            return network(torch.tensor(tokens, dtype=torch.long)).logits.numpy()

    def our_logits(network: Transformer, params: Tree) -> np.ndarray:
        batch = {"inputs": tokens, "positions": np.tile(np.arange(20, dtype=np.int32), (2, 1))}
        batch["segment_ids"] = np.ones_like(tokens)

        def run(params: Tree, batch: Any) -> Any:
            outputs = apply(network, params, batch)
            return outputs.logits(outputs.hidden)[..., :VOCAB]

        return np.asarray(jax.jit(run)(params, batch))

    network = theirs(tmp_path / "adapter")
    ours, plain = our_logits(model, join(trained, rest)), our_logits(Transformer(model.config), base)
    found = their_logits(network)
    assert np.linalg.norm(plain - ours) > 0.05 * np.linalg.norm(ours)
    assert np.linalg.norm(found - ours) <= 1e-5 * np.linalg.norm(ours)
    merged_logits = our_logits(Transformer(model.config), merged(model, join(trained, rest)))
    assert np.linalg.norm(merged_logits - ours) <= 1e-5 * np.linalg.norm(ours)

    # Back: PEFT writes what it has read, and we read that.
    network.save_pretrained(tmp_path / "again")
    folder = tmp_path / "again"
    stored, again = read_header(folder / peft.WEIGHTS)[0], json.loads((folder / peft.CONFIG).read_text())
    adapter, arrays = peft.read(again, stored, model.config, family, str(folder))
    other = adapted(Transformer(model.config), adapter)
    if adapter.targets == ADAPTERS[kind].targets:
        for path, leaf in peft._flat(trained).items():
            assert np.array_equal(arrays[path], leaf), path
    from transformer.checkpointing.bases import frozen
    from transformer.parallel.sharding import make_mesh

    one = make_mesh(replace(Config(), parallel={"fsdp": 1}, train={"batch_size": 8}), jax.devices()[:1])
    held = frozen(other, jax.tree.map(lambda leaf: leaf, base), one)
    back = our_logits(other, join(peft._tree(arrays), held))
    assert np.linalg.norm(back - ours) <= 1e-5 * np.linalg.norm(ours)


def test_families_are_found(tmp_path: Path) -> None:
    for name in MODELS:
        family, config = model_of(name)
        assert family_for(config, family.model_type) is family
