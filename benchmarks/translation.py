"""German to English on Multi30k: trains recipes with several seeds, and scores what each checkpoint makes of the test set.

    python benchmarks/translation.py multi30k_transformer multi30k_gru --data multi30k --workdir runs/translation

Recipes come first. `--data` holds train, val and test_2016, each as .de and .en, a sentence a line. Each run is `train.py`, as a
user starts it, and each translation `transformer generate` with five beams; further options go to `train.py` as they are. BLEU
is sacrebleu's, in lower case. What is in the working directory already is not made again, and is refused where it was made with
other options or data. Needs the extras `translation` and `plots`; the result goes to benchmarks/results/, with a plot beside it.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformer.benchmarks.measure import own_process
from transformer.benchmarks.report import save_plot

ROOT = Path(__file__).resolve().parent.parent
EVERY_STEPS = 1000


def run(recipe: str, seed: int, data: Path, directory: Path, options: list[str]) -> dict[str, Any]:
    """Trains and translates, unless that is done, and returns what came out."""
    texts = {
        f"{split}{side}_path": data / f"{name}.{language}"
        for split, name in (("", "train"), ("validation_", "val"))
        for side, language in (("source", "de"), ("target", "en"))
    }
    translations, where = directory / "translations", directory / "machine.json"
    asked = json.dumps({"recipe": recipe, "seed": seed, "data": str(data.resolve()), "options": options})
    if (known := directory / "asked.json").exists() and known.read_text() != asked:
        raise SystemExit(f"{directory} was made for {known.read_text()}, and this is {asked}: choose another --workdir")
    directory.mkdir(parents=True, exist_ok=True)
    known.write_text(asked)
    if not where.exists():
        command = [str(ROOT / "train.py"), "--config", recipe, "--workdir", str(directory), "--seed", str(seed)]
        command += [word for name, path in texts.items() for word in (f"--data.{name}", str(path))]
        command += ["--checkpoint.every-steps", str(EVERY_STEPS), "--checkpoint.keep-every-steps", str(EVERY_STEPS)]
        subprocess.run([sys.executable, *command, *options], check=True, stdout=sys.stderr)
        # In a process of its own: this one must not hold the device while the next run trains.
        show = "import json; from transformer.benchmarks.measure import machine; print(json.dumps(machine()))"
        command, environment = own_process(show)
        found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        where.write_text(found.stdout)
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    curve = [(r["step"], r["cross_entropy"]) for r in records if r["split"] == "validation"]
    last = curve[-1][0]
    steps = sorted({*range(EVERY_STEPS, last, EVERY_STEPS), last})
    translations.mkdir(exist_ok=True)
    for step in steps:
        if not (output := translations / f"{step}.en").exists():
            command = ["generate", "--workdir", str(directory), "--step", str(step), "--beams", "5"]
            command += ["--max-tokens", "80", "--batch-size", "128"]
            command += ["--prompt-file", str(data / "test_2016.de"), "--output", str(output)]
            command, environment = own_process("from transformer.cli import main; main()", command)
            subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    reference = (data / "test_2016.en").read_text().splitlines()
    config = json.loads((directory / "config.json").read_text())
    return {
        "seed": seed,
        "learning_rate": config["optimizer"]["learning_rate"],
        "dropout": config["model"]["dropout"],
        "machine": json.loads(where.read_text()),
        "validation_cross_entropy": curve,
        "bleu": [(step, bleu((translations / f"{step}.en").read_text().splitlines(), reference)) for step in steps],
    }


def bleu(texts: list[str], reference: list[str]) -> float:
    """Returns sacrebleu's BLEU of a corpus, both in lower case."""
    from sacrebleu.metrics.bleu import BLEU

    return round(BLEU(lowercase=True, force=True).corpus_score(texts, [reference]).score, 2)


def draw(result: dict[str, list[dict[str, Any]]], figure: Any) -> None:
    """Draws validation loss and BLEU over the steps, a line a run."""
    panels = figure.subplots(1, 2)
    for number, (recipe, runs) in enumerate(result.items()):
        for at, one in enumerate(runs):
            for axes, name in zip(panels, ("validation_cross_entropy", "bleu"), strict=True):
                axes.plot(*zip(*one[name], strict=True), ".-", color=f"C{number}", label="" if at else recipe)
    panels[0].set(xlabel="optimizer step", ylabel="validation loss (nats a token)", yscale="log")
    panels[1].set(xlabel="optimizer step", ylabel="BLEU of test_2016")
    panels[1].legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="multi30k")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments, options = parser.parse_known_args()
    result = {
        recipe: [
            run(recipe, seed, arguments.data, arguments.workdir / f"{recipe}-{seed}", options)
            for seed in arguments.seeds
        ]
        for recipe in arguments.recipes
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{datetime.date.today().isoformat()}-{arguments.name}.json"
    seeds = " ".join(map(str, arguments.seeds))
    command = (
        f"python benchmarks/translation.py {' '.join(arguments.recipes)} --data multi30k --workdir W --seeds {seeds}"
    )
    record = {"command": " ".join([command, *options]), "date": datetime.date.today().isoformat(), "runs": result}
    path.write_text(json.dumps(record, indent=1) + "\n")
    save_plot(lambda figure: draw(result, figure), path.with_suffix(".png"))
    for recipe, runs in result.items():
        print(f"{recipe}, BLEU of {len(runs)} seeds by step:")
        for place, (step, _) in enumerate(runs[0]["bleu"]):
            found = [one["bleu"][place][1] for one in runs]
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            print(f"{step:>8,}  {statistics.mean(found):.2f}{spread}")


if __name__ == "__main__":
    main()
