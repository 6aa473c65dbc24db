"""Studies: which runs they make, what they read from them, and that a stopped one goes on."""

import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from transformer.arguments import load_config
from transformer.benchmarks.report import table
from transformer.config import ConfigError, problems_of, replace, to_json
from transformer.studies import STUDIES, ablation, mup, precision, recall, transfer
from transformer.studies.study import Outcome, Shared, Study, Trial, _counts, _run, run_study, spread
from transformer.training import DIVERGED, loop
from transformer.training.start_from import on_base, opened


def outcome(name: str, loss: float, seed: int = 0, diverged: bool = False, **facts: object) -> Outcome:
    final = {"cross_entropy": loss, "accuracy": 1 - loss}
    return Outcome(name, seed, facts, 1000, 1000, diverged, final, [(10, 2 * loss), (20, loss)])


@pytest.mark.parametrize("name", STUDIES)
def test_every_trial_has_a_name_of_its_own_and_a_sound_configuration(name):
    base, problems, _ = load_config(STUDIES[name][1])
    trials = sys.modules[STUDIES[name][0]].STUDY.trials(base)
    assert not problems and len(trials) >= 3
    assert len({trial.name for trial in trials}) == len(trials)
    assert len({to_json(trial.config) for trial in trials}) == len(trials)
    assert not [problem for trial in trials for problem in problems_of(trial.config)]


def test_ablation_removes_one_thing_at_a_time():
    base, _, _ = load_config("stdlib")
    by_name = {trial.name: trial for trial in ablation.trials(base)}
    whole = json.loads(to_json(by_name["full"].config))

    def changed(name: str) -> set[str]:
        config = json.loads(to_json(by_name[name].config))
        return {
            f"{s}.{k}" for s in whole if isinstance(whole[s], dict) for k in whole[s] if config[s][k] != whole[s][k]
        }

    assert changed("full") == set()
    assert changed("no_residuals") == {"model.residuals"}
    assert changed("no_mlp") == {"model.layers"}
    assert changed("post_norm_no_warmup") == {"model.norm_placement", "optimizer.warmup_steps"}
    assert by_name["no_residuals_8_layers"].config.model.num_layers == 8
    assert changed("no_residuals_8_layers") == {"model.residuals", "model.num_layers"}


def test_precision_compares_with_float32_after_as_many_steps():
    found = [outcome("float32", 2.0, seed) for seed in (0, 1)]
    found += [outcome("int8", 2.01), outcome("int8", 1.99, 1), outcome("fp8", 2.1)]
    assert precision.differences(found[2], found[0]) == pytest.approx([0.02, 0.01])
    report = precision.report(found)
    assert "| float32 | 2.0000 | 0.0000 | 0.000 | yes |" in report
    assert "| int8 | 2.0000 | 0.0200 | 0.050 | yes |" in report and "| fp8 | 2.1000 | 0.2000 | 0.050 | no |" in report
    # Of a seed that float32 was not trained with, nothing is known.
    assert "| int8 | 2.0100 | – | 0.050 | – |" in precision.report([found[0], outcome("int8", 2.01, 7)])
    precision.draw(found, figure := Figure())
    labels = [str(line.get_label()) for line in figure.axes[0].lines]
    assert [label for label in labels if label[0] != "_"] == ["float32", "int8", "fp8"]


def test_ablation_reports_spread_distance_and_what_diverged():
    found = [outcome("full", 2.0, 0, layers=4), outcome("full", 2.2, 1, layers=4)]
    found += [outcome("no_mlp", 2.6, 0, layers=4), outcome("no_mlp", math.nan, 1, diverged=True, layers=4)]
    report = ablation.report(found)
    assert "| full | 1,000 | 2.100 ± 0.141 | +0.000 | 0 of 2 |" in report
    assert "| no mlp | 1,000 | 2.600 | +0.500 | 1 of 2 |" in report


def test_best_rate_is_the_vertex_of_a_parabola_over_the_logarithm():
    losses = {2.0**k: 1 + 0.3 * (k + 7.25) ** 2 for k in range(-10, -3)}
    assert mup.best_rate(losses) == pytest.approx(2**-7.25)
    assert mup.best_rate({2.0**k: float(-k) for k in range(-10, -3)}) is None
    losses |= {2.0**k: math.inf for k in range(-6, -3)}
    assert mup.best_rate(losses) == 2.0**-7


