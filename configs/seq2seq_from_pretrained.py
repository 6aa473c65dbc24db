"""English to German on Multi30k, with the encoder and the embeddings of `multi30k_masked_lm`; the decoder is new.

Else it is `multi30k_transformer` the other way round, with that encoder's rotary positions. With `--init-from.rename
decoder=encoder` and `--init-from.allow-missing "decoder/layers/cross*"` the decoder begins as the encoder too, but for what
reads it (Rothe et al. 2020, arXiv:1907.12461).
"""

from configs import multi30k_transformer
from transformer.config import Config, replace


def get_config() -> Config:
    base = multi30k_transformer.get_config()
    data = base.data
    return replace(
        base,
        init_from={"run": "runs/multi30k_masked_lm", "allow_missing": ("decoder/*",)},
        model={"positions": "rotary"},
        data={
            "source_path": data.target_path,
            "target_path": data.source_path,
            "validation_source_path": data.validation_target_path,
            "validation_target_path": data.validation_source_path,
        },
    )
