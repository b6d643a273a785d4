"""Attaches a LoRA adapter to the base model, and saves and restores its tensors."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_api.memory.training_shape import RECOMPUTE_ALL, Recomputation
from qlora_api.spec.resolved import ResolvedLora
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from qlora_trainer.model.architecture.decoder import block_linears, compute_as_in_use, decoder_blocks, taken_for_experts
from qlora_trainer.model.kernels.float32_lora import compute_lora_in_float32
from qlora_trainer.model.kernels.fused_lora import fuse_further_lora, fuse_lora, mark_recomputed
from qlora_trainer.model.nf4.computation import compute_dtype
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
from qlora_trainer.model.protocols import AdaptedModel, Decoder

ADAPTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def attach_adapter(
    base: Decoder,
    lora: ResolvedLora,
    target_modules: tuple[str, ...],
    *,
    seed: int,
    recomputation: Recomputation,
    base_name: str,
    base_revision: str,
) -> AdaptedModel:
    """The base with a LoRA adapter on `target_modules` (exact names), in training mode. Only the adapter has gradients.

    A is drawn from `seed` (Kaiming uniform), B is 0, so training starts from the base model's own loss.
    `recomputation`: of blocks in backward passes.
    """
    compute_as_in_use(base)
    torch.manual_seed(seed)
    config = _configuration(base, lora, target_modules)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    _name_origin(config, base, target_modules, base_name, base_revision)
    _set_types(model, lora)
    fuse_lora(model, recomputed=False)
    if recomputation.blocks != 0:
        recompute_activations(model, recomputation)
    return model.train()


def recompute_activations(model: AdaptedModel, recomputation: Recomputation = RECOMPUTE_ALL) -> None:
    """Recompute blocks in backward passes from now on, with the same bits.

    The first ones: they are recomputed last, when the others' activations are freed.
    """
    base, blocks = model.get_base_model(), recomputation.blocks
    # Without re-entry gradients reach the adapters although the embeddings have none.
    base.activation_checkpointing_enable({"use_reentrant": False}, offload=recomputation.offloads)
    all_blocks = decoder_blocks(base)
    for block in all_blocks[:blocks]:
        mark_recomputed(block)
    for block in all_blocks[len(all_blocks) if blocks is None else blocks :]:
        for module in block.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = False


def adapter_name(position: int) -> str:
    """Name one of several adapters, as no part of another name."""
    return f"adapter{position:03}" if position else "default"


def attach_further_adapter(
    model: AdaptedModel,
    name: str,
    lora: ResolvedLora,
    target_modules: tuple[str, ...],
    *,
    seed: int,
    base_name: str,
    base_revision: str,
) -> None:
    """Attach another adapter, as `attach_adapter` does, and activate it."""
    torch.manual_seed(seed)
    base = model.get_base_model()
    config = _configuration(base, lora, target_modules)
    model.add_adapter(name, config, autocast_adapter_dtype=False)
    fuse_further_lora(model)
    _name_origin(config, base, target_modules, base_name, base_revision)
    activate_adapter(model, name)
    _set_types(model, lora)


def _set_types(model: AdaptedModel, lora: ResolvedLora) -> None:
    """Store the adapter's parameters in their types. Whole modules compute, as the base's do."""
    whole = compute_dtype(model)
    for name, parameter in adapter_parameters(model).items():
        parameter.data = parameter.data.to(tensor_dtype(name, lora) if _is_lora(name) else whole)
    if whole == torch.float32:
        compute_lora_in_float32(model)


def activate_adapter(model: AdaptedModel, name: str) -> None:
    """Activate one of several adapters. All keep their gradients."""
    model.set_adapter(name)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for layers in (module.lora_A, module.lora_B):
                layers.requires_grad_(True)


def _configuration(base: Decoder, lora: ResolvedLora, target_modules: tuple[str, ...]) -> LoraConfig:
    modules, parameters = peft_targets(base, target_modules)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(modules),
        target_parameters=list(parameters) or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(whole_modules(base, lora)) or None,
    )


def _name_origin(config: LoraConfig, base: Decoder, target_modules: tuple[str, ...], name: str, revision: str) -> None:
    """Name the base and all targets, which PEFT shortens to suffixes."""
    modules, parameters = peft_targets(base, target_modules)
    config.base_model_name_or_path, config.revision = name, revision
    config.target_modules, config.target_parameters = set(modules), set(parameters) or None


def peft_targets(model: Decoder, layers: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split the layers into `target_modules` and `target_parameters` of PEFT."""
    # Of a model that has adapters already, the layers that they adapt are inside PEFT's.
    linears = tuple(name.removesuffix(".base_layer") for name in block_linears(model))
    taken = taken_for_experts(model, linears)
    modules = tuple(name for name in layers if name not in taken)
    return modules, tuple(f"{name}.weight" for name in layers if name in taken)


def whole_modules(model: Decoder, lora: ResolvedLora) -> tuple[str, ...]:
    """Paths in the model of the modules in spec.lora.modulesToSave."""
    modules = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    paths = {id(module): path for path, module in model.named_modules()}
    return tuple(sorted(paths[id(modules[kind])] for kind in lora.modules_to_save or ()))


def tensor_dtype(name: str, lora: ResolvedLora) -> torch.dtype:
    """The type of a tensor in the adapter's file: 16 bit for whole modules."""
    return ADAPTER_DTYPES[lora.dtype] if _is_lora(name) else BASE_DTYPE


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def adapter_parameters(model: AdaptedModel) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in the adapter's file, sorted."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = get_peft_model_state_dict(
        model, state_dict=trained, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    return dict(sorted(named.items()))


def adapter_tensors(model: AdaptedModel) -> dict[str, Tensor]:
    """A copy of the adapter's tensors in main memory, as they are trained."""
    parameters = adapter_parameters(model).items()
    return {name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in parameters}


def restore_adapter(model: AdaptedModel, tensors: Mapping[str, Tensor]) -> None:
    """Restore the adapter's tensors. Raises KeyError for those of another adapter."""
    parameters = adapter_parameters(model)
    if parameters.keys() != tensors.keys():
        raise KeyError(f"the saved adapter has other tensors: {sorted(parameters.keys() ^ tensors.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def save_adapter(model: AdaptedModel, folder: Path) -> None:
    """Write the adapter's two files into `folder`. Equal adapters give equal bytes."""
    tensors = {
        name: tensor if _is_lora(name) else tensor.to(BASE_DTYPE) for name, tensor in adapter_tensors(model).items()
    }
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = model.peft_config[model.active_adapter].to_dict() | {"inference_mode": True}
    if config["target_parameters"]:
        # On a base in 16 bit PEFT loads such an adapter only without dropout, which has no effect in use.
        config["lora_dropout"] = 0.0
    # Sets, in sorted order.
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
    (folder / ADAPTER_CONFIG_FILE).write_text(text + "\n")
