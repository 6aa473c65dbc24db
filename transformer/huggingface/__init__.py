"""Models in Hugging Face's layout, in and out: config.json, safetensors, tokenizer.

A family is a table in `families/`, read in both directions. To add one:

1. Write `families/NAME.py` with `FAMILY = Family(...)` and a line in `families.FAMILIES` (keyed by config.json's model_type).
2. `keys`: config.json's keys that are keys of ModelConfig, with transformers' defaults; `translations` for what is not one
   to one (window patterns, rotary scaling); `constants` of ModelConfig; `fixed` for keys with which the model would be
   another one; `harmless` for the rest. Every key of transformers' config class has to be in one of them.
3. `lines`: a line for each of their tensors, with the path of ours in a single layer. A line counts where the model has that
   parameter. `transposed` (torch's Linear), several `ours` along an `axis` (fused projections), `groups` (fused head by
   head), a `Part` with an `order` (rotary layouts), `{expert}` (experts apart), `offset` (norms by 1 + w).
4. Add its variants to `tests/huggingface/test_families.py`, which compares logits with transformers' own.

`read` gives a model and its parameters, sharded, and `write` is the reverse.
"""
