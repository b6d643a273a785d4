"""Makes a model with random 4-bit weights, and stores it as transformers, Unsloth and this trainer read it.

python -m benchmarks.gpu.base CONFIG FOLDER DEVICE
"""

import sys
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

QUANTIZATION = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def random_model(config: PretrainedConfig, device: str, attention: str = "sdpa") -> Any:
    """Return a model of random weights, made by layer: 130 GB in 16 bit never exist."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=QUANTIZATION)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            values = torch.empty(module.out_features, module.in_features, dtype=torch.bfloat16, device=device)
            values.normal_(std=0.02)
            module.weight = Params4bit(
                values, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
            ).to(device)
            module.support_avx512bf16_for_cpu = False
            continue
        for name, parameter in module.named_parameters(recurse=False):
            filled = torch.ones if parameter.ndim == 1 else torch.zeros
            value = filled(parameter.shape, dtype=torch.bfloat16, device=device)
            if parameter.ndim > 1:
                value.normal_(std=0.02)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)
    return model


def write_base(config: PretrainedConfig, folder: Path, device: str) -> None:
    """Write a random model's weights and configuration into the folder."""
    torch.manual_seed(0)
    model = random_model(config, device)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.quantization_config = QUANTIZATION.to_dict()
    config.save_pretrained(folder)


if __name__ == "__main__":
    _, _config, _folder, _device = sys.argv
    write_base(AutoConfig.from_pretrained(_config), Path(_folder), _device)
