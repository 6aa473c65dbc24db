"""Chat tuning on a CPU, in minutes: conversations about the functions and classes of Python's standard library.

Their docstrings are on every machine: the user asks what something is for, and the assistant says what its docstring says. Loss
is on the assistant's words only. With `--data.path chats.jsonl` it learns from conversations of yours; a tokenizer.json with a
chat template beside it is used with `--data.tokenizer huggingface --data.tokenizer-path FOLDER --data.chat-template ""`.
"""

from configs import stdlib
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        stdlib.get_config(),
        data={"chat_template": "plain", "sequence_length": 128, "tokenizer_vocab_size": 2048},
        model={"num_layers": 2, "width": 128},
        objective={"name": "chat"},
        optimizer={"learning_rate": 3e-3, "warmup_steps": 20},
        train={"num_steps": 200, "batch_size": 16},
        evaluation={
            "every_steps": 100,
            "sample_prompt": "What is the function join of posixpath for?",
            "sample_tokens": 60,
        },
        checkpoint={"every_steps": 100},
    )
