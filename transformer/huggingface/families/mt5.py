"""mT5 (Xue et al. 2021, arXiv:2010.11934): T5 version 1.1 for 101 languages, whose head is never scaled."""

import dataclasses

from transformer.huggingface.families import t5
from transformer.huggingface.table import Key

_DEFAULTS = {"vocab_size": 250112, "d_ff": 1024, "num_heads": 6, "feed_forward_proj": "gated-gelu"}

FAMILY = dataclasses.replace(
    t5.FAMILY,
    model_type="mt5",
    architecture="MT5ForConditionalGeneration",
    keys=tuple(Key(key.theirs, key.ours, _DEFAULTS.get(key.theirs, key.default), key.values) for key in t5.KEYS),
    translations=(t5.depths(8), t5.derived("gated-gelu")),
    constants=t5.CONSTANTS | {"logit_scale": 1.0},
    harmless=(*t5.FAMILY.harmless, "scale_decoder_outputs"),
)
