"""The keys of a run that begins with the parameters of another."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class InitFromConfig:
    """What a new run begins with instead of random values; a checkpoint in its own directory wins."""

    run: str = ""
    """Run directory, gs:// and s3:// too, to begin with the parameters of."""
    huggingface: str = ""
    """Folder of a model in Hugging Face's layout to begin with: config.json, *.safetensors, and its tokenizer."""
    step: int | None = None
    """Checkpoint of the run; None: the latest."""
    best: bool = False
    """Take the run's checkpoint with the lowest validation loss."""
    average: int = 1
    """Take the mean of the parameters of this many checkpoints, the last of them the one chosen."""
    model: Literal["source", "own"] = "source"
    """Where keys of `model` come from that stand at their defaults: the source, or these defaults."""
    tokenizer: Literal["source", "own"] = "source"
    """Whether data.tokenizer says nothing, the source's being used, or wins; data.tokenizer_path and data.prepared win always."""
    include: tuple[str, ...] = ()
    """Parameters to load, as patterns: decoder/*, or re: and a regular expression; none: all. Others begin as new."""
    exclude: tuple[str, ...] = ()
    """Parameters not to load, as patterns: they begin as new."""
    rename: tuple[str, ...] = ()
    """Parameters that have another place in the source, each NEW=OLD: decoder=encoder takes decoder/* from encoder/*."""
    allow_missing: tuple[str, ...] = ()
    """Patterns of parameters that may be missing in the source, and then begin as new; any other is a mistake."""
    allow_extra: tuple[str, ...] = ()
    """Patterns of parameters of the source that may be left; any other without a place in the model is a mistake."""
    layers: Literal["all", "first", "spread"] = "all"
    """Which of the source's layers a shallower model takes: `all` refuses another depth, `spread` takes every n-th."""
    optimizer: Literal["reset", "keep"] = "reset"
    """Begin with an optimizer's fresh state, or with that of the run."""
    progress: Literal["reset", "keep"] = "reset"
    """Count steps, which schedule and data follow, from 0, or on from the run's checkpoint."""
