"""What a configuration is: parameters, FLOPs, and where every array of its state would lie on a mesh."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformer.config import MESH_AXES, Config, ConfigError, mesh_problems, source_length


def describe_config(config: Config) -> dict[str, Any]:
    """Returns what `describe` shows. -1 in the mesh stands for the simulated devices, or else for 1."""
    from transformer.parallel import startup

    startup.start(config)

    import jax
    from jax.sharding import AbstractMesh

    from transformer.checkpointing.run import for_platform, resolve
    from transformer.config import mesh_axes
    from transformer.models import flops, parameters
    from transformer.models.transformer import Transformer
    from transformer.objectives import vocabulary
    from transformer.optimizers import make_optimizer
    from transformer.parallel.rules import left_whole
    from transformer.parallel.sharding import rules_in_use, use_rules
    from transformer.training.state import abstract_state, state_shardings

    fixed = math.prod(size for axis in MESH_AXES if (size := getattr(config.parallel, axis)) > 0)
    num_devices = config.parallel.cpu_devices or fixed
    if problems := mesh_problems(config, num_devices):
        raise ConfigError(problems)
    axes = mesh_axes(config, num_devices)
    config = resolve(config, vocabulary.without_data(config))
    model = Transformer(for_platform(config.model, jax.default_backend()))
    specs = parameters.parameter_specs(model)
    optimizer = make_optimizer(config, specs)
    with use_rules(config):
        rules = dict(rules_in_use.value)
        mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
        layouts: Any = state_shardings(model, optimizer, mesh, config.parallel)
        whole = left_whole(config.model, specs, axes)
    state = abstract_state(model, optimizer, layouts)
    arrays, totals = [], {"params": 0, "opt_state": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        split = [entry if isinstance(entry, str) else list(entry or ()) for entry in leaf.sharding.spec]
        shown = ", ".join(e if isinstance(e, str) else "+".join(e) or "-" for e in split)
        arrays.append(
            {"name": name, "shape": leaf.shape, "dtype": str(leaf.dtype), "sharding": shown, "bytes_per_device": size}
        )
        group = name.partition("/")[0]
        totals[group] = totals.get(group, 0) + size
    modules: dict[str, int] = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=parameters.is_spec):
        name = "/".join(str(key.key) for key in path[:-1]) or str(path[-1].key)
        modules[name] = modules.get(name, 0) + spec.count
    length, source = config.data.sequence_length, source_length(config)
    return {
        "parameters": parameters.num_parameters(model),
        "active_parameters": flops.active_parameters(config.model, specs),
        "parameters_by_module": modules,
        "flops_per_token": {
            "training_attention_in_full": flops.training_flops_per_token(config.model, length, source_length=source),
            "training_attention_causal_half": flops.training_flops_per_token(config.model, length, True, source),
        },
        "forward_flops_per_sequence": flops.forward_flops(config.model, length, source),
        "forward_products": [dataclasses.asdict(item) for item in flops.forward_products(config.model, length, source)],
        "mesh": axes,
        "rules": rules,
        "left_whole": whole,
        "bytes_per_device": totals,
        "arrays": arrays,
    }


def text_of(result: Mapping[str, Any]) -> str:
    """Returns what `describe_config` found, in lines for a person."""
    sizes = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    lines = [f"{result['parameters']:,} parameters, on a mesh of {sizes}"]
    if result["active_parameters"] != result["parameters"]:
        lines.append(f"{result['active_parameters']:,} parameters that a token passes through")
    lines += _aligned([(name, f"{count:,}") for name, count in result["parameters_by_module"].items()])
    for label, flops in result["flops_per_token"].items():
        lines.append(f"FLOPs a token, {label.replace('_', ' ')}: {flops:.4g}")
    products = result["forward_products"]
    total = sum(product["flops"] for product in products)
    lines.append("matrix products of one sequence's forward pass, attention in full:")
    rows = [("/".join(it[key] for key in ("stack", "part", "name")), it["flops"]) for it in products]
    lines += _aligned([(name, f"{flops:.4g} FLOPs", f"{flops / total:.1%}") for name, flops in rows])
    lines.append("bytes per device, before gradients and activations:")
    lines += _aligned([(name, f"{size:,}") for name, size in result["bytes_per_device"].items()])
    lines.append("names of dimensions, and the mesh axes that split them:")
    lines += _aligned([(name, ", ".join(split) or "-") for name, split in result["rules"].items()], left=2)
    lines += [f"left whole: {name}: {reason}" for name, reason in result["left_whole"].items()]
    arrays = []
    for array in result["arrays"]:
        shape = " x ".join(map(str, array["shape"])) or "scalar"
        arrays.append((array["name"], shape, array["sharding"], f"{array['bytes_per_device']:,}"))
    return "\n".join(lines + _aligned(arrays, left=3))


def _aligned(rows: Sequence[tuple[str, ...]], left: int = 1) -> list[str]:
    """Returns a line for each row, every column as wide as its widest cell; the first `left` begin alike, others end so."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = list(zip(row, widths, strict=True))
        words = [cell.ljust(width) for cell, width in cells[:left]] + [
            cell.rjust(width) for cell, width in cells[left:]
        ]
        lines.append(("  " + "  ".join(words)).rstrip())
    return lines