def test_mup_reports_how_far_the_best_rate_moved():
    found = []
    for width, best in ((64, -6), (256, -8)):
        for power in range(-10, -3):
            facts = {"parametrization": "standard", "width": width, "rate": 2.0**power}
            found.append(outcome(f"{width}_{power}", 1.0 + (power - best) ** 2, **facts))
    assert "`standard`: the best rates differ by a factor of 4." in mup.report(found)


def test_recall_reports_shares_and_the_size_of_the_state():
    found = [outcome(f"attention_{pairs}", 0.25, mixer="attention", pairs=pairs, state=pairs * 6) for pairs in (4, 16)]
    report = recall.report(found)
    assert "| attention | 1,000 | 24 to 96 | 75.0 | 75.0 |" in report
    assert f"| – | – | {100 * recall.told_most_often(4):.1f} | {100 * recall.told_most_often(16):.1f} |" in report


def test_the_value_told_most_often_is_found_by_counting():
    # One pair: always right. Of two, whose values differ in 127 of 128 examples, one in two.
    assert recall.told_most_often(1) == 1.0
    assert recall.told_most_often(2) == pytest.approx((1 + 1 + 1 / 128) / 3, abs=0.01)
    assert recall.told_most_often(2, num_values=1) == 1.0


def test_state_of_attention_is_keys_and_values_of_every_token():
    base, _, _ = load_config("associative_recall")
    sizes = {
        trial.facts["pairs"]: trial.facts["state"]
        for trial in recall.trials(base)
        if trial.facts["mixer"] == "attention"
    }
    assert sizes == {pairs: 2 * 64 * 3 * pairs for pairs in recall.PAIRS}
    wide = {
        trial.name: trial.facts["state"] / sizes[trial.facts["pairs"]]
        for trial in recall.trials(base)
        if trial.facts["mixer"].endswith("_wide")
    }
    # Besides the state: sums of weights, what convolutions remember.
    assert len(wide) == 9 and all(1 <= share < 1.2 for share in wide.values()), wide


def test_numbers_in_tables():
    assert spread([1.0, 1.0, 4.0], 2) == "2.00 ± 1.73"
    assert spread([1.5], 1) == "1.5" and spread([]) == "–" and spread([math.nan, 1.0]) == "not finite"
    assert table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


