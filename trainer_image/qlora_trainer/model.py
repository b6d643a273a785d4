"""The model that is trained: the 4-bit base, asserted after loading, and its adapter; changes with the libraries.

The base is frozen as loaded: norms and embeddings stay in bfloat16, where PEFT's preparation would copy them to 32 bit
(5 GB more at 65B). Nothing is fetched: files come from a local folder, safetensors only, and no code of the model runs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_api.training import LoraSpec, QuantizationSpec
from qlora_trainer.attention import ATTENTION, register_attention
from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import StepFailure, bad_configuration, model_unavailable
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from qlora_trainer.family import MIN_QUANTIZED_FRACTION
from qlora_trainer.fused_lora import fuse_lora
from qlora_trainer.loftq import initialize_loftq
from qlora_trainer.weights import BaseWeights

COMPUTE_DTYPE = torch.bfloat16
ADAPTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_base(
    folder: Path, quantization: QuantizationSpec, device: Device, storage_dtype: torch.dtype = torch.uint8
) -> Any:
    """The base model of `folder` in 4 bit on the device, frozen and in evaluation mode.

    `storage_dtype` is that of the tensors into which the packed weights are put; it changes no value.
    Raises StepFailure: MODEL_UNAVAILABLE if a tensor is missing or has another shape, BAD_CONFIGURATION if what was
    loaded is not held as `quantization` says.
    """
    register_attention()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quantization.type,
                bnb_4bit_use_double_quant=quantization.double_quant,
                bnb_4bit_compute_dtype=COMPUTE_DTYPE,
                bnb_4bit_quant_storage=storage_dtype,
            ),
            dtype=COMPUTE_DTYPE,
            attn_implementation=ATTENTION,
            device_map={"": torch.cuda.current_device() if device == "cuda" else "cpu"},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except OSError as error:
        if error.errno is not None:
            raise
        # transformers says so when config.json or the weights are not in the folder.
        raise model_unavailable(f"the base model in {folder} cannot be loaded: {error}") from error
    missing = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in report.get(kind) or ())
    if missing:
        raise model_unavailable(
            f"the weights in {folder} do not fit config.json: {len(missing)} tensors are missing or have another "
            f"shape, first {missing[0]}"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if device == "cpu" and storage_dtype == torch.uint8 and not isinstance(parameter, Params4bit):
            # It lies in the mapped file, all of which stays in memory, the 16-bit weights too, as long as a part does.
            # (A base with another storage is about to be spread over GPUs, and leaves main memory anyway.)
            parameter.data = parameter.data.clone()
    for layer in _quantized_layers(model):
        # On CPUs with AVX512-BF16 the first evaluation would repack the weights for a path without gradients.
        layer.support_avx512bf16_for_cpu = False
    check_quantization(model, quantization)
    return model.eval()


def _quantized_layers(model: nn.Module) -> list[Linear4bit]:
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def check_quantization(model: Any, quantization: QuantizationSpec) -> None:
    """Raise StepFailure unless every 4-bit layer is of the type asked for and they are 98 % of the inner parameters."""
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
        wanted = (quantization.type, quantization.double_quant, COMPUTE_DTYPE, False)
        if state is None or found != wanted:
            raise _wrongly_loaded(
                model, f"{name} has (type, double quantization, computation, repacking) {found}, not {wanted}"
            )
        quantized += state.shape.numel()
    inner = quantized + _unquantized_inner_parameters(model)
    fraction = quantized / inner if inner else 0.0
    if fraction < MIN_QUANTIZED_FRACTION:
        raise _wrongly_loaded(
            model,
            f"only {fraction:.1%} of the parameters outside the embeddings are in 4 bit, "
            f"not {MIN_QUANTIZED_FRACTION:.0%}",
        )


def _unquantized_inner_parameters(model: Any) -> int:
    head = model.get_output_embeddings()
    outer = {
        id(p) for module in (model.get_input_embeddings(), head) if module is not None for p in module.parameters()
    }
    return sum(p.numel() for p in model.parameters() if not isinstance(p, Params4bit) and id(p) not in outer)


def _wrongly_loaded(model: Any, what: str) -> StepFailure:
    return bad_configuration(f"model_type {model.config.model_type!r} was not loaded as spec.quantization says: {what}")


def attach_adapter(
    base: Any,
    lora: LoraSpec,
    target_modules: tuple[str, ...],
    *,
    seed: int,
    gradient_checkpointing: bool,
    base_name: str,
    base_revision: str,
    original: BaseWeights | None = None,
) -> Any:
    """The base with a LoRA adapter on `target_modules` (exact names), in training mode; only the adapter has gradients.

    A is drawn from `seed` (Kaiming uniform), B is 0, so training starts from the base model's own loss. With LoftQ
    they are computed from the `original` weights; without these they are to be restored.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        revision=base_revision,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(target_modules),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(whole_modules(base, lora)) or None,
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    # PEFT puts the folder that the base was loaded from here, which means nothing elsewhere, and shortens long lists of
    # targets to endings.
    config.base_model_name_or_path = base_name
    config.target_modules = set(target_modules)
    if lora.initialization == "loftq" and original is not None:
        initialize_loftq(model, original)
    for name, parameter in adapter_parameters(model).items():
        parameter.data = parameter.data.to(tensor_dtype(name, lora))
    fuse_lora(model, recomputed=gradient_checkpointing)
    if gradient_checkpointing:
        # Without re-entry gradients reach the adapters although the embeddings have none.
        base.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def whole_modules(model: Any, lora: LoraSpec) -> tuple[str, ...]:
    """Paths in the model of what spec.lora.modulesToSave names, whatever the family calls it."""
    modules = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    paths = {id(module): path for path, module in model.named_modules()}
    return tuple(sorted(paths[id(modules[kind])] for kind in lora.modules_to_save or ()))


def tensor_dtype(name: str, lora: LoraSpec) -> torch.dtype:
    """The type of a tensor of the adapter's file: what is trained whole keeps the base's 16 bit."""
    return ADAPTER_DTYPES[lora.dtype] if ".lora_" in name else COMPUTE_DTYPE


def adapter_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The trained parameters by the name that they have in the adapter's file, sorted."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    named = get_peft_model_state_dict(
        model, state_dict=trained, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    return dict(sorted(named.items()))


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors in main memory, as they go into its file."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in adapter_parameters(model).items()}


def restore_adapter(model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Put saved tensors into the adapter. Raises KeyError if they are of another adapter."""
    parameters = adapter_parameters(model)
    if parameters.keys() != tensors.keys():
        raise KeyError(f"the saved adapter has other tensors: {sorted(parameters.keys() ^ tensors.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter's two files into `folder`, which exists. The same adapter gives the same bytes."""
    save_file(adapter_tensors(model), folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = model.peft_config[model.active_adapter].to_dict() | {"inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    (folder / ADAPTER_CONFIG_FILE).write_text(text + "\n")


def _plain(value: Any) -> Any:
    """JSON for what PEFT keeps in its configuration; a set's order would depend on the hash seed."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be written to {ADAPTER_CONFIG_FILE}")
