"""A tiny gpt-oss in its published form: experts in MXFP4."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig

from tests.support.families import ROUTED
from tests.support.models.tiny import save_model

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SETTINGS: dict[str, Any] = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}
GPT_OSS = GptOssConfig(**ROUTED, num_local_experts=4, head_dim=16, sliding_window=8)


def save_gpt_oss(folder: Path) -> Path:
    """Save a gpt-oss whose scales make weights as small as a random model's."""
    save_model(folder, GPT_OSS)
    weights: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(1)
    for name, tensor in load_file(folder / WEIGHTS).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weights[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        groups = (experts, outputs, inputs // 32)
        weights[f"{name}_blocks"] = torch.randint(256, (*groups, 16), generator=random).to(torch.uint8)
        weights[f"{name}_scales"] = torch.randint(121, 124, groups, generator=random).to(torch.uint8)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    return folder