def test_a_study_trains_reports_and_goes_on(make_run, tmp_path, monkeypatch, capfd):
    base = make_run(train={"num_steps": 2}, evaluation={"every_steps": 0, "sample_tokens": 0})
    trials = [Trial(f"width_{width}", replace(base, model={"width": width}), {"width": width}) for width in (8, 16)]
    study = Study(
        lambda base: trials,
        lambda found: "\n".join(f"{one.name} {one.seed} {one.parameters}" for one in found),
        lambda found, figure: figure.subplots().plot([one.parameters for one in found]),
    )
    monkeypatch.setattr(ablation, "STUDY", study)
    directory = tmp_path / "study"
    run_study("ablation", base, ("width_8",), Shared((0,), directory))
    assert (directory / "report.md").read_text().startswith("width_8 0 ")
    [path] = (directory / "runs").iterdir()
    first = path.read_bytes()
    run_study("ablation", base, (), Shared((0,), directory))
    results = json.loads((directory / "results.json").read_text())
    assert [one["name"] for one in results["outcomes"]] == ["width_8", "width_16"]
    assert results["outcomes"][0]["parameters"] < results["outcomes"][1]["parameters"]
    assert results["outcomes"][0]["curve"][0][0] == 2
    assert path.read_bytes() == first and (directory / "plot.png").exists()
    [where] = results["machines"]
    assert where["device_kind"] and where["versions"]["jax"]
    report = (directory / "report.md").read_text()
    assert report.endswith(f"\nTrained on: {where['device_kind']} (JAX {where['versions']['jax']}).\n")
    with pytest.raises(ConfigError, match="'width_9' is not a trial of ablation, which are width_8, width_16"):
        run_study("ablation", base, ("width_9",), Shared((0,), directory))
    with pytest.raises(ConfigError, match=r"--text = 'a\.md': the study ablation reads no other text"):
        run_study("ablation", base, (), Shared((0,), directory, text=("a.md",)))
    with pytest.raises(ConfigError, match="--pretrained = 'run': the runs of ablation begin with random values"):
        run_study("ablation", base, (), Shared((0,), directory, pretrained="run"))
    trials[0] = Trial("width_8", replace(base, model={"width": 12}), {})
    with pytest.raises(ConfigError, match="is of another configuration"):
        run_study("ablation", base, ("width_8",), Shared((0,), directory))


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (1, ConfigError("width_8, seed 0: training ended with status 1; what it saved is in ")),
        (137, ConfigError("width_8, seed 0: training ended with status 137; what it saved is in ")),
        (130, SystemExit(130)),
        (143, SystemExit(143)),
    ],
)
def test_a_run_that_did_not_end_is_no_result(status, expected, make_run, tmp_path, monkeypatch):
    """And leaves nothing that a study of the other runs stumbles over."""
    base = make_run()
    trials = [Trial(f"width_{width}", replace(base, model={"width": width})) for width in (8, 16)]
    study = Study(lambda base: trials, lambda found: f"{len(found)} runs", lambda found, figure: None)
    monkeypatch.setattr(ablation, "STUDY", study)
    workdir = tmp_path / "runs" / "width_8-0"
    workdir.mkdir(parents=True)
    line = {"step": 1, "split": "train", "loss": 1.0, "cross_entropy": 1.0}
    (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (workdir / "config.json").write_text(to_json(replace(base, model={"vocab_size": 260})))
    monkeypatch.setattr("transformer.studies.study._run", lambda command, environment: status)
    with pytest.raises(type(expected)) as error:
        run_study("ablation", base, ("width_8",), Shared((0,), tmp_path))
    assert str(error.value).startswith(str(expected)) and workdir.exists()
    run_study("ablation", base, (), Shared((), tmp_path))
    assert (tmp_path / "report.md").read_text() == "0 runs"
    monkeypatch.setattr("transformer.studies.study._run", lambda command, environment: DIVERGED)
    run_study("ablation", base, ("width_8",), Shared((0,), tmp_path))
    [outcome] = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    assert outcome["diverged"] and not workdir.exists()


def test_runs_that_diverged_are_in_no_mean():
    found = [outcome("gru_4", 0.25, 0, mixer="gru", pairs=4, state=8)]
    found += [outcome("gru_4", 1.0, 1, diverged=True, mixer="gru", pairs=4, state=8)]
    assert "| gru | 1,000 | 8 | 75.0 |" in recall.report(found)


SAVES = """
import pathlib, signal, sys, time
ready, saved = map(pathlib.Path, sys.argv[1:])
def save(number, _):
    time.sleep(0.5)
    saved.write_text(saved.read_text() + "saved" if saved.exists() else "saved")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
ready.touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_once_and_waited_for(number, tmp_path):
    ready, saved = tmp_path / "ready", tmp_path / "saved"

    def stop() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=stop)
    thread.start()
    assert _run([sys.executable, "-c", SAVES, str(ready), str(saved)], dict(os.environ)) == 128 + number
    thread.join()
    assert saved.read_text() == "saved" and signal.getsignal(number) == before
    assert _run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], dict(os.environ)) == 137


def test_transfer_gives_both_beginnings_the_same_sentences(tmp_path, monkeypatch):
    lines = [f"{number % 2} sentence {number}" for number in range(1200)]
    (tmp_path / "train.txt").write_text("".join(line + "\n" for line in lines))
    (tmp_path / "dev.txt").write_text("1 good\n0 bad\n")
    (tmp_path / "more.md").write_text("\n\n".join(f"paragraph {number} " + "x" * 900 for number in range(5)))
    trained = []
    monkeypatch.setattr(transfer, "train_run", lambda name, config, workdir: trained.append(config) or 0)
    base, _, _ = load_config("sst2_from_pretrained")
    paths = {"path": (str(tmp_path / "train.txt"),), "validation_path": (str(tmp_path / "dev.txt"),)}
    base = replace(base, data=paths | {"cache_dir": str(tmp_path / "cache"), "num_workers": 1})
    for _ in range(2):  # the second time, the language model is there
        found = transfer.prepare(base, Shared((0, 1), tmp_path / "study", (str(tmp_path / "more.md"),)))
    [language_model] = trained
    assert not problems_of(language_model) and language_model.objective.name == "masked_lm"
    texts = [Path(source.removeprefix("local_text:")) for source in language_model.data.source]
    assert [len(path.read_text().splitlines()) for path in texts] == [1200, 2]

    def sentences(count, seed):
        path = found.data.path[0].replace("{count}", count).replace("{seed}", str(seed))
        return Path(path).read_text().splitlines()

    for seed in (0, 1):
        whole = sentences("all", seed)
        assert (
            len(set(whole)) == 1200
            and sentences("100", seed) == whole[:100]
            and sentences("1000", seed) == whole[:1000]
        )
    assert sentences("100", 0) != sentences("100", 1)
    by_name = {trial.name: trial.seeded(1) for trial in transfer.trials(found)}
    assert not [problem for config in by_name.values() for problem in problems_of(config)]
    scratch, pretrained, lora = (by_name[f"{arm}_100"] for arm in ("scratch", "pretrained", "lora"))
    assert lora.adapter.base_run == pretrained.init_from.run and not lora.init_from.run
    assert replace(scratch, init_from=vars(pretrained.init_from)) == pretrained and not scratch.init_from.run
    assert scratch.data.path[0].endswith("train-100-1.jsonl")


def test_transfer_begins_with_a_run_of_the_users(make_run, tmp_path, monkeypatch):
    """As large as it is, with its tokenizer, and trained as the recipe says; no language model is trained."""
    workdir = tmp_path / "published"
    changes = {"objective": {"name": "masked_lm"}, "model": {"architecture": "encoder", "width": 24}}
    published = make_run(train={"num_steps": 1}, **changes)
    assert loop.run(published, workdir) == 0
    (tmp_path / "train.txt").write_text("1 good\n0 bad\n")
    monkeypatch.setattr(transfer, "train_run", lambda *arguments: pytest.fail("a language model was trained"))
    base, _, _ = load_config("sst2_from_pretrained")
    paths = (str(tmp_path / "train.txt"),)
    base = replace(base, data={"path": paths, "validation_path": paths}, train={"num_steps": 30})
    shared = Shared((0,), tmp_path / "study", pretrained=str(workdir))
    by_name = {trial.name: trial for trial in transfer.trials(transfer.prepare(base, shared))}
    assert {name: trial.config.train.num_steps for name, trial in by_name.items() if "scratch" in name} == {
        "scratch_100": 2,
        "scratch_1000": 6,
        "scratch_all": 30,
    }
    for trial in by_name.values():
        assert trial.config.model.width == 24 and trial.config.model.num_labels == base.model.num_labels
        assert trial.config.model.dropout == base.model.dropout > published.model.dropout
        assert trial.config.data.tokenizer_path == str(workdir / "tokenizer")
        starts = {trial.config.init_from.run, trial.config.adapter.base_run} - {""}
        assert starts == (set() if trial.name.startswith("scratch") else {str(workdir)})
    pretrained, adapter = (by_name[f"{arm}_all"].seeded(0) for arm in ("pretrained", "lora"))
    begun, start = opened(pretrained, tmp_path / "new")
    assert start is not None and begun.model == on_base(adapter, tmp_path / "new").model
    with pytest.raises(ConfigError, match=r"--text = 'more\.md': the model of --pretrained has read what it has read"):
        transfer.prepare(base, dataclasses.replace(shared, text=("more.md",)))
    nothing = dataclasses.replace(shared, directory=tmp_path / "other", pretrained=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="none is not a run directory"):
        transfer.prepare(base, nothing)
    assert not nothing.directory.exists()


def test_what_a_study_counts_as_trained(tiny_config):
    def share(**changes: object) -> float:
        trained, total = _counts(tiny_config(**changes))
        return trained / total

    assert share() == 1
    assert share(optimizer={"frozen": ("embedding",)}) == pytest.approx(1 - 203 * 32 / _counts(tiny_config())[1])
    adapted = {"adapter": {"kind": "lora", "base_run": "base", "rank": 1}}
    assert share(**adapted) < 0.1
    parts = [share(**adapted, optimizer={"frozen": (part,)}) for part in ("*/mixer/*", "*/feedforward/*")]
    assert sum(parts) == pytest.approx(share(**adapted)) and min(parts) > 0


def test_transfer_tells_what_pretraining_adds():
    found = [
        outcome(f"{arm}_100", loss, seed, beginning=arm, labels=100)
        for arm, losses in (("scratch", (0.5, 0.46)), ("pretrained", (0.4, 0.36)))
        for seed, loss in enumerate(losses)
    ]
    found.append(outcome("lora_100", 0.35, 0, beginning="lora", labels=100))
    found[-1] = dataclasses.replace(found[-1], trained_parameters=15)
    report = transfer.report(found)
    assert "| 100 | 52.0 ± 2.8 | 62.0 ± 2.8 | 65.0 | +10.0 |" in report
    assert "scratch trains" not in report
    assert "lora trains 15 of 1,000 parameters (1.50%)." in report
    figure = Figure()
    transfer.draw(found, figure)
    assert len(figure.axes[0].lines) == 6
