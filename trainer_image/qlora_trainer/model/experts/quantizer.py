"""Keeps transformers from loading 4-bit experts, and from quantizing routers."""

from re import escape
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.experts.compute import expert_modules
from qlora_trainer.model.experts.layout import NO_EXPERTS, ExpertLayout, routing_linears
from qlora_trainer.model.protocols import Network
from qlora_trainer.model.source.quantization import EXPERTS_FORMAT

_METHOD = "qlora_4bit"
"""Loading without this module must fail, instead of giving random experts."""
_IN_4_BIT = "load_in_4bit"


@register_quantization_config(_METHOD)
class ExpertsConfig(BitsAndBytesConfig):
    """bitsandbytes' settings for a model whose experts are stacks, for transformers."""

    def __init__(self, **settings: object) -> None:
        """Take bitsandbytes' settings, and `experts`: "mxfp4" if stored in that format."""
        experts = settings.pop(EXPERTS_FORMAT, None)
        super().__init__(**settings | {_IN_4_BIT: True})
        self.quant_method = cast("Any", _METHOD)
        if experts is not None:
            setattr(self, EXPERTS_FORMAT, experts)

    def to_dict(self) -> dict[str, object]:
        """The settings for config.json, without the key of bitsandbytes' quantizer."""
        return {name: value for name, value in super().to_dict().items() if name.lstrip("_") != _IN_4_BIT}


@register_quantizer(_METHOD)
class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """Quantizes as bitsandbytes does, but leaves experts and routers out."""

    layout: ExpertLayout

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *settings: Any, **more: Any) -> None:
        self.layout = ExpertLayout.from_model(model)
        given = self.quantization_config
        stack_experts(
            model,
            self.layout,
            QuantizationSpec(type=given.bnb_4bit_quant_type, double_quant=given.bnb_4bit_use_double_quant),
            "meta",
        )
        # transformers does not load their tensors, and would warn.
        ignored = {escape(name) for name in self.layout.stacks}
        model._keys_to_ignore_on_load_unexpected = ignored | set(model._keys_to_ignore_on_load_unexpected or ())
        super()._process_model_before_weight_loading(model, *settings, **more)

    @staticmethod
    def get_modules_to_not_convert(model: PreTrainedModel, *settings: Any, **more: Any) -> list[str]:
        """Those of bitsandbytes, and routers."""
        return [*HfQuantizer.get_modules_to_not_convert(model, *settings, **more), *routing_linears(model)]


def stack_experts(
    model: nn.Module, layout: ExpertLayout, quantization: QuantizationSpec, device: torch.device | str
) -> None:
    """Replace the weights of routed experts by stacks without values."""
    for name, shape in layout.stacks.items():
        module, weight = holder(model, name)
        delattr(module, weight)
        setattr(module, weight, shape.stack(quantization, device))
    for _, module in expert_modules(model):
        # transformers would initialize the weights, which are no parameters any more.
        module._is_hf_initialized = True


def loaded_layout(model: PreTrainedModel) -> ExpertLayout:
    """The layout that a loaded model's experts had in it, or an empty one."""
    quantizer = model.hf_quantizer
    return quantizer.layout if isinstance(quantizer, ExpertsQuantizer) else NO_EXPERTS


def holder(model: Network, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or stack of this name, and its name there."""
    parent, _, last = name.rpartition(".")
    return model.get_submodule(parent), last
