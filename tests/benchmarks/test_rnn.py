"""Recurrent networks against attention: what is compared is equal, and the model of time finds what it was made of."""

import json
from pathlib import Path

import pytest

from transformer.arguments import load_config
from transformer.benchmarks import roofline
from transformer.benchmarks.rnn import Options, run, split, with_mixer
from transformer.benchmarks.rnn_report import LANE, Cell, fit, predicted, report
from transformer.checkpointing.run import for_platform, resolve
from transformer.config import ConfigError, replace
from transformer.models.parameters import num_parameters
from transformer.models.transformer import Transformer
from transformer.parallel import startup


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has its devices already."""
    monkeypatch.setattr(startup, "_started", True)


LATENCY, THROUGHPUT = 1e-5, {"attention": 2e9, "lstm": 5e8}


def cells() -> list[Cell]:
    """Steps that take exactly what the model says: attention waits for nothing, an LSTM for every token."""
    made = []
    for length in (64, 1024, 16384):
        for mixer, work, chain in (("attention", 10**10 + 10**6 * length, 20), ("lstm", 10**10, 6 * length)):
            seconds = max(work / THROUGHPUT[mixer], chain * LATENCY)
            made.append(Cell(mixer, length, 1000, (seconds,) * 3, 2**20, work, 10**9, chain))
    # Long enough that nothing but the chain counts.
    made.append(Cell("lstm", 2**24, 1000, (6 * 2**24 * LATENCY,), 2**20, 10**10, 10**9, 6 * 2**24))
    return made


def test_the_model_of_time_finds_what_it_was_made_of() -> None:
    found = fit(cells())
    assert found is not None and max(map(abs, found.errors)) < 0.1
    assert found.latency == pytest.approx(LATENCY, rel=0.1)
    assert found.throughput == pytest.approx(THROUGHPUT, rel=0.1)
    assert fit([Cell("lstm", 64, 1, (), 1, 1, 1, 1)]) is None


def test_many_lanes_make_attention_the_faster_of_the_two() -> None:
    found = fit(cells())
    assert found is not None
    ceiling = 10 * LANE
    few, many = (predicted(cells(), found, ceiling, lanes) for lanes in (10, 100_000))
    # With ten lanes as measured: work against work, until attention's has grown.
    assert few[64] == pytest.approx(4.0, rel=0.2) and few[2**18] < few[2**12]
    # With ten thousand times as many: an LSTM waits as before, and attention still works.
    assert many[64] == pytest.approx(64 * 6 * LATENCY / (cells()[0].seconds[0] / 10_000), rel=0.2)
    assert many[2**14] > many[2**10] > many[64]


def test_a_report_has_every_table_and_says_what_was_not_run() -> None:
    made = [*cells(), Cell("attention", 2**24, 1000, (), 2**40, 10**16, 10**12, 20)]
    machine = {"num_devices": 1, "device_kind": "cpu", "processor": "some", "versions": {"jax": "1"}}
    text = report(made, 1e11, {"attention": 8.0, "lstm": 1.8}, machine)
    assert "| attention | 0.199 | 0.181 | 0.0758 | not run |" in text
    assert "| lstm | 384 | 6,144 | 98,304 | 100,663,296 |" in text
    assert "| lstm | 1.8 |" in text and "off by" in text and "| 100,000 |" in text


@pytest.mark.parametrize("mixer", ["lstm", "gru", "mingru", "gated_delta_net", "mamba2"])
def test_mixers_are_compared_at_equal_parameters(mixer: str) -> None:
    base, _, _ = load_config("parallelism")

    def parameters(name: str) -> int:
        config = with_mixer(base, name, 256, 4)
        assert config.model.layers == name and config.data.sequence_length == 256
        return num_parameters(Transformer(for_platform(resolve(config, 260).model, "cpu")))

    assert parameters(mixer) == pytest.approx(parameters("attention"), rel=0.01)


def test_attention_splits_a_text_over_devices_and_an_lstm_does_not() -> None:
    base, _, _ = load_config("parallelism")
    base = replace(base, model={"width": 32, "num_heads": 2})
    found = split(Options(mixers=("attention", "lstm"), config=base))
    assert found["attention"] == pytest.approx(8.0)
    # Half of its products are maps of the tokens, which can be split; the other half waits for the state.
    assert found["lstm"] == pytest.approx(1 / (0.5 + 0.5 / 8), rel=0.01)


@pytest.mark.slow
def test_the_benchmark_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "SIZES", {"cpu": (64,)})
    monkeypatch.setattr(roofline, "BYTES", {"cpu": 1024})
    base, _, _ = load_config("parallelism")
    base = replace(base, model={"width": 16, "num_heads": 2, "num_layers": 1, "vocab_size": 260})
    options = Options(
        lengths=(16,), mixers=("attention", "lstm"), tokens=128, rounds=1, output=str(tmp_path / "out"), config=base
    )
    assert run(options) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    chains = {cell["mixer"]: cell["chain"] for cell in result["facts"]["cells"]}
    # Forward and back through every token; attention has as many products in a row for any length (`test_products`).
    assert chains["lstm"] >= 2 * (16 - 1) and chains["attention"] < 40
    assert len(result["measurements"]) == 2
    assert (tmp_path / "out" / "report.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mixers": ("attention", "gpu")}, "--mixers = 'gpu': must be of attention, "),
        ({"lengths": (64, 100)}, "--tokens = 16384: must be a multiple of every length, which 100 does not divide"),
        ({"lengths": (32768,)}, "which 32768 does not divide"),
        ({"rounds": 0}, "--rounds = 0: must be at least 1"),
    ],
)
def test_mistakes_are_told(changes: dict, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(Options(**changes))
    assert problem in str(error.value)
