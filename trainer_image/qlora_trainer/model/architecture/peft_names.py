"""Finds the layers whose names PEFT reads as those of other layers."""

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from qlora_trainer.model.protocols import Decoder


def taken_for_experts(model: Decoder, linears: tuple[str, ...]) -> frozenset[str]:
    """The linear layers whose names, as `target_modules`, PEFT takes for routed experts.

    It reads names such as `gate_proj` so wherever they are in the model, as files of older releases have them.
    """
    config = LoraConfig(target_modules=list(linears))
    convert_peft_config_for_transformers(config, model, None)
    return frozenset(linears).difference(config.target_modules or ())


def lost_by_peft(model: PreTrainedModel, linears: tuple[str, ...]) -> frozenset[str]:
    """The linear layers whose adapter PEFT renames when it reads it, as it does for older checkpoints."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    weights = {name: f"{name}.weight" for name in linears}
    return frozenset(name for name, weight in weights.items() if rename_source_key(weight, renamings, [])[0] != weight)
