"""Finds the layers whose names PEFT reads as those of other layers."""

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from qlora_trainer.model.protocols import Decoder


def taken_for_experts(model: Decoder, linears: tuple[str, ...]) -> frozenset[str]:
    """The linear layers whose names, as `target_modules`, PEFT takes for others.

    For files of older releases of transformers, PEFT reads some names, such as `gate_proj`, as those of routed experts,
    wherever in the model they are: also in the shared experts and the dense blocks of the same families.
    """
    config = LoraConfig(target_modules=list(linears))
    convert_peft_config_for_transformers(config, model, None)
    return frozenset(linears).difference(config.target_modules or ())


def lost_by_peft(model: PreTrainedModel, linears: tuple[str, ...]) -> frozenset[str]:
    """The linear layers whose adapter PEFT renames when it reads it, and then does not find.

    It renames an adapter's tensors as transformers renames those of older checkpoints: Laguna's `shared_expert` became
    `shared_experts`, and so would `shared_experts` become something else.
    """
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    weights = {name: f"{name}.weight" for name in linears}
    return frozenset(name for name, weight in weights.items() if rename_source_key(weight, renamings, [])[0] != weight)
