"""Studies: many runs that differ in one thing, and what came out of them; `transformer study NAME` repeats each."""

STUDIES: dict[str, tuple[str, str]] = {
    "ablation": ("transformer.studies.ablation", "stdlib"),
    "mup": ("transformer.studies.mup", "width_transfer"),
    "precision": ("transformer.studies.precision", "stdlib"),
    "recall": ("transformer.studies.recall", "associative_recall"),
    "transfer": ("transformer.studies.transfer", "sst2_from_pretrained"),
}
"""Module and recipe by name; the module has STUDY, whose runs change the recipe."""
