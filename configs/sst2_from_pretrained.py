"""SST-2 as in `sst2_from_scratch`, begun with the parameters and the tokenizer of a run of `sst2_pretrain`.

Which run that is says `--init-from.run`. The head that tells positive from negative is new; all else is loaded. The
adapter is that of the study `transfer`, and narrow: of so small a model it trains 1.5%.
"""

from configs import sst2_from_scratch
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        sst2_from_scratch.get_config(),
        init_from={"run": "runs/sst2_pretrain", "allow_missing": ("classifier/*",)},
        adapter={"rank": 3, "alpha": 6.0},
        optimizer={"learning_rate": 5e-4},
    )
