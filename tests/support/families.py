"""The model families that are trained, each as a tiny configuration."""

from typing import Any

import transformers as hf
from transformers import PretrainedConfig

from tests.support.tiny import SHAPE

GATED = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
FUSED = "qkv_proj o_proj gate_up_proj down_proj"
FUSED_MLP = "q_proj k_proj v_proj o_proj gate_up_proj down_proj"
NEOX = "query_key_value dense dense_h_to_4h dense_4h_to_h"
BASE: dict[str, Any] = SHAPE | {"initializer_range": 0.1, "pad_token_id": 2}
"""Weights that make attention matter."""
WINDOW = 6
"""Shorter than most rows."""
KINDS = ["sliding_attention", "full_attention"]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 2}
VISION: dict[str, Any] = {"vision_config": TOWER | {"image_size": 4}, "mm_tokens_per_image": 4}
GEMMA = BASE | {"head_dim": 32, "query_pre_attn_scalar": 64, "sliding_window": WINDOW, "layer_types": KINDS}
PHI3 = BASE | {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE}
SWA = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": KINDS}
# A family is a line: a configuration with all that it can do, and the layers of a block that get an adapter.
FAMILIES: dict[str, tuple[PretrainedConfig, str]] = {
    "llama": (hf.LlamaConfig(**BASE), GATED),
    "llama-biased-tied": (hf.LlamaConfig(**BASE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), GATED),
    "mistral": (hf.MistralConfig(**BASE, sliding_window=WINDOW), GATED),
    "qwen2": (hf.Qwen2Config(**BASE, **SWA, tie_word_embeddings=True), GATED),
    "qwen3": (hf.Qwen3Config(**BASE, **SWA, head_dim=32), GATED),
    "gemma": (hf.GemmaConfig(**BASE, head_dim=32), GATED),
    "gemma2": (hf.Gemma2Config(**GEMMA, attn_logit_softcapping=0.2, final_logit_softcapping=3.0), GATED),
    "gemma3_text": (hf.Gemma3TextConfig(**GEMMA), GATED),
    "gemma3": (hf.Gemma3Config(text_config=GEMMA | {"intermediate_size": 512}, **VISION), GATED),
    "phi3": (hf.Phi3Config(**PHI3, sliding_window=WINDOW), FUSED),
    "olmo": (hf.OlmoConfig(**BASE, clip_qkv=8.0), GATED),
    "olmo2": (hf.Olmo2Config(**BASE), GATED),
    "olmo3": (hf.Olmo3Config(**BASE, sliding_window=WINDOW, layer_types=KINDS), GATED),
    "smollm3": (hf.SmolLM3Config(**BASE, no_rope_layers=[1, 0]), GATED),
    "granite": (hf.GraniteConfig(**BASE, logits_scaling=4.0, attention_multiplier=0.1, residual_multiplier=0.5), GATED),
    "cohere": (hf.CohereConfig(**BASE, logit_scale=0.25, use_qk_norm=True), GATED),
    "cohere2": (hf.Cohere2Config(**BASE, logit_scale=0.25, sliding_window=WINDOW, layer_types=KINDS), GATED),
    "glm4": (hf.Glm4Config(**BASE, head_dim=16), FUSED_MLP),
    "phi": (hf.PhiConfig(**BASE | {"intermediate_size": 256}, qk_layernorm=True), "q_proj k_proj v_proj dense fc1 fc2"),
    "gpt_neox": (hf.GPTNeoXConfig(**BASE | {"hidden_size": 128}), NEOX),
    "ministral": (hf.MinistralConfig(**BASE, head_dim=16, sliding_window=WINDOW, layer_types=KINDS), GATED),
    "seed_oss": (hf.SeedOssConfig(**BASE, head_dim=16, attention_out_bias=True), GATED),
}
