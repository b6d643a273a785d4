"""Loads a model by its transformers class, without parts that text does not need."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from re import escape
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from qlora_trainer.core.paths import some_names
from qlora_trainer.model.errors import ModelError, explain_errors
from qlora_trainer.model.kernels.linear_attention import use_rows

# Published models of a type are loaded by the first that has it, and those of a single decoder by the first of all.
_TEXT = ((auto.AutoModelForCausalLM, auto.MODEL_FOR_CAUSAL_LM_MAPPING),)
_MULTIMODAL = (
    (auto.AutoModelForImageTextToText, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    (auto.AutoModelForMultimodalLM, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING),
)


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration has a text decoder among other parts."""
    return config.get_text_config(decoder=True) is not config


def auto_class(config: PretrainedConfig) -> type[_BaseAutoModelClass] | None:
    """The auto class that loads such a model whole, or None without one for text."""
    known = (*_MULTIMODAL, *_TEXT) if is_multimodal(config) else (*_TEXT, *_MULTIMODAL)
    return next((loader for loader, types in known if type(config) in types), None)


def without_weights(config: PretrainedConfig, **settings: object) -> PreTrainedModel:
    """The whole model on the meta device. Its configuration has an `auto_class`."""
    loader = cast("type[_BaseAutoModelClass]", auto_class(config))
    with torch.device("meta"):
        model = loader.from_config(config, trust_remote_code=False, **settings)
    use_rows(model)
    return model


def text_part(config: PretrainedConfig, **settings: object) -> PreTrainedModel:
    """The model `without_weights` as trained: of a multimodal one only the text part."""
    model = without_weights(config, **settings)
    with explain_errors("this trainer does not find the text decoder of the model that transformers builds"):
        _leave_text_part(model)
    return model


def random_text_part(config: PretrainedConfig, **settings: object) -> PreTrainedModel:
    """The model in main memory, initialized at random by transformers. Towers and projectors are zeros without memory.

    Raises ModelError if something outside the text decoder gets no values.
    """
    loader = cast("type[_BaseAutoModelClass]", auto_class(config))
    if not is_multimodal(config):
        model = loader.from_config(config, trust_remote_code=False, **settings)
        use_rows(model)
        return model
    model = without_weights(config, **settings)
    beside = {id(module) for name in parts_beside_text(model) for module in model.get_submodule(name).modules()}
    module: Any
    for module in model.modules():
        if id(module) in beside:
            module._apply(_zeros_without_memory, recurse=False).requires_grad_(False)
            module._is_hf_initialized = True
        else:
            module.to_empty(device="cpu", recurse=False)._apply(_unset, recurse=False)
    model.initialize_weights()
    model.tie_weights()
    _set_constants(model)
    return model


def _unset(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()


def _set_constants(model: PreTrainedModel) -> None:
    """Set constants that transformers does not initialize, such as those of xIELU."""
    decoder = model.get_decoder()
    constants = _unset_tensors(decoder)
    if constants:
        made = type(decoder)(decoder.config)
        values = dict(made.named_parameters()) | dict(made.named_buffers())
        for name, tensor in constants.items():
            tensor.detach().copy_(values[name])
    if left := _unset_tensors(model):
        raise ModelError(f"transformers does not initialize {some_names(left)} of a model of this type")


def _unset_tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    # Not of towers: inspecting their zeros would take memory.
    looked_at = {name: tensor for name, tensor in tensors.items() if tensor.untyped_storage().nbytes() >= tensor.nbytes}
    return {name: tensor for name, tensor in looked_at.items() if bool(tensor.isnan().any())}


def load_text_part(folder: Path, **settings: object) -> tuple[PreTrainedModel, Mapping[str, Collection[object]]]:
    """The model in `folder`, with `settings` for `from_pretrained`, and what transformers reports of its loading.

    Weights of `parts_beside_text` are not read. Raises OSError, without a number, if the folder has no model.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    loader: Any = _without_other_parts(config) if is_multimodal(config) else auto_class(config)
    loaded = loader.from_pretrained(
        folder,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **settings,
    )
    model, report = cast("tuple[PreTrainedModel, Mapping[str, Collection[object]]]", loaded)
    use_rows(model)
    return model, report


def parts_beside_text(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the towers and projectors of a multimodal model."""
    if not is_multimodal(model.config):
        return ()
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    of_text = {id(inner) for part in parts if part is not None for inner in part.modules()}
    return tuple(_outside(model, of_text))


def _zeros_without_memory(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


def _outside(module: nn.Module, kept: set[int], prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        if id(child) in kept or next(child.parameters(), None) is None:
            continue
        if kept.isdisjoint(map(id, child.modules())):
            yield f"{prefix}{name}"
        else:
            yield from _outside(child, kept, f"{prefix}{name}.")


def _leave_text_part(model: PreTrainedModel) -> tuple[str, ...]:
    removed = parts_beside_text(model)
    for name in removed:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, None)
    return removed


def _without_other_parts(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The model's class, changed to remove `parts_beside_text` before reading weights."""
    family: Any = next(types[type(config)] for _, types in (*_MULTIMODAL, *_TEXT) if type(config) in types)
    return type(family.__name__, (_TextPart, family), {"__module__": family.__module__})


class _TextPart:
    def __init__(self, *given: object, **settings: object) -> None:
        super().__init__(*given, **settings)
        model = cast("PreTrainedModel", self)
        removed = [f"^{escape(name)}\\." for name in _leave_text_part(model)]
        # Their weights are in the files, and transformers would warn of them.
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *removed}
