"""How times become numbers: turns, medians and quartiles, results in files, ratios with their spread."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transformer import cli
from transformer.arguments import exit_status
from transformer.benchmarks import BENCHMARKS, compare, measure
from transformer.benchmarks.measure import Measurement, Result, median, ratio, read_result, timed
from transformer.config import ConfigError


def test_calls_take_turns_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def call(name: str, seconds: float) -> Any:
        def run() -> None:
            order.append(name)
            clock[0] += seconds + (100 if len(order) <= 6 else 0)

        return run

    found = timed({"a": call("a", 1), "b": call("b", 2), "c": call("c", 3)}, rounds=3, warmup=2)
    assert found == {"a": [1, 1, 1], "b": [2, 2, 2], "c": [3, 3, 3]}
    rounds = ["".join(order[start : start + 3]) for start in range(0, 15, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert {each[0] for each in rounds} == {"a", "b", "c"}


def test_medians_and_quartiles() -> None:
    values = [3.0, 1.0, 2.0, 10.0, 4.0]
    found = Measurement(tuple(values), "s")
    assert found.median == 3 and found.quartiles == tuple(np.percentile(values, [25, 75]))
    assert str(found) == "3 s (quartiles 2 to 4)"
    assert Measurement((2.0,), "s").quartiles == (2, 2) and str(Measurement((2.0,), "s")) == "2 s"


def test_a_ratio_has_the_spread_of_its_samples() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(1, 0.1, 40).tolist(), rng.normal(0.8, 0.1, 40).tolist()
    whole, low, high = ratio(after, before)
    assert (whole, low, high) == ratio(after, before), "no chance in it"
    assert low < whole < high and low < 0.8 < high and high - low < 0.15
    assert ratio([2.0], [4.0]) == (0.5, 0.5, 0.5)


def result(**changes: Any) -> Result:
    whole = {
        "benchmark": "step",
        "subject": {"tokens": 64, "parameters": 10},
        "machine": {
            "platform": "cpu",
            "device_kind": "cpu",
            "num_devices": 1,
            "processor": "x",
            "versions": {"jax": "1"},
        },
        "measurements": {"step_seconds": Measurement((1.0, 2.0, 3.0), "s")},
        "facts": {"compile_seconds": 1.5},
    }
    return Result(**whole | changes)


def test_a_result_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    result().write(str(path))
    assert read_result(str(path)) == result()
    record = json.loads(path.read_text())
    assert record["date"].startswith("20") and record["command"][1:] == sys.argv[1:]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"benchmark": "step"}', '{"measurements": {"a": {"values": ["x"]}}}', "\x00"]
)
def test_what_is_no_result_is_told(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is not the result of"):
        read_result(str(path))
    for name in (str(tmp_path / "missing.json"), str(tmp_path)):
        with pytest.raises(ConfigError, match=r"cannot be read: (No such file|Is a directory)"):
            read_result(name)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"subject": None}, "it has no subject"),
        ({"machine": []}, "it has no machine"),
        ({"machine": {"platform": "cpu"}}, "its machine has no versions"),
        ({"measurements": {"seconds": {"values": [], "unit": "s"}}}, "seconds has no values or no unit"),
        ({"measurements": {"seconds": 3}}, "seconds has no values or no unit"),
        ({"measurements": {"seconds": {"values": [1, 0], "unit": "s"}}}, "values that are not greater than 0"),
        ({"measurements": {"seconds": {"values": [float("nan")], "unit": "s"}}}, "values that are not greater than 0"),
    ],
)
def test_what_is_nearly_a_result_is_told(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    result().write(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=told):
        read_result(str(path))


def test_the_median_of_rates_is_that_of_times_inverted() -> None:
    times = (0.002, 0.004, 10.0, 20.0)
    assert Measurement(times, "s").median == pytest.approx(1 / Measurement(tuple(1 / s for s in times), "1/s").median)
    assert median((1.0, 5.0, 9.0)) == 5 and median((-1.0, 3.0)) == 1


@pytest.mark.parametrize("name", ["step", "rnn"])
def test_where_nothing_can_be_written_is_told_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    flags = ["--config", "parallelism"] if name == "step" else []
    for path, why in ((tmp_path, "is a directory"), (tmp_path / "file" / "a.json", "")):
        with pytest.raises(ConfigError, match=f"--json = .* cannot be written: .*{why}"):
            cli.parse(["benchmark", name, *flags, "--json", str(path)])
    if name == "rnn":
        with pytest.raises(ConfigError, match=r"--output = .* cannot be written"):
            cli.parse(["benchmark", name, "--output", str(tmp_path / "file")])
        cli.parse(["benchmark", name, "--output", str(tmp_path / "new")])


def test_results_are_compared_as_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result().write(str(tmp_path / "a.json"))
    machine = result().machine | {"versions": {"jax": "2"}}
    half = result(measurements={"step_seconds": Measurement((0.5, 1.0, 1.5), "s")}, machine=machine)
    half.write(str(tmp_path / "b.json"))
    assert cli.run(["benchmark", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    versions, seconds = capsys.readouterr().out.splitlines()
    assert versions == "versions: jax 1 -> 2"
    assert seconds.startswith("step seconds: 0.5 (90% of resamples: ") and seconds.endswith("); 2 -> 1 s")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"benchmark": "roofline"}, "one is of 'step', the other of 'roofline'"),
        ({"subject": {"tokens": 32, "parameters": 10}}, "tokens is 64 in one and 32 in the other"),
        ({"subject": {"tokens": 64}}, "parameters is 10 in one and None in the other"),
        ({"machine": result().machine | {"num_devices": 8}}, "num_devices is 1 in one and 8 in the other"),
        ({"machine": result().machine | {"processor": "y"}}, "processor is 'x' in one and 'y' in the other"),
        ({"measurements": {}}, "only one has step_seconds"),
    ],
)
def test_unlike_things_are_not_compared(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compare.text_of(result(), result(**changes))
    assert raised.value.problems == (f"the results cannot be compared: {problem}",)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["stpe"], f"'stpe' is not a benchmark, which are {', '.join(BENCHMARKS)} (did you mean step?)"),
        (["compare", "a.json"], "--after is missing: name a result"),
        (
            ["compare", "a.json", "b.json", "c.json"],
            "--after = 'b.json' is followed by 'c.json', which belongs to no option",
        ),
        (["step", "--rounds", "0"], "--rounds = 0: must be at least 1"),
        (["roofline", "--rounds", "0"], "--rounds = 0: must be at least 1"),
    ],
)
def test_mistakes(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(cli.run, ["benchmark", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {told}\n"


def test_every_benchmark_is_listed_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.run(["benchmark", "--help"])
    told = capsys.readouterr().out
    for name in BENCHMARKS:
        assert f"  {name} " in told
        with pytest.raises(SystemExit) as stopped:
            cli.run(["benchmark", name, "--help"])
        assert not stopped.value.code and "--model.width" in capsys.readouterr().out
