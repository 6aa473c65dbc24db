"""What `transformer predict` can be told; it is loaded with the command line, and so loads nothing heavy."""

from dataclasses import dataclass, field
from typing import ClassVar

from transformer.arguments import Overrides
from transformer.config import Config
from transformer.run_options import RunOptions


@dataclass(frozen=True)
class TaskOptions(RunOptions):
    """Do the task that a run has learned for every record of a file, and write a line of JSON for each, in their order.

    Classes come by name and with probabilities, numbers as they are, answers with the place where they stand, texts as greedy
    search writes them. Where records have the right result as well, it is measured. Fields are those of the run, unless
    given: --data.text-field sentence.
    """

    input: str = ""
    """File of records (.jsonl, .parquet, .csv, .tsv; plain, .gz or .zst) or, where one text is read, of texts, one a line."""
    output: str = ""
    """File to write, .jsonl; empty: print the lines."""
    batch_size: int = 32
    """Records in a batch; those of similar length share one."""
    max_tokens: int = 128
    """Tokens that are written about a text at most."""


@dataclass(frozen=True)
class PredictOptions(TaskOptions):
    __doc__ = TaskOptions.__doc__
    SHOWN: ClassVar[type] = TaskOptions

    config: Overrides = field(default_factory=Config)
