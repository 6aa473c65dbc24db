"""Memory of a training step: of all parameters, of a LoRA adapter, and of one on a base of few bits.

    python benchmarks/adapters.py gpt2_124m --out benchmarks/results --batch 8 --length 256

Compiles the step of a recipe's model, layers in a loop and computed again for the gradient, for one CPU device, and writes what the
compiler says that it needs: arguments (the state and a batch) and temporaries. Nothing is trained.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from transformer.arguments import load_config
from transformer.checkpointing.run import make_model, resolve
from transformer.config import Config, replace
from transformer.models import adapters
from transformer.models.parameters import num_parameters, parameter_specs
from transformer.objectives import vocabulary
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import make_mesh
from transformer.training.state import abstract_state, state_shardings
from transformer.training.step import compile_step, make_train_step

ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"kind": "lora"},
    "qlora int8": {"kind": "lora", "base": "int8"},
    "qlora nf4": {"kind": "lora", "base": "nf4"},
}


def measured(config: Config) -> dict[str, Any]:
    """Returns bytes, by the compiler's account, of one step of a configuration."""
    mesh = make_mesh(config, jax.devices()[:1])
    config = resolve(config, vocabulary.without_data(config))
    model = make_model(config, "cpu")
    optimizer = make_optimizer(config, parameter_specs(model))
    layout = state_shardings(model, optimizer, mesh)
    state = abstract_state(model, optimizer, layout)
    shape = (config.train.batch_size, config.data.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, "int32") for name in ("inputs", "targets", "positions", "segment_ids")}
    batch["weights"] = jax.ShapeDtypeStruct(shape, "float32")
    with jax.set_mesh(mesh):
        step = compile_step(make_train_step(config, model, optimizer, layout), state, batch, layout, mesh)
    memory: Any = step.memory_analysis()

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    trained = (
        adapters.share(model, parameter_specs(model))
        if config.adapter.kind != "none"
        else f"all of {num_parameters(model):,}"
    )
    return {
        "trained": trained,
        "trained_parameters_bytes": size(state.params),
        "frozen_parameters_bytes": size(state.frozen),
        "optimizer_bytes": size(state.opt_state),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        # The new state takes the place of the old one.
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--logit-chunk", type=int, default=256)
    options = parser.parse_args()
    config = replace(
        load_config(options.recipe)[0],
        data={"sequence_length": options.length},
        model={"scan_layers": True, "remat": "full", "compute_dtype": "float32"},
        objective={"logit_chunk": options.logit_chunk},
        train={"batch_size": options.batch, "num_microbatches": 1},
        evaluation={"batch_size": options.batch},
        parallel={"fsdp": 1},
    )
    results = {}
    for name, change in ARMS.items():
        adapter = change | ({"base_run": "base", "rank": options.rank} if change else {})
        results[name] = measured(replace(config, adapter=adapter))
        print(name, results[name], flush=True)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/adapters.py", *sys.argv[1:]]),
        "versions": {"jax": jax.__version__},
        "what": "compiled for one CPU device, float32, layers in a loop, remat full; memory_analysis of the compiler",
        "recipe": options.recipe,
        "batch": [options.batch, options.length],
        "rank": options.rank,
        "arms": results,
    }
    path = options.out / f"{record['date']}-adapters-{options.recipe}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
