"""What a pipeline cannot be: layers, microbatches and rounds that its stages do not divide. Loaded for a mesh with stages."""

from collections.abc import Iterator

from transformer.config.schema import Config


def problems_of_stages(config: Config) -> Iterator[str]:
    """Yields a sentence for each mistake in a pipeline: its layers, its microbatches and its rounds."""
    model, parallel, parts = config.model, config.parallel, config.train.num_microbatches
    stages, rounds = f"parallel.stage = {parallel.stage}", f"parallel.rounds = {parallel.rounds}"
    name = f"parallel.schedule = {parallel.schedule!r}"
    if parallel.stage == -1:
        yield f"{stages}: layers are divided before devices are counted, so the number of stages has to be given"
    if parallel.schedule != "interleaved" and parallel.rounds != 1:
        yield f"{rounds}: only parallel.schedule = 'interleaved' has several rounds, not {name}"
    elif parallel.schedule == "interleaved" and parallel.rounds == 1:
        yield f"{rounds}: {name} needs at least 2; with 1 it is '1f1b'"
    if parallel.stage < 1 or parallel.rounds < 1:
        return
    if model.first_layers:
        yield f"model.first_layers = {model.first_layers!r} with {stages}: stages hold equal groups of layers"
        return
    if parts < parallel.stage:
        yield f"train.num_microbatches = {parts}: must be at least {stages}, or no more than {parts} would work at a time"
    elif parallel.rounds > 1 and parts % parallel.stage:
        yield f"train.num_microbatches = {parts}: {name} sends groups of {stages} through a round, which do not divide it"
    try:
        periods = {"num_layers": len(model.kinds), "num_encoder_layers": len(model.encoder_kinds)}
    except ValueError:
        return  # a pattern that cannot be read, which has a sentence of its own
    groups = {"num_layers": (parallel.stage * parallel.rounds, f"{stages} x {rounds}")}
    if parallel.rounds == 1:
        groups["num_layers"] = (parallel.stage, stages)
    depths = {"num_layers": model.num_layers}
    own_encoder = model.num_encoder_layers is not None or model.encoder_layers is not None
    if model.architecture == "encoder_decoder" and own_encoder:
        # The encoder of a decoder goes through the stages once, whatever the decoder's schedule.
        depths["num_encoder_layers"], groups["num_encoder_layers"] = model.encoder_depth, (parallel.stage, stages)
    for key, depth in depths.items():
        period, (count, by) = periods[key], groups[key]
        if depth > 0 and depth % period == 0 and depth % (period * count):
            whole = f" x {period}, the layers of a period" if period > 1 else ""
            yield f"model.{key} = {depth} is not divisible by {by}{whole}: all groups have as many layers"
