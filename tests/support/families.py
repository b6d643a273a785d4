"""A tiny configuration of each trained model family: by hand, or transformers' default."""

import re
from dataclasses import dataclass
from typing import Any

import transformers as hf
from transformers import AutoConfig, PretrainedConfig

from docs.families import PAGE, SETTINGS
from qlora_trainer.model.families.tiny_model import shrink
from tests.support.models.tiny import SHAPE, VOCABULARY
from tests.support.models.wrappers import WRAPPERS

ATTENTION = "q_proj k_proj v_proj o_proj"
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
ROUTED: dict[str, Any] = BASE | {"num_experts_per_tok": 2}
GROUPS = {"n_group": 2, "topk_group": 1}
EXPERTS: dict[str, tuple[PretrainedConfig, str]] = {
    "qwen3_moe": (hf.Qwen3MoeConfig(**ROUTED, num_experts=8, moe_intermediate_size=64, head_dim=16), ATTENTION),
    "qwen2_moe": (
        hf.Qwen2MoeConfig(
            **ROUTED, num_experts=8, moe_intermediate_size=64, shared_expert_intermediate_size=64, mlp_only_layers=[0]
        ),
        GATED,
    ),
    "mixtral": (hf.MixtralConfig(**ROUTED, num_local_experts=8), ATTENTION),
    "olmoe": (hf.OlmoeConfig(**ROUTED, num_experts=8), ATTENTION),
    "glm4_moe": (
        hf.Glm4MoeConfig(
            **ROUTED | GROUPS, n_routed_experts=8, moe_intermediate_size=64, first_k_dense_replace=1, head_dim=16
        ),
        GATED,
    ),
    "ernie4_5_moe": (
        hf.Ernie4_5_MoeConfig(
            **BASE,
            moe_num_experts=8,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_intermediate_size=64,
            moe_layer_start_index=1,
        ),
        GATED,
    ),
}
"""Mixtures of experts, each with what distinguishes it."""
BY_HAND = FAMILIES | EXPERTS
# One of each: gated, with sliding windows and caps, with fused layers, with another MLP; with custom parts, with
# blocks that differ, repeated or sharing keys, with a state, packed or not, with custom attention; with experts in
# every block, with a dense block, shared experts and experts in groups.
REPRESENTATIVE = frozenset(
    {
        "llama",
        "gemma2",
        "phi3",
        "gpt_neox",
        "apertus",
        "gemma3n_text",
        "gemma4_text",
        "bamba",
        "qwen3_5_text",
        "stablelm",
        "qwen3_moe",
        "glm4_moe",
    }
)
"""The families of which `make test` trains a model; `make test-all` trains one of each."""

# Options that transformers' default leaves out and every published model has, or that show more of the family.
_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma4_text": {"num_hidden_layers": 12, "num_kv_shared_layers": 6, "global_head_dim": 64},
    "gemma4_unified_text": {"global_head_dim": 64},
    "hunyuan_v1_dense": {"head_dim": 32},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "granitemoehybrid-dense": {
        "num_local_experts": 0,
        "layer_types": ["mamba", "attention"] * 2,
        "num_hidden_layers": 4,
    },
    "mamba2": {"state_size": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 32},
    # Smaller parts that no other depends on.
    "bailing_hybrid": {"num_experts": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    "beam": {"num_experts": 64, "head_dim": 32},
    "deepseek_v32": {"n_routed_experts": 64, "q_lora_rank": 128, "index_n_heads": 4},
    "glm_moe_dsa": {"q_lora_rank": 128, "index_n_heads": 4},
    "kimi_linear": {"linear_num_heads": 4},
    "nemotron_h": {"mamba_num_heads": 16, "moe_shared_expert_intermediate_size": 128},
    "qwen3_5_moe_text": {"head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    "qwen3_next": {"head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    "zaya": {"head_dim": 32, "router_hidden_size": 32},
}
# More than 2 % of the weights would be outside linear layers and experts.
_WIDER: dict[str, dict[str, Any]] = {
    "zaya": {"moe_intermediate_size": 256},
}
_OF_ONE_PIECE = frozenset({"falcon_h1", "mamba2", "minicpm3", "youtu"})
"""Dense families of which no size can be changed alone."""
_SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rotary_dim": 16,
}
_VARIANTS = {"llama-biased-tied": "llama", "granitemoehybrid-dense": "granitemoehybrid"}
"""Configurations beside a type's first one."""


@dataclass(frozen=True)
class Case:
    """A family, by `model_type` or variant, and its entry on the page of families."""

    name: str
    one_row: bool
    experts: bool

    @property
    def layers(self) -> frozenset[str]:
        """Return a block's adapted layers by last name, or none if not written down."""
        return frozenset(BY_HAND[self.name][1].split()) if self.name in BY_HAND else frozenset()

    def config(self) -> PretrainedConfig:
        """The tiny configuration."""
        return BY_HAND[self.name][0] if self.name in BY_HAND else tiny_config(self.name, experts=self.experts)


def _cases() -> dict[str, Case]:
    # Multimodal models have a separate suite.
    text = PAGE.read_text().partition("## Multimodal models")[0]
    rows = re.findall(r"^\| `(\S+)` \| (packed|one row a sequence) \| (.*) \|$", text, re.MULTILINE)
    types = {
        name: Case(name, how != "packed", remark == "experts in 4-bit")
        for name, how, remark in rows
        if name in BY_HAND or name not in WRAPPERS
    }
    variants = {name: Case(name, types[of].one_row, experts=False) for name, of in _VARIANTS.items()}
    return types | variants


def tiny_config(name: str, *, experts: bool = False) -> PretrainedConfig:
    """Configure a block of each kind, for the rows of `tests.support.training`."""
    model_type = _VARIANTS.get(name, name)
    settings = {**SETTINGS.get(name, {}), **_SETTINGS.get(name, {})}
    default = AutoConfig.for_model(model_type, **settings)
    if name not in _OF_ONE_PIECE and not experts:
        own = {size: default.attribute_map.get(size, size) for size in _SIZES}
        settings |= {size: value for size, value in _SIZES.items() if vars(default).get(own[size]) is not None}
    small = shrink(AutoConfig.for_model(model_type, **settings)).config
    for size in ("vocab_size", "vocab_size_per_layer_input"):
        if hasattr(small, size):
            setattr(small, size, VOCABULARY)
    if not experts and (wide := vars(small).get("intermediate_size")):
        small.intermediate_size = [512] * len(wide) if isinstance(wide, list) else 512
    for size, value in _WIDER.get(name, {}).items():
        setattr(small, size, value)
    # Scores matter, and little noise is learned through in a few steps.
    small.initializer_range = 0.1
    return small


CASES = _cases()
