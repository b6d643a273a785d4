"""Builds a job's model, with adapter and 4-bit layers, on tensors without data."""

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_api.memory.training_shape import Recomputation
from qlora_api.spec.resolved import ResolvedLora, ResolvedTraining
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.adapter.attach import attach_adapter
from qlora_trainer.model.architecture.text_part import text_part
from qlora_trainer.model.experts.compute import EXPERTS, register_experts
from qlora_trainer.model.experts.layout import ExpertLayout, routing_linears
from qlora_trainer.model.experts.quantizer import stack_experts
from qlora_trainer.model.experts.routers import route_without_autocast
from qlora_trainer.model.families.family import Family
from qlora_trainer.model.kernels.activations import fuse_activations
from qlora_trainer.model.kernels.attention import register_attention
from qlora_trainer.model.kernels.norms import fuse_norms
from qlora_trainer.model.nf4.quantization import BASE_DTYPE, BLOCK, OUTER_BLOCK
from qlora_trainer.model.protocols import AdaptedModel

_IN_4_BIT = "is_loaded_in_4bit"


def adapted_skeleton(
    config: PretrainedConfig,
    family: Family,
    lora: ResolvedLora,
    training: ResolvedTraining,
    quantization: QuantizationSpec,
) -> AdaptedModel:
    """The model on the meta device with its adapter and 4-bit layers."""
    register_attention()
    register_experts()
    model = text_part(config, dtype=BASE_DTYPE, attn_implementation=family.attention, experts_implementation=EXPERTS)
    kept = {id(model.get_submodule(name)) for name in routing_linears(model)} | {id(model.get_output_embeddings())}
    # transformers does not quantize what a family would have in 32 bit.
    wide = list(model._keep_in_fp32_modules or ())
    kept |= {id(module) for name, module in model.named_modules() if not should_convert_module(name, wide)}
    stack_experts(model, ExpertLayout.from_model(model), quantization, "meta")
    with torch.device("meta"):
        _quantize(model, kept, quantization)
    # PEFT asks for this before it makes a layer for 4-bit weights.
    setattr(model, _IN_4_BIT, True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    fuse_norms(model)
    fuse_activations(model)
    route_without_autocast(model)
    with torch.device("meta"):
        return attach_adapter(
            model.eval(),
            lora,
            family.target_modules,
            seed=training.seed,
            recomputation=Recomputation(None if training.gradient_checkpointing else 0),
            base_name="",
            base_revision="",
        )


class Linear4bitWithoutData(Linear4bit):
    """bitsandbytes' layer on a weight without data, which its parameter cannot hold."""

    def __init__(self, linear: nn.Linear, quantization: QuantizationSpec) -> None:
        # bitsandbytes' own would quantize, which needs data.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.compute_dtype, self.compute_type_is_set = BASE_DTYPE, True
        self.support_avx512bf16_for_cpu = False
        size = linear.weight.numel()
        weight: Any = nn.Parameter(torch.empty(-(-size // 2), 1, dtype=torch.uint8), requires_grad=False)
        weight.quant_state = self.quant_state = _quant_state(linear, size, quantization)
        weight.compress_statistics = quantization.double_quant
        weight.quant_type = quantization.type
        self.weight = weight

    # PEFT dequantizes bitsandbytes' own parameters, and by `dequantize` a layer that has a `W_q`.
    @property
    def W_q(self) -> Tensor:  # noqa: N802 - PEFT's name
        """The weight, packed."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight [outputs, inputs] in 16 bit."""
        return dequantize_4bit(self.weight.data, self.quant_state)


def _quant_state(linear: nn.Linear, size: int, quantization: QuantizationSpec) -> QuantState:
    blocks = -(-size // BLOCK)
    nested = None
    if quantization.double_quant:
        nested = QuantState(
            absmax=torch.empty(-(-blocks // OUTER_BLOCK)),
            blocksize=OUTER_BLOCK,
            code=torch.empty(OUTER_BLOCK),
            dtype=torch.float32,
        )
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.float32 if nested is None else torch.uint8),
        shape=linear.weight.shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type=quantization.type,
        dtype=BASE_DTYPE,
        offset=None if nested is None else torch.empty(()),
        state2=nested,
    )


def _quantize(module: nn.Module, kept: set[int], quantization: QuantizationSpec) -> None:
    """Replace each exact `nn.Linear`, as transformers does, but those `kept`."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and id(child) not in kept:
            setattr(module, name, Linear4bitWithoutData(child, quantization))
        else:
            _quantize(child, kept, quantization)
