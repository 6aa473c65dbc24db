"""A plan as lines to read, and as a record for JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformer.benchmarks.report import table
from transformer.config import Config, mesh_axes
from transformer.plans.arithmetic import HIDDEN, Estimate, changes_that_help
from transformer.plans.chips import Topology
from transformer.plans.collectives import Collective
from transformer.plans.compilation import Compiled, axes_text
from transformer.plans.roofline import EFFICIENCY, Prediction, chip_hours, days_for, predict, seconds_of
from transformer.plans.search import Found, flags_of, setting_text

SCALARS = 1024
"""Bytes up to which a collective carries a few numbers and no arrays."""


def grouped(compiled: Compiled) -> list[tuple[Collective, int, float, float]]:
    """Returns collectives that go the same way as one: a sample, how many, bytes that a chip sends, seconds; most first."""
    rows: dict[Any, list[Any]] = {}
    for item in compiled.collectives:
        key = (item.kind, item.axes, item.crosses_slices, item.overlapped, item.bytes <= SCALARS)
        row = rows.setdefault(key, [item, 0, 0.0, 0.0])
        row[1] += item.count
        row[2] += item.count * item.moved
        row[3] += item.count * seconds_of(item, compiled)
    return sorted(((item, n, sent, s) for item, n, sent, s in rows.values()), key=lambda row: -row[3])


def text_of(compiled: Compiled, tokens: float = 0.0) -> str:
    """Returns the plan in full; `tokens`: a budget to tell days and chip-hours for."""
    lines = [
        f"{compiled.topology}; {axes_text(compiled.axes)}; batch {compiled.config.train.batch_size:,} x "
        f"{compiled.config.data.sequence_length:,} tokens, {_counted(compiled.config.train.num_microbatches)}, "
        f"remat {compiled.config.model.remat}",
        "",
        *_memory_lines(compiled),
    ]
    if not compiled.fits:
        return "\n".join([*lines, *_too_large_lines(compiled)])
    lines += ["", "Collectives of a step, for each chip:", "", _collective_table(compiled)]
    return "\n".join([*lines, *_time_lines(compiled, predict(compiled), tokens)])


def _counted(microbatches: int) -> str:
    return f"{microbatches} microbatch{'es' if microbatches > 1 else ''}"


def _memory_lines(compiled: Compiled) -> list[str]:
    memory, limit = compiled.memory, compiled.hbm_bytes
    rows = [
        ("parameters", memory.parameters),
        ("optimizer state", memory.optimizer_state),
        ("batch", memory.batch),
        ("gradients of the layers", memory.gradients),
        ("activations kept for them", memory.activations),
        ("other temporaries", memory.other),
        ("all", memory.total),
        ("HBM that a program may have", limit),
    ]
    shown = [(name, f"{size / 1e9:.4g}", f"{size / limit:.1%}") for name, size in rows]
    source = "" if compiled.collectives or compiled.fits else ", as far as the compiler tells of a program it refuses"
    cost = (
        f"compiled in {compiled.compile_cpu_seconds:.0f} CPU-seconds, {compiled.peak_host_bytes / 1e9:.2f} GB at most"
    )
    return [f"Memory of each chip{source} ({cost}):", "", table(("", "GB", "of HBM"), shown)]


def _collective_table(compiled: Compiled) -> str:
    rows = []
    for item, count, sent, seconds in grouped(compiled):
        link = "DCN" if item.crosses_slices else "ICI" if compiled.topology.chip.torus_dims else "NVLink"
        name = f"{item.kind}{' of scalars' if item.bytes <= SCALARS else ''}"
        sizes = f"{item.group_size}", f"{count:,}", f"{sent / 1e9:.4g}", f"{seconds * 1e3:.4g}"
        rows.append((name, "+".join(item.axes) or "-", link, *sizes, "yes" if item.overlapped else "no"))
    head = ("collective", "axis", "link", "chips", "times", "GB sent", "ms", "beside products")
    return table(head, rows)


def _time_lines(compiled: Compiled, found: Prediction, tokens: float) -> list[str]:
    topology = compiled.topology
    lines = [
        f"FLOPs a step: {found.step_flops:.4g} of the model (causal attention as half), {found.executed_flops:.4g} executed",
        f"Predicted step: {found.step_seconds:.4g} s = max(products {found.products:.4g} at {EFFICIENCY:.0%} of peak"
        f"{f' x {1 + found.bubble:.3f} for the pipeline' if found.bubble else ''}, memory {found.memory:.4g})"
        f" + open transfers ICI {found.exposed_ici:.4g}, DCN {found.exposed_dcn:.4g}"
        f" + {max(0.0, found.hidden - max(found.products, found.memory)):.4g} of {found.hidden:.4g} hidden ones",
        f"MFU {found.mfu:.1%}, {found.tokens_per_day:.4g} tokens a day, "
        f"{found.num_tokens / found.step_seconds / topology.num_chips:,.0f} tokens/s a chip",
    ]
    if tokens:
        lines.append(
            f"{tokens:.4g} tokens: {days_for(tokens, found):,.4g} days, {chip_hours(tokens, found, topology):,.4g} chip-hours"
        )
    return lines


def _too_large_lines(compiled: Compiled) -> list[str]:
    memory, limit = compiled.memory, compiled.hbm_bytes
    names = {
        "parameters": memory.parameters,
        "optimizer state": memory.optimizer_state,
        "gradients": memory.gradients,
        "activations": memory.activations,
        "other temporaries": memory.other,
    }
    holds = sorted((item for item in names.items() if item[1]), key=lambda item: -item[1])
    over = memory.total - limit
    lines = [
        f"Does not fit, by {over / 1e9:.2f} GB: {', '.join(f'{name} {size / 1e9:.2f} GB' for name, size in holds[:3])}",
        *(f"  {text}" for text in memory.largest[:5]),
        "What helps most, by arithmetic:",
    ]
    for change in changes_that_help(compiled.config, compiled.topology):
        enough = "enough" if change.saved >= over else "not enough alone"
        lines.append(f"  {change.text}: {change.saved / 1e9:.2f} GB less, {enough}")
    return lines


def estimate_text(found: Estimate, tokens: float = 0.0) -> str:
    """Returns what arithmetic alone says."""
    limit, seconds = found.topology.chip.hbm_bytes, found.seconds
    rows = [
        ("parameters", found.parameters),
        ("optimizer state", found.optimizer_state),
        ("gradients", found.gradients),
        ("activations", found.activations),
        ("a layer, logits, gathered parameters", found.working),
        ("all", found.bytes),
        ("HBM", float(limit)),
    ]
    shown = [(name, f"{size / 1e9:.4g}", f"{size / limit:.1%}") for name, size in rows]
    spent = ", ".join(f"{axis} {s:.3g} s" for axis, s in found.transfers.items()) or "none"
    lines = [
        f"{found.topology}; {axes_text(mesh_axes(found.config, found.topology.num_chips))}; by arithmetic alone",
        "",
        table(("", "GB", "of HBM"), shown),
        f"Transfers: {spent}; those of {', '.join(HIDDEN)} are taken to be beside products",
        f"Predicted step: {seconds.step_seconds:.4g} s, MFU {seconds.mfu:.1%}, {seconds.tokens_per_day:.4g} tokens a day",
    ]
    if tokens:
        days, hours = days_for(tokens, seconds), chip_hours(tokens, seconds, found.topology)
        lines.append(f"{tokens:.4g} tokens: {days:,.4g} days, {hours:,.4g} chip-hours")
    return "\n".join(lines)


def record_of(compiled: Compiled, tokens: float = 0.0) -> dict[str, Any]:
    """Returns the plan for JSON."""
    topology, memory = compiled.topology, compiled.memory
    record: dict[str, Any] = {
        "topology": {"name": topology.name, "slices": topology.num_slices, "chips": topology.num_chips},
        "axes": compiled.axes,
        "flags": flags_of(compiled.config, topology),
        "batch_size": compiled.config.train.batch_size,
        "sequence_length": compiled.config.data.sequence_length,
        "layers": compiled.config.model.num_layers,
        "memory_bytes": dataclasses.asdict(memory)
        | {"arguments": memory.arguments, "temporaries": memory.temporaries, "total": memory.total},
        "hbm_bytes": compiled.hbm_bytes,
        "fits": compiled.fits,
        "compile_cpu_seconds": compiled.compile_cpu_seconds,
        "peak_host_bytes": compiled.peak_host_bytes,
        "collectives": [_collective_record(item, compiled) for item in compiled.collectives],
    }
    if compiled.fits:
        found = predict(compiled)
        derived = {"step_seconds": found.step_seconds, "mfu": found.mfu, "tokens_per_day": found.tokens_per_day}
        if tokens:
            derived |= {"days": days_for(tokens, found), "chip_hours": chip_hours(tokens, found, topology)}
        record["prediction"] = dataclasses.asdict(found) | derived
    return record


def _collective_record(item: Collective, compiled: Compiled) -> dict[str, Any]:
    found = {key: value for key, value in dataclasses.asdict(item).items() if key != "group"}
    return found | {"moved": item.moved, "seconds": seconds_of(item, compiled)}


def compared(records: Sequence[dict[str, Any]]) -> str:
    """Returns plans side by side, a column each."""

    def cell(record: dict[str, Any], name: str) -> str:
        memory, found = record["memory_bytes"], record.get("prediction", {})
        if name in memory:
            return f"{memory[name] / 1e9:.2f}"
        if name == "split":
            return " x ".join(f"{axis} {size}" for axis, size in record["axes"].items() if size > 1)
        if name == "fits":
            return "yes" if record["fits"] else "no"
        if name in ("ICI", "DCN"):
            crossing = [i for i in record["collectives"] if i["crosses_slices"] == (name == "DCN")]
            return f"{sum(i['moved'] * i['count'] for i in crossing) / 1e9:.4g}"
        return f"{found[name]:.4g}" if name in found else "-"

    rows = {
        "split": "split",
        "parameters, GB": "parameters",
        "optimizer state, GB": "optimizer_state",
        "gradients, GB": "gradients",
        "activations, GB": "activations",
        "all, GB": "total",
        "fits": "fits",
        "sent over ICI, GB": "ICI",
        "sent over DCN, GB": "DCN",
        "step, s": "step_seconds",
        "MFU": "mfu",
        "tokens a day": "tokens_per_day",
    }
    heads = [f"{r['topology']['slices']} x {r['topology']['name']}" for r in records]
    return table(("", *heads), [(label, *(cell(r, name) for r in records)) for label, name in rows.items()])


def search_text(found: Found, topology: Topology, most: int = 12) -> str:
    """Returns what a search found, and why the others lost."""
    lines = ["Compiled, the fastest first:", ""]
    rows = []
    for item in found.ranked:
        assert item.compiled is not None and item.prediction is not None
        memory = f"{item.compiled.memory.total / 1e9:.2f}"
        seconds = f"{item.prediction.step_seconds:.3f}", f"{item.estimate.seconds.step_seconds:.3f}"
        rows.append((setting_text(item.estimate.config, topology), memory, *seconds, f"{item.prediction.mfu:.1%}"))
    lines.append(table(("setting", "GB", "step, s", "by arithmetic", "MFU"), rows))
    if found.ranked:
        lines.append(f"best: {flags_of(found.ranked[0].estimate.config, topology)}")
    slower = [item for item in found.lost if "expected:" in item.verdict or item.compiled is not None]
    large = [item for item in found.lost if item not in slower]
    lines += ["", f"{len(found.lost):,} others lost:"]
    lines += [f"  {setting_text(i.estimate.config, topology)}: {i.verdict}" for i in slower[:most]]
    if large:
        lines.append(f"  and {len(large):,} that do not fit by arithmetic, the fastest of them:")
        lines += [f"  {setting_text(i.estimate.config, topology)}: {i.verdict}" for i in large[: most // 3]]
    lines += [f"{count:,} refused: {reason}" for reason, count in found.refused.most_common(8)]
    return "\n".join(lines)


def split_config(config: Config, text: str) -> tuple[Config, dict[str, str]]:
    """Reads `fsdp=32,tensor=4,remat=dots` or `v6e:16x16,slices=2`; returns the changed configuration and options."""
    from transformer.config import MESH_AXES, ConfigError, nearest, replace

    changes: dict[str, dict[str, Any]] = {"parallel": {}, "train": {}, "model": {}}
    options: dict[str, str] = {}
    known = (*MESH_AXES, "slices", "microbatches", "remat")
    for part in text.split(","):
        name, equals, value = part.partition("=")
        is_number = value.isdecimal() and int(value) > 0
        if not equals and ":" in name:
            options["topology"] = name
        elif name in MESH_AXES and is_number:
            changes["parallel"][name] = int(value)
        elif name == "slices" and is_number:
            options["slices"] = value
        elif name == "microbatches" and is_number:
            changes["train"]["num_microbatches"] = int(value)
        elif name == "remat":
            changes["model"]["remat"] = value
        else:
            wanted = f"a topology, or NUMBER after one of {', '.join(f'{axis}=' for axis in known)}"
            raise ConfigError(f"--compare {text!r}: {part!r} is not {wanted}{nearest(name, known)}")
    return replace(config, **changes), options
