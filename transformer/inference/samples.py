"""The sample that a run writes after each validation."""

import importlib

from transformer.config import Config, data_kind
from transformer.data.tokenizers import Tokenizer
from transformer.inference.generate import generate
from transformer.inference.prompts import can_generate, max_new_tokens
from transformer.inference.sampling import Sampling
from transformer.models.parameters import Tree
from transformer.models.transformer import Transformer


def sample(
    config: Config, model: Transformer, params: Tree, tokenizer: Tokenizer, prompt: str, length: int
) -> str | None:
    """Returns up to `length` tokens of text after `prompt`, None of a model that writes none or has no position left."""
    stop: tuple[str, ...] = ()
    if data_kind(config) == "chat":
        # Loaded only by runs that learn from conversations.
        chat = importlib.import_module("transformer.inference.chat")
        prompt, tokenizer, stop = chat.sample_prompt(config, tokenizer, prompt)
    room = max_new_tokens(model, len(tokenizer.encode(prompt)) + 1) if can_generate(model) else 0
    length = length if room is None else min(length, room)
    if length <= 0:
        return None
    options = {"seed": config.seed, "stop": stop, "prefix": config.objective.name == "prefix_lm"}
    [generation] = generate(model, params, tokenizer, [prompt], length, Sampling(0.8), **options)
    return generation.text
