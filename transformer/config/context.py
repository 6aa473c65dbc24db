"""What cannot be computed of texts that are split over devices (`parallel.context`)."""

from collections.abc import Iterator, Mapping

from transformer.config.schema import Config, source_length

IN_TURN = ("lstm", "gru")
"""Mixers whose every step needs the one before, so that a device could only wait for the others."""


def context_problems(config: Config, parts: str, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yields a sentence for each thing that stands against splitting texts over a mesh with these sizes; `parts` names the axis
    and its size."""
    model = config.model
    lengths = {"sequence_length": config.data.sequence_length}
    if model.architecture == "encoder_decoder":
        lengths["source_length"] = source_length(config)
    wrong = [f"data.{key} = {length}" for key, length in lengths.items() if length % sizes["context"]]
    if wrong:
        yield f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not divisible by {parts}"
    stacks = {"first_layers": model.first_kinds, "layers": model.kinds} | (
        {"encoder_layers": model.encoder_kinds} if model.has_encoder else {}
    )
    for key, kinds in stacks.items():
        for mixer in dict.fromkeys(kind.mixer for kind in kinds if kind.mixer in IN_TURN):
            label = f"model.{key} = {getattr(model, key)!r}"
            yield f"{label}: {mixer} computes one token after another, so that no texts can be split: {parts}"
    split, name = f"model.context_attention = {model.context_attention!r}", model.attention_implementation
    mixers = {kind.mixer for kinds in stacks.values() for kind in kinds}
    has_heads = bool(mixers & {"attention", "latent_attention"})
    reads = model.architecture == "encoder_decoder" and model.cross_attention in ("attention", "luong")
    if not has_heads and not reads:
        return
    if model.context_attention == "ring" and name not in ("auto", "blockwise"):
        advice = "use 'auto', or model.context_attention = 'all_to_all'"
        yield f"model.attention_implementation = {name!r} with {parts}: {split} computes by blocks of its own; {advice}"
    if model.context_attention == "all_to_all":
        devices = sizes["context"] * sizes["tensor"]
        tensor = f" x parallel.tensor = {sizes['tensor']}" if sizes["tensor"] > 1 else ""
        if reads and model.cross_attention == "luong":
            yield f"{split}: model.cross_attention = 'luong' has one head, which {parts} does not divide; use 'ring'"
        if (has_heads or model.cross_attention == "attention") and model.num_heads % devices:
            yield f"{split}: model.num_heads = {model.num_heads} is not divisible by {parts}{tensor}; use 'ring'"
