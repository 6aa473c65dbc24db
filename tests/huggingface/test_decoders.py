"""What tables of decoders after Llama refuse, by key and value, and how they spell which layers differ."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_variants import MORE, VARIANTS
from logits import difference, mesh_of, of_texts, our_logits, padded
from references import COLUMNS, REFERENCES, texts, weight, write_folder

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.families import family_of
from transformer.huggingface.reading import read
from transformer.huggingface.table import kinds_of, layers_of
from transformer.huggingface.translation import canonical, read_config, write_config
from transformer.huggingface.writing import write

ALL = VARIANTS | MORE


@pytest.mark.parametrize("name", ALL)
def test_a_config_is_translated_there_and_back(name: str) -> None:
    """What is written says the same model, though it may spell it otherwise."""
    family = family_of(ALL[name]["model_type"])
    model = read_config(family, ALL[name])
    written = json.loads(json.dumps(write_config(family, model)))
    assert read_config(family, written) == model
    assert len(kinds_of(model)) == model.num_layers


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2", {"hidden_act": "mish"}, "hidden_act = 'mish' is none of silu"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types has 'sliding_attention', and use_sliding_w"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "must be a list of num_hidden_layers = 3 names"),
        (
            "qwen2",
            {"layer_types": ["linear_attention"] * 3},
            "layer_types: 'linear_attention' is none of full_attention",
        ),
        (
            "qwen2-windows",
            {"max_window_layers": "all"},
            "max_window_layers = 'all': must be a whole number, at least 0",
        ),
        ("qwen2", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be a number up to 16,384"),
        (
            "qwen3",
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_scaling.rope_type = 'longrope' is none of default",
        ),
        ("qwen3", {"attention_bias": "yes"}, "attention_bias = 'yes': must be True or False"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: qwen3 is read with None"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0: must be a whole number, at least 1"),
        ("qwen3_moe", {"mlp_only_layers": 2}, "mlp_only_layers = 2: must be a list of numbers of layers"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1 with weights divided by their sum"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1 with weights divided by their sum"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True: only False is read"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0: must be a number greater than 0"),
        (
            "gemma3-linear",
            {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention = ",
        ),
        (
            "gemma3",
            {"rope_parameters": {"rope_theta": 5.0, "full_attention": 3}},
            "must have an object for full_attention",
        ),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers = [1]: must be a list of 0 (none) and 1 (rotary)"),
        ("deepseek_v3", {"v_head_dim": 8}, "qk_nope_head_dim = 6 with v_head_dim = 8"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05: transformers' norms of latents add 1e-06"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias = True: deepseek_v3 is read with False alone"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False: deepseek_v3 is read with True alone"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy': deepseek_v3 is read with 'noaux_tc'"),
        ("deepseek_v3", {"n_group": 4}, "n_group: model.num_expert_groups = 4 does not divide"),
        (
            "deepseek_v3-yarn",
            {"rope_parameters": {"mscale": 1.0}},
            "rope_scaling.mscale = 1.0 is read with 'yarn' alone",
        ),
        ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads: model.num_kv_heads = 1 with model."),
    ],
)
def test_what_is_another_model_is_refused(name: str, changes: dict[str, Any], said: str) -> None:
    config = ALL[name] | changes
    with pytest.raises(ConfigError) as caught:
        read_config(family_of(config["model_type"]), config)
    assert all(said in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2", {"attention_biases": "all"}, "model.attention_biases = 'all': qwen2 has 'qkv'"),
        (
            "qwen3",
            {"attention_biases": "qkv"},
            "model.attention_biases = 'qkv': attention's maps have biases all or none",
        ),
        (
            "qwen3",
            {"layers": "attention@none"},
            "model.layers = 'attention@none': 'attention@none' is none of 'attention'",
        ),
        ("mixtral", {"layers": "attention"}, "model.layers = 'attention': 'attention' is none of 'attention/experts'"),
        ("mixtral", {"first_layers": "attention.window/experts"}, "all layers must have a window, or none"),
        ("mixtral", {"experts_per_token": 1}, "model.experts_per_token = 1: the weight of one is here its score"),
        ("mixtral", {"expert_scale": 2.0}, "model.expert_scale = 2.0: mixtral has 1.0"),
        ("gemma2", {"embedding_scale": 2.0}, "model.embedding_scale = 2.0: must be the root of the width"),
        ("gemma2", {"attention_scale": 0.3}, "model.attention_scale = 0.3: query_pre_attn_scalar has to be a whole"),
        ("gemma3-linear", {"window_rotary_base": None}, "layers with a window are not scaled"),
        (
            "deepseek_v3",
            {"first_layers": None, "layers": "2*latent_attention/experts+latent_attention"},
            "once a layer has",
        ),
        ("deepseek_v3", {"attention_scale": 0.5}, "model.attention_scale = 0.5: without YaRN it must be"),
        ("deepseek_v3", {"balance_bias_rate": 0.0}, "model.balance_bias_rate = 0.0: deepseek_v3 has 0.001"),
    ],
)
def test_what_a_family_cannot_say_is_refused(name: str, changes: dict[str, Any], said: str) -> None:
    family = family_of(ALL[name]["model_type"])
    model = dataclasses.replace(read_config(family, ALL[name]), **changes)
    with pytest.raises(ConfigError) as caught:
        write_config(family, model)
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_layers_are_spelt_with_few_blocks() -> None:
    window, full, none = "attention.window", "attention", "attention@none"
    assert layers_of([full] * 4) == {"first_layers": None, "layers": full}
    assert layers_of([window, full] * 2) == {"first_layers": None, "layers": f"{window}+{full}"}
    assert layers_of([full] * 3 + [window] * 9) == {"first_layers": "3*attention", "layers": window}
    gemma = ([window] * 5 + [full]) * 4 + [window] * 2  # 26 layers, which a period of six does not divide
    assert layers_of(gemma) == {"first_layers": f"2*{window}", "layers": f"3*{window}+{full}+2*{window}"}
    assert layers_of([full, none]) == {"first_layers": None, "layers": f"{full}+{none}"}
    layers: dict[str, Any] = layers_of(gemma)
    config = ModelConfig(vocab_size=9, num_layers=26, **layers)
    assert kinds_of(config) == gemma and canonical(config).layers == config.layers


def test_layers_that_predict_further_tokens_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = json.loads((REFERENCES / "deepseek_v3-yarn.json").read_text())
    more = {"model.layers.2.eh_proj.weight": [30, 60], "model.layers.2.enorm.weight": [30]}
    write_folder(tmp_path, reference["config"], reference["shapes"] | more, 0)
    _, params = read(tmp_path, mesh_of())
    (said,) = [record.getMessage() for record in caplog.records]
    assert "2 tensors, model.layers.2." in said and "are left out" in said and "num_nextn_predict_layers" in said
    # The planes of rotary positions: neighbours there, half the width apart here.
    theirs = weight("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", [12, 30], 0)
    ours = np.asarray(params["decoder"]["layers"]["blocks"][1]["mixer"]["rotary_key"]["kernel"][0])
    np.testing.assert_array_equal(ours, theirs[[8, 10, 9, 11]].T)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("deepseek_v3-yarn", {"fsdp": 2, "expert": 2, "replica": 2}),
        ("gemma3-linear", {"fsdp": 4, "tensor": 2}),
        ("olmo2", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_logits_on_eight_devices(name: str, axes: dict[str, int], tmp_path: Path) -> None:
    reference = json.loads((REFERENCES / f"{name}.json").read_text())
    write_folder(tmp_path, reference["config"], reference["shapes"], 0)
    mesh, batch = mesh_of(**axes), padded(texts(0), rows=8)
    model, params = read(tmp_path, mesh)
    found = [text[:, :COLUMNS] for text in of_texts(our_logits(model, params, mesh, batch), batch, texts(0), False)]
    assert difference(found, [np.array(text) for text in reference["logits"]]) < 1e-4


def test_parameters_may_be_stacked_by_another_period(tmp_path: Path) -> None:
    """A run may have layers apart that a model that was read has in one stack."""
    reference = json.loads((REFERENCES / "olmo2.json").read_text())
    write_folder(tmp_path / "theirs", reference["config"], reference["shapes"], 0)
    model, params = read(tmp_path / "theirs", mesh_of())
    assert model.layers == "attention" and model.first_layers is None
    own = dataclasses.replace(model, first_layers="attention")
    stacked = params["decoder"]["layers"]
    apart = {
        "first": jax.tree.map(lambda leaf: leaf[:1], stacked),
        "layers": jax.tree.map(lambda leaf: leaf[1:], stacked),
    }
    decoder = params["decoder"] | apart
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", family_of("olmo2"), own, params | {"decoder": decoder})
    again, same = read(tmp_path / "ours", mesh_of())
    assert again == model and jax.tree.all(jax.tree.map(np.array_equal, params, same))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["pad_token_id"] is None  # transformers' default is outside this vocabulary


def test_the_scale_of_embeddings_is_rounded_as_gemma_rounds_it() -> None:
    """In bfloat16 sqrt(3072) = 55.43 is 55.5, and so is the number that embeddings are multiplied by."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.bfloat16)
    np.testing.assert_array_equal(x * 3072**0.5, x * jnp.bfloat16(55.5))
