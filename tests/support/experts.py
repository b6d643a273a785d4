"""Tiny mixtures of experts of the families that are trained, with what distinguishes them."""

from typing import Any

import transformers as hf
from transformers import PretrainedConfig

from tests.support.tiny import SHAPE

BASE: dict[str, Any] = SHAPE | {"initializer_range": 0.1, "pad_token_id": 2, "num_experts_per_tok": 2}
EXPERTS: dict[str, PretrainedConfig] = {
    "qwen3_moe": hf.Qwen3MoeConfig(**BASE, num_experts=8, moe_intermediate_size=64, head_dim=16),
    "qwen2_moe": hf.Qwen2MoeConfig(
        **BASE,
        num_experts=8,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[0],
    ),
    "mixtral": hf.MixtralConfig(**BASE, num_local_experts=8),
    "olmoe": hf.OlmoeConfig(**BASE, num_experts=8),
    "glm4_moe": hf.Glm4MoeConfig(
        **BASE,
        n_routed_experts=8,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        head_dim=16,
    ),
    "ernie4_5_moe": hf.Ernie4_5_MoeConfig(
        **SHAPE | {"initializer_range": 0.1, "pad_token_id": 2},
        moe_num_experts=8,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_intermediate_size=64,
        moe_layer_start_index=1,
    ),
}
