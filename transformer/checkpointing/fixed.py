"""What of its configuration a run keeps for life."""

from transformer.config import Config, get, keys

MAY_CHANGE = (
    *(
        f"model.{name}"
        for name in ("attention_implementation", "scan_layers", "remat", "compute_dtype", "matrix_products", "dropout")
    ),
    *("model.balance_loss", "model.router_z_loss"),
    *("objective.z_loss", "objective.label_smoothing", "objective.future_weight"),
)
"""Keys of `model` and `objective` that change neither the parameters nor what they mean, nor the examples."""

FIXED = (
    *(key for key in keys() if key.startswith("model.") and key not in MAY_CHANGE),
    *("data.sequence_length", "data.source_length", "data.window_length"),
    *("data.shuffle", "data.shift_windows", "data.weights"),
    *(key for key in keys() if key.startswith("objective.") and key not in MAY_CHANGE),
    *(key for key in keys() if key.startswith("adapter.") and key not in ("adapter.base_run", "adapter.dropout")),
    *("optimizer.name", "optimizer.momentum", "optimizer.ema_decay", "optimizer.frozen"),
    *("train.batch_size", "train.batch_warmup_steps", "seed"),
)
"""Keys that a run keeps for life: with another value the checkpoint would not fit, or the data would start anew."""


def contradictions(old: Config, new: Config) -> list[str]:
    """Returns a sentence for each fixed key in which `new` differs from the run's `old` configuration."""
    # A batch that grows does so by microbatches; a schedule-free run keeps points from which beta1 tells the average.
    grows, averages = old.train.batch_warmup_steps > 0, old.optimizer.name == "schedule_free"
    fixed = (*FIXED, *["train.num_microbatches"] * grows, *["optimizer.beta1"] * averages)
    return [
        f"{key} = {get(new, key)!r} contradicts the run, which has {get(old, key)!r}"
        for key in fixed
        if get(old, key) != get(new, key)
    ]
