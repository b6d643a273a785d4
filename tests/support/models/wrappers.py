"""Tiny multimodal models, made of transformers' defaults, with a trained text decoder."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig

from docs.families import SETTINGS
from qlora_trainer.model.architecture.text_part import auto_class
from qlora_trainer.model.families.tiny_model import shrink
from tests.support.models.four_bit import expert_weights
from tests.support.models.tiny import VOCABULARY, save_tokenizer

PACKED = (
    "cosmos3_edge",
    "cosmos3_omni",
    "deepseek_vl",
    "exaone4_5",
    "fast_vlm",
    "fun_asr_nano",
    "fuyu",
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "glm46v",
    "glm4v",
    "glm_ocr",
    "glmasr",
    "got_ocr2",
    "granite_docling",
    "hyperclovax_vision_v2",
    "idefics2",
    "idefics3",
    "internvl",
    "janus",
    "lfm2_vl",
    "lfm3_vl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "mistral3",
    "mllama",
    "moss_transcribe_diarize",
    "omniasr",
    "ovis2",
    "paddleocr_vl",
    "perception_lm",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_asr",
    "qwen3_vl",
    "smolvlm",
    "vibevoice_asr",
    "video_llama_3",
    "video_llava",
    "vipllava",
    "voxtral",
)
"""Model types that keep the rows of a sequence apart."""
MIXTURES = ("glm4v_moe", "qwen3_5_moe", "qwen3_vl_moe")
"""Model types with routed experts."""
_TURNED = {"qwen3_5_moe": False, "qwen3_vl_moe": True}
"""Types whose published files have all experts of a block in one tensor, and whether it has rows for columns."""
WRAPPERS = frozenset({*PACKED, *MIXTURES})
# Sizes of towers, under any name of a family.
_TOWER = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
}
_TIMM_TOWER: dict[str, dict[str, Any]] = {
    "fastvit_mci3": {"layers": (1,) * 5, "embed_dims": (32,) * 5},
    "mobilenetv5_300m_enc": {"channel_multiplier": 0.05},
    "vit_pe_core_large_patch14_336": {"depth": 1, "embed_dim": 32, "num_heads": 2},
}


def tiny_wrapper(model_type: str) -> PretrainedConfig:
    """Configure a small tower and a decoder for the rows of `tests.support.training`."""
    small = shrink(AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {}))).config
    text = small.get_text_config(decoder=True)
    for place, part in vars(small).items():
        if place in ("adaptor_config", "perceiver_config"):
            # It leads from a tower to the text, and has sizes of the text.
            part.hidden_size = text.hidden_size
            if place == "adaptor_config":
                part.intermediate_size = text.hidden_size // 4
        elif isinstance(part, PretrainedConfig) and part is not text:
            for name, size in _TOWER.items():
                if isinstance(getattr(part, name, None), int):
                    setattr(part, name, size)
            if getattr(part, "layer_types", None):
                part.layer_types = part.layer_types[: _TOWER["num_hidden_layers"]]
            if hasattr(part, "out_hidden_size"):
                part.out_hidden_size = text.hidden_size
            if hasattr(part, "architecture"):
                # A tower that timm builds has the library's names of sizes.
                part.model_args = {**(part.model_args or {}), **_TIMM_TOWER[part.architecture]}
    text.vocab_size, text.initializer_range = VOCABULARY, 0.1
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = VOCABULARY
    if isinstance(getattr(text, "intermediate_size", None), int):
        text.intermediate_size = 512
    return small


def save_wrapper(folder: Path, config: PretrainedConfig) -> Path:
    """A random model with its tokenizer and its tower, in a folder as in a hub."""
    loader: Any = auto_class(config)
    torch.manual_seed(0)
    model = loader.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                # Norms that begin at 1 and biases that begin at 0 would not be missed.
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if config.model_type in _TURNED:
        _store_stacks(folder / "model.safetensors", model, turned=_TURNED[config.model_type])
    save_tokenizer(folder)
    return folder


def _store_stacks(file: Path, model: Any, *, turned: bool) -> None:
    """Store a file's experts in their published form: all of a block in one tensor."""
    stacks = {name: weight.mT.contiguous() if turned else weight for name, weight in expert_weights(model).items()}
    others = {name: tensor for name, tensor in load_file(file).items() if ".experts." not in name}
    if model.config.model_type == "qwen3_5_moe":
        # Of blocks that predict further tokens, which transformers leaves out.
        others |= {f"mtp.{name[name.index('layers.') :]}": weight.clone() for name, weight in stacks.items()}
    save_file(others | stacks, file, metadata={"format": "pt"})
