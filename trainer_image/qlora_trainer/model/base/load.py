"""Loads the frozen base model in 4-bit, asserts what was loaded, and counts its bytes."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core import cpu
from qlora_trainer.core.completion import QuantizedLayers
from qlora_trainer.core.context import Device
from qlora_trainer.core.cpu import ComputeType
from qlora_trainer.core.failures import StepFailure, bad_configuration, model_unavailable
from qlora_trainer.model.architecture.decoder import outer_parameters
from qlora_trainer.model.architecture.text_part import load_text_part
from qlora_trainer.model.base.artifact import MANIFEST
from qlora_trainer.model.base.chosen_layers import library_config
from qlora_trainer.model.experts.compute import EXPERTS, register_experts
from qlora_trainer.model.experts.loading import StoredExperts
from qlora_trainer.model.experts.quantizer import loaded_layout, stack_experts
from qlora_trainer.model.experts.routers import route_without_autocast
from qlora_trainer.model.experts.stack import ExpertStack, Stack, expert_stacks
from qlora_trainer.model.kernels.activations import fuse_activations
from qlora_trainer.model.kernels.attention import ATTENTION, register_attention
from qlora_trainer.model.kernels.norms import fuse_norms
from qlora_trainer.model.nf4.computation import COMPUTE_DTYPES
from qlora_trainer.model.nf4.dequantization import correct_dequantization
from qlora_trainer.model.nf4.quantization import BASE_DTYPE, layer_bytes

MIN_QUANTIZED_FRACTION = 0.98
"""Least share of the blocks' parameters in 4-bit that `quantization` stands for."""


