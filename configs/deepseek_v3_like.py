"""A model after DeepSeek-V3 (arXiv:2412.19437, section 4.2), 682,636,487,424 parameters: latent attention, three dense layers, then
256 experts of which a token takes eight, of four groups of eight, and one that all share, chosen by sigmoids with biases that
even out the load, and a head for the token after the next.

What differs: the loss that balances experts is over the batch; tokens travel by expert, and not once to each host. The peak
rate is the paper's; warm-up and decay are those of the other recipes.

Splits: on 2,048 chips of TPU v5p, `--parallel.expert 32` and `fsdp` for the rest; on 2,048 H100s, `--parallel.expert 8` inside a
host and `fsdp` across hosts. A slice of TPU v6e, 256 chips of 32 GB, does not hold parameters and moments (12 bytes each), and
layers of which the first differ are not split over slices (`parallel.stage`).
"""

from configs import llama3_8b
from transformer.config import Config, replace


def get_config() -> Config:
    return replace(
        llama3_8b.get_config(),
        data={"sequence_length": 4096},
        objective={"name": "multi_token", "future_weight": 0.3},
        model={
            "vocab_size": 129_280,
            "first_layers": "3*latent_attention",
            "layers": "latent_attention/experts",
            "num_layers": 61,
            "width": 7168,
            "num_heads": 128,
            "num_kv_heads": None,
            "head_width": 128,
            "latent_width": 512,
            "query_latent_width": 1536,
            "rotary_head_width": 64,
            "rotary_base": 10_000.0,
            "feedforward_width": 18_432,
            "num_experts": 256,
            "experts_per_token": 8,
            "expert_width": 2048,
            "num_shared_experts": 1,
            "num_expert_groups": 8,
            "groups_per_token": 4,
            "expert_scale": 2.5,
            "router_score": "sigmoid",
            "balance_bias_rate": 0.001,
            "balance_loss": 0.0001,
            "num_future_tokens": 1,
        },
        optimizer={"learning_rate": 2.2e-4, "final_ratio": 0.1, "warmup_steps": 2000},
        # 67 million tokens a step, where the paper's batch grew to 63, and 14.8 trillion in all.
        train={"num_steps": 220_000, "batch_size": 16_384, "num_microbatches": 8},
        evaluation={"batch_size": 2048},
    )
