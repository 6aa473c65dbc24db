"""What is exported runs in CTranslate2 (a converter and kernels of its own) and in transformers, with the same tokens as here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logits import mesh_of, our_logits, padded
from references import texts, their_model

from transformer.huggingface.families import family_of
from transformer.huggingface.reading import read
from transformer.huggingface.writing import write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
ctranslate2 = pytest.importorskip("ctranslate2")

NEW_TOKENS = 48
LLAMA = {
    **{"model_type": "llama", "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "tie_word_embeddings": False},
}
GPT2 = {"model_type": "gpt2", "vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}


def a_tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {f"t{number}": number for number in range(88)} | {"<s>": 88, "</s>": 89}
    made = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="t0"
    )


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = LLAMA | {"rope_scaling": SCALED | {"original_max_position_embeddings": 8192}, "rope_theta": 10_000.0}


@pytest.mark.parametrize("config", [LLAMA, LLAMA3, GPT2], ids=["llama", "llama3", "gpt2"])
def test_three_tools_write_the_same_text(config: dict[str, Any], tmp_path: Path) -> None:
    their_model(config, 7).save_pretrained(tmp_path / "theirs")
    mesh = mesh_of()
    model, params = read(tmp_path / "theirs", mesh)
    exported = tmp_path / "exported"
    exported.mkdir()
    write(exported, family_of(config["model_type"]), model, params)
    a_tokenizer().save_pretrained(exported)
    prompt = [int(token) for token in texts(7)[1][:12] if token < 88]

    own = list(prompt)
    for _ in range(NEW_TOKENS):
        ids = np.asarray(own + [0] * (len(prompt) + NEW_TOKENS - len(own)), np.int32)
        logits = our_logits(model, params, mesh, padded([ids]))
        own.append(int(np.argmax(np.asarray(logits)[0, len(own) - 1, :90])))

    loaded = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    with torch.no_grad():
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        theirs = loaded.generate(torch.tensor([prompt]), eos_token_id=None, **options)[0].tolist()
    assert theirs == own

    ctranslate2.converters.TransformersConverter(str(exported)).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    words = [f"t{token}" for token in prompt]
    found = generator.generate_batch(
        [words],
        max_length=NEW_TOKENS,
        min_length=NEW_TOKENS,
        sampling_topk=1,
        end_token=[],
        include_prompt_in_result=False,
    )
    assert prompt + list(found[0].sequences_ids[0]) == own
