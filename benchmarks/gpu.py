"""Everything about speed that needs a GPU, in one command: the results of docs/performance.md that a CPU cannot give.

    python benchmarks/gpu.py --nanogpt ../nanoGPT --shakespeare input.txt

It needs a Python with PyTorch and CUDA (`--python`; none: this one). It has not been run yet. One after another:

- the step of a model of a billion parameters in bfloat16, eight texts of 2,048 tokens, with MFU; and with four texts beside
  nanoGPT's of the same shape, for both have to fit;
- the step of `shakespeare_char`, nanoGPT's beside it, and a whole run with its loss on all validation text (nanoGPT reports
  1.4697 after as many steps);
- `transformer benchmark rnn` with PyTorch's LSTM, which is cuDNN's;
- the steps of `llama_1b` in bfloat16 and with products in eight bits.

What fails is told and does not stop the rest. Results go to benchmarks/results/ and docs/studies/parallelism/gpu.
"""

import argparse
import datetime
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformer.benchmarks.measure import own_process

ROOT = Path(__file__).resolve().parent.parent
ONE_BILLION = (
    "--config gpt2_124m --model.num-layers 18 --model.width 2048 --model.num-heads 16 --model.vocab-size 50304"
    " --model.no-biases --data.sequence-length 2048 --train.batch-size 8 --train.num-microbatches 1"
)
LLAMA = "--config llama_1b --data.sequence-length 2048 --train.batch-size 8"


def commands(nanogpt: str, shakespeare: str, python: str, out: Path) -> dict[str, list[str]]:
    """Returns the command lines by what they are for; `transformer` and scripts are told apart by their first word."""
    date = datetime.date.today().isoformat()
    peer = ["--peer", f"nanogpt={nanogpt},{python}", "--out", str(out)]

    def step(name: str, options: str) -> list[str]:
        return ["transformer", "benchmark", "step", *options.split(), "--json", str(out / f"{date}-step-{name}.json")]

    run = str(ROOT / "runs" / "shakespeare_char-gpu")
    train = ["train.py", "--config", "shakespeare_char", "--data.path", shakespeare, "--workdir", run]
    return {
        "the step of a billion parameters": step("1b", ONE_BILLION),
        "with four texts beside nanoGPT": ["benchmarks/peers.py", "1B", *peer],
        "the step of shakespeare_char beside nanoGPT": ["benchmarks/peers.py", "shakespeare_char", *peer],
        "a run of shakespeare_char": [*train, "--model.compute-dtype", "bfloat16"],
        "its loss": ["transformer", "evaluate", "--workdir", run, "--json"],
        "recurrent networks and attention": [
            *"transformer benchmark rnn --memory 70 --model.compute-dtype bfloat16 --pytorch".split(),
            python,
            *("--output", str(ROOT / "docs" / "studies" / "parallelism" / "gpu")),
        ],
        "the step of llama_1b": step("llama_1b", LLAMA),
        "the same in int8": step("llama_1b-int8", f"{LLAMA} --model.matrix-products int8"),
        "the same in fp8": step("llama_1b-fp8", f"{LLAMA} --model.matrix-products fp8"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs what needs a GPU.")
    parser.add_argument("--nanogpt", required=True, help="checkout of karpathy/nanoGPT")
    parser.add_argument("--shakespeare", required=True, help="text of tiny Shakespeare")
    parser.add_argument("--python", default=sys.executable, help="Python that has PyTorch with CUDA")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", default="", help="run what has this in its title")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    out = options.out.resolve()
    nanogpt, shakespeare = (str(Path(path).resolve()) for path in (options.nanogpt, options.shakespeare))
    asked = commands(nanogpt, shakespeare, options.python, out)
    for title, (first, *arguments) in asked.items():
        if options.only not in title:
            continue
        print(f"\n# {title}: {' '.join([first, *arguments])}", flush=True)
        if first == "transformer":
            command, environment = own_process(
                "import sys; from transformer.cli import main; sys.exit(main())", arguments
            )
        else:
            command, environment = [sys.executable, str(ROOT / first), *arguments], None
        pipe = subprocess.PIPE if "evaluate" in command else None
        done = subprocess.run(command, env=environment, cwd=ROOT, stdout=pipe, text=True)
        if done.returncode:
            failed.append(title)
        elif pipe:
            print(done.stdout)
            (out / f"{datetime.date.today().isoformat()}-shakespeare_char-gpu.json").write_text(done.stdout)
    print(f"\nfailed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
