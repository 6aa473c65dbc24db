"""English to German on Multi30k from a pretrained encoder and from scratch, by the number of pairs.

    python benchmarks/pretrained_encoder.py --data multi30k --workdir runs/pretrained --pairs 1000 29000 --steps 400 5000

`--data` holds train, val and test_2016, each as .de and .en, a sentence a line. One encoder learns to fill in masked tokens of
all captions (`multi30k_masked_lm`); then each number of pairs, the first ones of the corpus, is learnt from scratch
(`scratch`), with that encoder and its embeddings (`encoder`), or with a decoder that begins as the encoder, too (`both`). All
have its tokenizer, and the same steps, `--steps` for each of `--pairs`. Further options go to all runs as they are, so that
`--model.num-layers 2` makes a smaller model. Of each run the checkpoint with the lowest validation loss counts; `--bleu` has it
translate test_2016, with five beams. BLEU is sacrebleu's, in lower case (extra `translation`). What is in the working directory
already is not made again.
"""

import argparse
import datetime
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from translation import bleu

from transformer.benchmarks.measure import machine, own_process
from transformer.benchmarks.report import table

ROOT = Path(__file__).resolve().parent.parent

ARMS: dict[str, tuple[str, ...]] = {
    "scratch": (),
    "encoder": ("--init-from.allow-missing", "decoder/*"),
    "both": ("--init-from.allow-missing", "decoder/layers/cross*", "--init-from.rename", "decoder=encoder"),
}


def train(recipe: str, directory: Path, options: Sequence[str]) -> None:
    """Trains a run to its end, as a user starts it; one that was interrupted goes on."""
    command = [str(ROOT / "train.py"), "--config", recipe, "--workdir", str(directory), *options]
    done = directory / "asked.json"
    if done.exists():
        if json.loads(done.read_text()) != command:
            raise SystemExit(
                f"{directory} was made by {done.read_text()}, and this is {command}: choose another --workdir"
            )
        return
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    done.write_text(json.dumps(command))


def first_lines(data: Path, count: int, directory: Path) -> Path:
    """Returns a directory with the first pairs of the corpus."""
    directory.mkdir(parents=True, exist_ok=True)
    for language in ("en", "de"):
        with (data / f"train.{language}").open() as lines:
            (directory / f"train.{language}").write_text("".join(itertools.islice(lines, count)))
    return directory


def translate(directory: Path, data: Path) -> float:
    """Returns the BLEU of the run's best checkpoint."""
    output = directory / "test_2016.de"
    if not output.exists():
        command = ["generate", "--workdir", str(directory), "--best", "--beams", "5", "--max-tokens", "80"]
        command += ["--batch-size", "128", "--prompt-file", str(data / "test_2016.en"), "--output", str(output)]
        command, environment = own_process("from transformer.cli import main; main()", command)
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return bleu(output.read_text().splitlines(), (data / "test_2016.de").read_text().splitlines())


def measured(directory: Path) -> dict[str, Any]:
    """Returns the validation losses of a run, and the lowest."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    curve = [(record["step"], record["cross_entropy"]) for record in records if record["split"] == "validation"]
    return {"validation_cross_entropy": curve, "lowest": min(loss for _, loss in curve)}


def spread(values: Sequence[float], digits: int) -> str:
    around = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{around}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 29000])
    parser.add_argument("--steps", type=int, nargs="+", default=[400, 5000])
    parser.add_argument("--pretraining-steps", type=int, default=5000)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["scratch", "encoder"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bleu", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given, options = parser.parse_known_args()
    if len(given.steps) != len(given.pairs):
        parser.error("--steps needs a number for each of --pairs")
    data, workdir, pretrained = given.data, given.workdir, given.workdir / "pretrained"
    texts = ["--data.path", str(data / "train.en"), str(data / "train.de")]
    train("multi30k_masked_lm", pretrained, [*texts, *paced(given.pretraining_steps), *options])
    runs, rows = [], []
    asked: list[tuple[int, int]] = list(zip(given.pairs, given.steps, strict=True))
    for pairs, steps, arm in ((pairs, steps, arm) for pairs, steps in asked for arm in given.arms):
        files = first_lines(data, pairs, workdir / f"{pairs}_pairs")
        found = []
        for seed in given.seeds:
            directory = workdir / f"{arm}-{pairs}-{seed}"
            where = ["--data.source-path", str(files / "train.en"), "--data.target-path", str(files / "train.de")]
            where += ["--data.validation-source-path", str(data / "val.en")]
            where += ["--data.validation-target-path", str(data / "val.de"), "--seed", str(seed)]
            # The recipe begins with a run unless it is told otherwise.
            alone = ["--init-from.run", "", "--init-from.allow-missing"]
            alone += ["--data.tokenizer-path", str(pretrained / "tokenizer")]
            begins = ["--init-from.run", str(pretrained), *ARMS[arm]] if ARMS[arm] else alone
            train("seq2seq_from_pretrained", directory, [*where, *begins, *paced(steps), *options])
            run = {"arm": arm, "pairs": pairs, "seed": seed, **measured(directory)}
            found.append(run | ({"bleu": translate(directory, data)} if given.bleu else {}))
        runs += found
        scores = [spread([run["bleu"] for run in found], 1)] if given.bleu else []
        rows.append([f"{pairs:,}", arm, spread([run["lowest"] for run in found], 3), *scores])
    given.out.mkdir(parents=True, exist_ok=True)
    today = datetime.date.today().isoformat()
    # Paths are whoever ran it's own; the rest makes it again.
    wanted = {name: value for name, value in vars(given).items() if name not in ("data", "workdir", "out")}
    record = {"asked": wanted, "options": options, "date": today, "machine": machine(), "runs": runs}
    name = "-".join([today, "pretrained-encoder", *map(str, given.pairs)])
    (given.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(["pairs", "begins with", "lowest validation loss", *(["BLEU"] if given.bleu else [])], rows))


def paced(steps: int) -> list[str]:
    """Returns the options that fit warm-up and validations to a number of steps."""
    every = str(max(1, steps // 10))
    pace = {"--train.num-steps": str(steps), "--optimizer.warmup-steps": str(min(400, max(1, steps // 8)))}
    pace |= {"--evaluation.every-steps": every, "--checkpoint.every-steps": every}
    return [word for pair in pace.items() for word in pair]


if __name__ == "__main__":
    main()
