"""Tiny configurations of all families that are trained, made of transformers' own defaults."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from qlora_trainer.model.shrunken import shrunken
from tests.support.tiny import VOCABULARY

# What transformers' default leaves out and every published model has, or what shows more of the family.
_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma4_text": {"num_hidden_layers": 12, "num_kv_shared_layers": 6, "global_head_dim": 64},
    "gemma4_unified_text": {"global_head_dim": 64},
    "hunyuan_v1_dense": {"head_dim": 32},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "granitemoehybrid": {"num_local_experts": 0, "layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 32},
    "opt": {"dropout": 0.0},
}
_OF_ONE_PIECE = frozenset({"falcon_h1", "mamba2", "minicpm3", "youtu"})
"""Families of which no size can be changed alone."""
_SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rotary_dim": 16,
}
PACKED = (
    "apertus",
    "arcee",
    "biogpt",
    "bitnet",
    "codegen",
    "cwm",
    "diffllama",
    "dory",
    "ernie4_5",
    "exaone",
    "exaone4",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm",
    "gpt_bigcode",
    "gptj",
    "helium",
    "hunyuan_v1_dense",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "lfm2",
    "ministral3",
    "moshi",
    "nanochat",
    "opt",
    "persimmon",
    "starcoder2",
    "vaultgemma",
)
"""Model types that keep the rows of a sequence apart, beside those in `tests.support.families`."""

ONE_ROW = (
    "bamba",
    "bloom",
    "falcon_h1",
    "gpt_neo",
    "granite_swa",
    "granitemoehybrid",
    "lfm3",
    "minicpm3",
    "mpt",
    "nemotron",
    "olmo_hybrid",
    "qwen3_5_text",
    "stablelm",
    "xglm",
    "youtu",
)
"""Model types that are trained with one row in a sequence."""


def tiny_config(model_type: str) -> PretrainedConfig:
    """A configuration with a block of each kind, for the vocabulary of the rows in `tests.support.training`."""
    settings = _SETTINGS.get(model_type, {})
    default = AutoConfig.for_model(model_type, **settings)
    if model_type not in _OF_ONE_PIECE:
        own = {name: default.attribute_map.get(name, name) for name in _SIZES}
        settings = settings | {name: size for name, size in _SIZES.items() if vars(default).get(own[name]) is not None}
    small = shrunken(AutoConfig.for_model(model_type, **settings)).config
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if hasattr(small, name):
            setattr(small, name, VOCABULARY)
    if wide := vars(small).get("intermediate_size"):
        small.intermediate_size = [512] * len(wide) if isinstance(wide, list) else 512
    # Scores matter, and little noise is learned through in a few steps.
    small.initializer_range = 0.1
    return small
