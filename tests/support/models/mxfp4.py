"""A tiny gpt-oss in its published form: experts in MXFP4."""

from pathlib import Path

from transformers import GptOssConfig

from qlora_trainer.steps.selftest import draw_experts_in_mxfp4
from tests.support.families import ROUTED
from tests.support.models.tiny import save_model

CONFIG, WEIGHTS = "config.json", "model.safetensors"
GPT_OSS = GptOssConfig(**ROUTED, num_local_experts=4, head_dim=16, sliding_window=8)


def save_gpt_oss(folder: Path) -> Path:
    """Save a gpt-oss whose scales make weights as small as a random model's."""
    save_model(folder, GPT_OSS)
    draw_experts_in_mxfp4(folder)
    return folder
