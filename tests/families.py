"""Small random models of transformers' MoE families: two or three MoE layers, 8 experts, the family's router in full."""

from __future__ import annotations

from typing import Any

import torch

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
PLAIN = {"num_experts": 8, "num_experts_per_tok": 2}
MLA = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
}
GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": PLAIN,
    "qwen3_moe": PLAIN,
    "qwen3_next": PLAIN | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "olmoe": PLAIN,
    "mixtral": LOCAL,
    "minimax_m2": LOCAL,
    "phimoe": LOCAL,
    "gpt_oss": LOCAL,
    "granitemoe": LOCAL,
    "granitemoeshared": LOCAL,
    "deepseek_v2": MLA | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": MLA,
    "glm4_moe": GROUPED,
    "dots1": GROUPED | {"n_shared_experts": 1},
    "exaone_moe": PLAIN,
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "afmoe": PLAIN,
    "flex_olmo": PLAIN,
    "jamba": PLAIN
    | {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
    "lfm2_moe": PLAIN | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "nemotron_h": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "moe"],
        "num_hidden_layers": 5,
        "moe_shared_expert_intermediate_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
    },
    "gemma4_text": {
        "num_experts": 8,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
    },
}


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """The model, in evaluation mode; routers and biases are spread out so that experts differ."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**(BASE | FAMILIES[family] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if any(part in name for part in ("gate.weight", "router", ".wg.", "experts.")):
                    tensor.normal_(std=0.3)
                elif "bias" in name and any(part in name for part in ("mlp", "feed_forward", "mixer", "moe")):
                    tensor.uniform_(0, 0.2)
    return model
