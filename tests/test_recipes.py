"""Recipes of published models have the sizes that their docstrings tell."""

import dataclasses
import importlib
import json

import pytest

from transformer import cli
from transformer.arguments import load_config
from transformer.config import problems_of
from transformer.describe import describe_config
from transformer.models.parameters import num_parameters
from transformer.models.transformer import Transformer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("bert_base", 108_888_576), ("t5_base", 247_577_856), ("llama_1b", 1_235_814_400)],
)
def test_number_of_parameters(
    name: str, parameters: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"configs.{name}")
    assert f"{parameters:,} parameters" in " ".join(str(module.__doc__).split())
    assert load_config(name)[0] == module.get_config() and problems_of(module.get_config()) == []
    monkeypatch.setattr("transformer.parallel.startup.start", lambda config: None)
    # Whatever the optimizer, the parameters are the same.
    assert cli.run(["describe", "--config", name, "--optimizer.name", "adamw", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parameters"] == sum(result["parameters_by_module"].values()) == parameters
    rows = {array["name"]: array["shape"][:1] for array in result["arrays"]}["params/embedding"]
    assert rows == [{"bert_base": 30_592, "t5_base": 32_128, "llama_1b": 128_256}[name]]


@pytest.mark.parametrize("name", ["llama2_7b", "llama3_8b", "llama3_70b", "llama3_405b", "deepseek_v3_like"])
def test_number_of_parameters_of_large_models(name: str) -> None:
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert problems_of(config) == [] and load_config(name)[0] == config
    model = Transformer(dataclasses.replace(config.model, scan_layers=True))
    assert f"{num_parameters(model):,} parameters" in " ".join(str(module.__doc__).split())


def test_a_vocabulary_that_is_given_has_room_for_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the data tells the tokenizer's size, the model's own is taken for both together."""
    monkeypatch.setattr("transformer.parallel.startup.start", lambda config: None)
    config = cli.parse(
        ["describe", "--config", "bert_base", "--data.tokenizer", "characters", "--model.vocab-size", "1000"]
    ).config
    assert describe_config(config)["parameters_by_module"]["embedding"] == 1000 * 768
