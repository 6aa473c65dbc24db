"""Peak memory and time of importing a checkpoint of random numbers, beside the bound and a plain read of the file.

    python benchmarks/import_memory.py --output benchmarks/results/DATE-import-memory.json

The import runs in a process of its own, saving into the run directory included, and so does one that imports the same modules
and does nothing. The bound is of what the first holds above the second: 1.3 times the bytes of the arrays it makes, and 256 MiB.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from transformer.benchmarks.measure import machine, own_process

MIB = 2**20
FACTOR, ALLOWANCE = 1.3, 256 * MIB

IDLE = """
import jax
from transformer.config import Config, replace
from transformer.huggingface import exporting, importing, published, reading
from transformer.parallel.sharding import make_mesh
make_mesh(replace(Config(), parallel={"fsdp": 1}))
"""
IMPORT = "import sys\nfrom transformer.cli import run\nassert run(sys.argv[1:]) == 0\n"
PEAK = """
import re
print("PEAK", int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def make_checkpoint(folder: Path, gigabytes: float, dtype: Any, shards: int) -> int:
    """Writes a Llama of about as many bytes, in some files; returns the number of its parameters."""
    from transformer.huggingface.families import family_of
    from transformer.huggingface.folder import INDEX
    from transformer.huggingface.table import tensors_of
    from transformer.huggingface.translation import read_config
    from transformer.huggingface.writing import write_tensors

    width, vocab = 1536, 32_000
    config: dict[str, Any] = {
        **{"model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": 4096},
        **{"num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048},
    }
    layer = 2 * width**2 + 2 * width * width // 3 + 3 * width * 4096
    itemsize = 4 if dtype == "float32" else 2
    config["num_hidden_layers"] = num_layers = round((gigabytes * 1e9 / itemsize - 2 * vocab * width) / layer)
    if num_layers < 1:
        raise SystemExit(f"--gigabytes {gigabytes:g} is less than the embeddings and a layer take")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(_tokenizer())
    tensors = tensors_of(family_of("llama"), read_config(family_of("llama"), config))
    rng = np.random.default_rng(0)
    parts = [tensors[number::shards] for number in range(shards)]
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    for name, members in zip(names, parts, strict=True):
        shapes = [(tensor.name, tensor.shape) for tensor in members]
        write_tensors(
            folder / name, shapes, ((tensor, rng.standard_normal(shape, np.float32)) for tensor, shape in shapes), dtype
        )
    places = {tensor.name: name for name, members in zip(names, parts, strict=True) for tensor in members}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(int(np.prod(tensor.shape)) for tensor in tensors)


def _tokenizer() -> str:
    from tokenizers import Tokenizer, models

    vocabulary = {"<s>": 0, "</s>": 1, "a": 2}
    return Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="a")).to_str()


def peak_of(program: str, arguments: list[str]) -> tuple[int, float, float]:
    """Returns the peak resident memory of a process, in bytes, the seconds it took, and those of processors."""
    command, environment = own_process(program + PEAK, arguments)
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return int(done.stdout.split("PEAK")[1]), seconds, processors


def read_plainly(folder: Path) -> float:
    begin = time.perf_counter()
    buffer = bytearray(16 * MIB)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.5, help="bytes of the files, in 10^9")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", default=None, help="where the checkpoint and the run are made")
    parser.add_argument("--output", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        folder = Path(directory) / "model"
        folder.mkdir()
        parameters = make_checkpoint(folder, given.gigabytes, given.dtype, given.shards)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        rows = []
        for number in range(given.repeats):
            idle, *_ = peak_of(IDLE, [])
            workdir = Path(directory) / f"run-{number}"
            peak, seconds, processors = peak_of(
                IMPORT, ["import", str(folder), "--workdir", str(workdir), "--parallel.fsdp", "1"]
            )
            times = {"import_seconds": seconds, "processor_seconds": processors, "read_seconds": read_plainly(folder)}
            rows.append({"idle": idle, "peak": peak, **times})
            subprocess.run(["rm", "-r", str(workdir)], check=True)
            os.sync()
    target = 4 * parameters
    bound = FACTOR * target + ALLOWANCE
    above = max(row["peak"] - row["idle"] for row in rows)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "file_bytes": size,
        "file_dtype": given.dtype,
        "target_bytes": target,
        "bound_bytes": bound,
        "above_idle_bytes": above,
        "runs": rows,
    }
    print(f"files {size:,} bytes, arrays {target:,} bytes")
    print(
        f"above an idle process {above:,} bytes, at most {bound:,.0f} allowed: {'held' if above <= bound else 'BROKEN'}"
    )
    for name in ("import_seconds", "processor_seconds", "read_seconds"):
        print(f"{name}: median {statistics.median(row[name] for row in rows):.1f}")
    if given.output:
        Path(given.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
