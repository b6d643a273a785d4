"""Loads the frozen base model in 4-bit and asserts what was loaded."""

from pathlib import Path

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import PreTrainedModel

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core import cpu
from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import StepFailure, bad_configuration, model_unavailable
from qlora_trainer.model.architecture.decoder import outer_parameters
from qlora_trainer.model.architecture.text_part import load_text_part
from qlora_trainer.model.base.artifact import MANIFEST
from qlora_trainer.model.base.chosen_layers import library_config
from qlora_trainer.model.experts.compute import EXPERTS, register_experts
from qlora_trainer.model.experts.loading import load_experts
from qlora_trainer.model.experts.routers import route_without_autocast
from qlora_trainer.model.experts.stack import ExpertStack, expert_stacks
from qlora_trainer.model.kernels.activations import fuse_activations
from qlora_trainer.model.kernels.attention import ATTENTION, register_attention
from qlora_trainer.model.kernels.norms import fuse_norms
from qlora_trainer.model.nf4.dequantization import correct_dequantization
from qlora_trainer.model.nf4.quantization import COMPUTE_DTYPE

MIN_QUANTIZED_FRACTION = 0.98
"""Least share of the blocks' parameters in 4-bit that `quantization` stands for."""


def load_base(
    folder: Path,
    quantization: QuantizationSpec,
    device: Device,
    storage_dtype: torch.dtype = torch.uint8,
    attention: str = ATTENTION,
) -> PreTrainedModel:
    """The base model of `folder` in 4-bit on the device, frozen and in evaluation mode. See `load_text_part`.

    The folder is what `BaseConversion` has made, or a model in 16 bit, which bitsandbytes then quantizes on the device.
    `storage_dtype` is that of the tensors that hold the packed weights, other than uint8 for a base that will be
    sharded; it changes no value. `attention` is the family's `attn_implementation`.
    Raises StepFailure: MODEL_UNAVAILABLE if a tensor is missing or has another shape, BAD_CONFIGURATION if what was
    loaded is not stored as `quantization` specifies.
    """
    register_attention()
    register_experts()
    correct_dequantization()
    in_4_bit = (folder / MANIFEST).is_file()
    try:
        model, report = load_text_part(
            folder,
            dtype=COMPUTE_DTYPE,
            attn_implementation=attention,
            experts_implementation=EXPERTS,
            device_map={"": torch.cuda.current_device() if device == "cuda" else "cpu"},
            **({} if in_4_bit else {"quantization_config": library_config(quantization, storage_dtype, experts=True)}),
        )
    except OSError as error:
        if error.errno is not None:
            raise
        # An error without a number is transformers' own: config.json or the weights are not in the folder.
        raise model_unavailable(f"the base model in {folder} cannot be loaded: {error}") from error
    missing = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in report.get(kind) or ())
    if missing:
        raise model_unavailable(
            f"the weights in {folder} do not fit config.json: {len(missing)} tensors are missing or have another "
            f"shape, first {missing[0]}"
        )
    load_experts(model, folder, quantization)
    copied = cpu.copies_mapped_weights(device, sharded=storage_dtype != torch.uint8)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if copied and (in_4_bit or not isinstance(parameter, Params4bit)):
            parameter.data = parameter.data.clone()
    for layer in _quantized_layers(model):
        layer.support_avx512bf16_for_cpu = cpu.REPACKS_4BIT_LAYERS
        if not (in_4_bit and isinstance(layer.weight, Params4bit)):
            continue
        if copied:
            _copy_constants(layer.weight.quant_state)
        if storage_dtype != torch.uint8:
            _view_as(layer.weight, storage_dtype)
    check_quantization(model, quantization)
    fuse_norms(model)
    fuse_activations(model)
    route_without_autocast(model)
    return model.eval()


def _quantized_layers(model: nn.Module) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _copy_constants(state: QuantState) -> None:
    """Take the constants of a layer out of the mapped file."""
    for owner in (state, state.state2) if state.nested else (state,):
        owner.absmax, owner.code = owner.absmax.clone(), owner.code.clone()


def _view_as(weight: Params4bit, dtype: torch.dtype) -> None:
    """Give the packed bytes another type, as bitsandbytes does for such a storage."""
    weight.data = weight.data.reshape(-1).view(dtype).unsqueeze(1)
    weight.quant_storage = dtype


def check_quantization(model: PreTrainedModel, quantization: QuantizationSpec) -> None:
    """Raise StepFailure unless 4-bit layers match, and hold 98 % of the parameters."""
    quantized = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        weight = layer.weight
        state = weight.quant_state if isinstance(weight, Params4bit) else None
        found = (
            None if state is None else state.quant_type,
            None if state is None else state.nested,
            layer.compute_dtype,
            layer.support_avx512bf16_for_cpu,
        )
        wanted = (quantization.type, quantization.double_quant, COMPUTE_DTYPE, cpu.REPACKS_4BIT_LAYERS)
        if state is None or found != wanted:
            raise _wrongly_loaded(
                model, f"{name} has (type, double quantization, computation, repacking) {found}, not {wanted}"
            )
        quantized += state.shape.numel()
    for name, stack in expert_stacks(model):
        if isinstance(stack, ExpertStack) and stack.quantization != quantization:
            raise _wrongly_loaded(model, f"{name} is quantized as {stack.quantization}")
        quantized += stack.parameters_count
    inner = quantized + _unquantized_inner_parameters(model)
    fraction = quantized / inner if inner else 0.0
    if fraction < MIN_QUANTIZED_FRACTION:
        raise _wrongly_loaded(
            model,
            f"only {fraction:.1%} of the parameters outside the embeddings are in 4-bit, "
            f"not {MIN_QUANTIZED_FRACTION:.0%}",
        )


def _unquantized_inner_parameters(model: PreTrainedModel) -> int:
    outer = outer_parameters(model)
    return sum(p.numel() for p in model.parameters() if not isinstance(p, Params4bit) and id(p) not in outer)


def _wrongly_loaded(model: PreTrainedModel, what: str) -> StepFailure:
    return bad_configuration(f"model_type {model.config.model_type!r} was not loaded as spec.quantization says: {what}")