def load_base(
    folder: Path,
    quantization: QuantizationSpec,
    device: Device,
    storage_dtype: torch.dtype = torch.uint8,
    attention: str = ATTENTION,
    compute_type: ComputeType = "bfloat16",
) -> PreTrainedModel:
    """The base model of `folder` in 4-bit on the device, frozen and in evaluation mode. See `load_text_part`.

    The folder is what `BaseConversion` has made, or a model in 16 bit, which bitsandbytes then quantizes on the device.
    `storage_dtype` of the packed weights is not uint8 for a base that will be sharded; it changes no value. The routed
    experts of such a base have no data yet.
    `compute_type`: what weights are dequantized to and matmuls computed in. The bytes of the base are the same.
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
            dtype=BASE_DTYPE,
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
    sharded = storage_dtype != torch.uint8
    if sharded:
        # transformers has given them memory.
        stack_experts(model, loaded_layout(model), quantization, "meta")
    else:
        StoredExperts.from_folder(model, folder, quantization).load(model, model, model.device)
    copied = cpu.copies_mapped_weights(device, sharded=sharded)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if copied and (in_4_bit or not isinstance(parameter, Params4bit)):
            parameter.data = parameter.data.clone()
    for layer in [module for module in model.modules() if isinstance(module, Linear4bit)]:
        layer.support_avx512bf16_for_cpu = cpu.REPACKS_4BIT_LAYERS
        if not (in_4_bit and isinstance(layer.weight, Params4bit)):
            continue
        if copied:
            _copy_constants(layer.weight.quant_state)
        if sharded:
            # As bitsandbytes does for such a storage.
            layer.weight.data = layer.weight.data.reshape(-1).view(storage_dtype).unsqueeze(1)
            layer.weight.quant_storage = storage_dtype
    check_quantization(model, quantization)
    if compute_type != "bfloat16":
        _compute_in(model, COMPUTE_DTYPES[compute_type])
    fuse_norms(model)
    fuse_activations(model)
    route_without_autocast(model)
    return model.eval()


def _compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Widen all that is in 16 bit, and make 4-bit layers dequantize to this type and compute in it."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = dtype
        # A stack's tables are read in 16 bit, which holds their values exactly.
        if not isinstance(module, Stack):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.dtype == BASE_DTYPE:
                    tensor.data = tensor.data.to(dtype)


def _copy_constants(state: QuantState) -> None:
    """Take the constants of a layer out of the mapped file."""
    for owner in (state, state.state2) if state.nested else (state,):
        owner.absmax, owner.code = owner.absmax.clone(), owner.code.clone()


def check_quantization(model: PreTrainedModel, quantization: QuantizationSpec) -> None:
    """Raise StepFailure unless 4-bit layers match, and hold 98 % of the parameters."""
    quantized = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        state = layer.weight.quant_state if isinstance(layer.weight, Params4bit) else None
        kind = (None, None) if state is None else (state.quant_type, state.nested)
        found = (*kind, layer.compute_dtype, layer.support_avx512bf16_for_cpu)
        wanted = (quantization.type, quantization.double_quant, BASE_DTYPE, cpu.REPACKS_4BIT_LAYERS)
        if state is None or found != wanted:
            raise _wrongly_loaded(
                model, f"{name} has (type, double quantization, computation, repacking) {found}, not {wanted}"
            )
        quantized += state.shape.numel()
    for name, stack in expert_stacks(model):
        if isinstance(stack, ExpertStack) and stack.quantization != quantization:
            raise _wrongly_loaded(model, f"{name} is quantized as {stack.quantization}")
        quantized += stack.parameters_count
    outer = outer_parameters(model)
    inner = quantized + sum(
        p.numel() for p in model.parameters() if not isinstance(p, Params4bit) and id(p) not in outer
    )
    fraction = quantized / inner if inner else 0.0
    if fraction < MIN_QUANTIZED_FRACTION:
        raise _wrongly_loaded(
            model,
            f"only {fraction:.1%} of the parameters outside the embeddings are in 4-bit, "
            f"not {MIN_QUANTIZED_FRACTION:.0%}",
        )


def _wrongly_loaded(model: PreTrainedModel, what: str) -> StepFailure:
    return bad_configuration(f"model_type {model.config.model_type!r} was not loaded as spec.quantization says: {what}")


@dataclass(frozen=True)
class Storage:
    """The 4-bit weights of a model."""

    layers: tuple[QuantizedLayers, ...]
    """By kind, in the order in which the model has the first of each."""

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(kind.count * prod(kind.shape) for kind in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of the weights, constants and tables included."""
        return sum(kind.count * kind.bytes_each for kind in self.layers)

    @property
    def bits_per_parameter(self) -> float:
        """Bits per weight, or 0 without weights."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def storage_of(model: nn.Module) -> Storage:
    """The 4-bit weights of a model. Raises StepFailure for an unknown format."""
    counts: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    for name, weight in model.named_parameters():
        if not isinstance(weight, Params4bit):
            continue
        state: QuantState = weight.quant_state
        found = sum(tensor.nbytes for tensor in (weight.data, *_tensors(state)))
        expected = layer_bytes(state.shape.numel(), double_quant=state.nested)
        if found != expected:
            raise bad_configuration(
                f"{name} takes {found} bytes and {expected} are what {state.shape.numel()} weights of type "
                f"{state.quant_type} take: this bitsandbytes stores them in another format"
            )
        kind = name.removesuffix(".weight").rpartition(".")[2]
        counts[kind, tuple(state.shape), found] += 1
    for name, stack in expert_stacks(model):
        if stack.bytes != stack.expected_bytes:
            raise bad_configuration(f"{name} takes {stack.bytes} bytes, not {stack.expected_bytes}")
        counts[name.rpartition(".")[2], stack.shape, stack.bytes] += 1
    layers = (
        QuantizedLayers(name=kind, shape=shape, count=count, bytes_each=size)
        for (kind, shape, size), count in counts.items()
    )
    return Storage(tuple(layers))


def _tensors(state: QuantState) -> list[Tensor]:
    own = [state.absmax, state.code]
    return [*own, state.offset, *_tensors(state.state2)] if state.nested else own
