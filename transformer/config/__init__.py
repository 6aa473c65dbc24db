"""The configuration: frozen, typed dataclasses, and the only place where a default is written.

A recipe is a file `configs/NAME.py` with a function `get_config() -> Config`. The command line
overrides single keys (`transformer/arguments.py`); `validate` reports every mistake at once. This package
imports neither JAX nor any other heavy package, so that `--help` answers quickly.
"""

from transformer.config.adapter import AdapterConfig
from transformer.config.init_from import InitFromConfig
from transformer.config.model import (
    RECURRENT,
    VOCAB_ROW_MULTIPLE,
    LayerKind,
    ModelConfig,
    parse_layers,
)
from transformer.config.schema import (
    BYTE_VOCAB_SIZE,
    DATA_AXES,
    MESH_AXES,
    OBJECTIVE_DATA,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    DataKind,
    EvaluationConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    TrackingConfig,
    TrainConfig,
    data_kind,
    first_example,
    get,
    keys,
    known_vocab_size,
    mesh_axes,
    microbatch_starts,
    nearest,
    num_microbatches,
    replace,
    source_length,
    type_of,
    warmup_steps,
    window_length,
)
from transformer.config.serialization import (
    from_json,
    from_tree,
    place,
    to_json,
    type_name,
    type_problem,
    write_atomically,
)
from transformer.config.validation import (
    mentioned,
    mesh_problems,
    problems_of,
    validate,
)
