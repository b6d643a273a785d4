"""Finds the text decoder of a model, its blocks, linear layers and embeddings, and their names in PEFT."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, cast

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.experts.layout import routing_linears
from qlora_trainer.model.kernels.attention import RowBoundaries
from qlora_trainer.model.protocols import Decoder


def decoder_blocks(model: Decoder) -> nn.ModuleList:
    """The blocks of a model's text decoder. Raises ModelError if it has none."""
    number = model.config.get_text_config(decoder=True).num_hidden_layers
    for child in model.get_decoder().children():
        if isinstance(child, nn.ModuleList) and len(child) == number:
            return child
    raise ModelError("this trainer does not find its decoder blocks, whose layers would get the adapter")


def block_linears(model: Decoder) -> tuple[str, ...]:
    """Sorted names of the linear layers in the blocks, without head or routers."""
    inside = {id(module) for module in decoder_blocks(model).modules() if isinstance(module, nn.Linear)}
    names = {name for name, module in model.named_modules() if id(module) in inside}
    return tuple(sorted(names.difference(routing_linears(model))))


def block_structures(model: Decoder) -> frozenset[frozenset[str]]:
    """Modules with their classes, and parameters, of each kind of block."""
    return frozenset(
        frozenset(re.sub(r"\b\d+\b", "*", part) for part in _parts(block)) for block in decoder_blocks(model)
    )


def _parts(block: nn.Module) -> Iterator[str]:
    for name, module in block.named_modules():
        yield f"{name or 'block'} ({type(module).__name__})"
    for name, _ in block.named_parameters():
        yield name


def place_in_block(name: str) -> tuple[int, str]:
    """The block's number of a linear layer, and its name inside the block."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        raise ValueError(f"{name} is not inside a block")
    return int(found[1]), name[found.end() :]


def decoder_states(model: Decoder, input_ids: Tensor, position_ids: Tensor, rows: RowBoundaries) -> Tensor:
    """The decoder's last states, [1, tokens, hidden size], of rows of tokens [1, tokens] that follow one another.

    A decoder that takes no positions or no other arguments computes them for a single row.
    """
    decoder = model.get_decoder()
    arguments = {"input_ids": input_ids, "position_ids": position_ids, "rows": rows, "use_cache": False}
    accepted = inspect.signature(decoder.forward).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        arguments = {name: value for name, value in arguments.items() if name in accepted}
    return cast("Tensor", decoder(**arguments).last_hidden_state)


def compute_as_in_use(model: Decoder) -> None:
    """Turn off what a family does in training mode only: the frozen base computes as in use.

    That is every dropout, the noise of routers (Mixtral's jitter), and the clipping of weights by Gemma 3n, which would
    take packed weights for numbers. Call it before the model has an adapter, whose dropout stays.
    """
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _without_dropout(vars(module))
        if getattr(module, "jitter_noise", 0):
            module.jitter_noise = 0.0
    # In its dictionary, because the field's declared type allows no None, which the layers ask for.
    settings = vars(model.config.get_text_config(decoder=True))
    _without_dropout(settings)
    if "altup_coef_clip" in settings:
        settings["altup_coef_clip"] = None


def _without_dropout(settings: dict[str, object]) -> None:
    """Set each probability of dropout to 0, under any family's name for it."""
    settings.update({name: 0.0 for name, value in settings.items() if "drop" in name and isinstance(value, float)})


def outer_parameters(model: Decoder) -> set[int]:
    """The ids of all parameters in embeddings and in the output layer."""
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    return {id(parameter) for module in (*modules, head) if module is not None for parameter in module.parameters()}


def taken_for_experts(model: Decoder, linears: tuple[str, ...]) -> frozenset[str]:
    """The linear layers whose names PEFT takes for routed experts."""
    config = LoraConfig(target_modules=list(linears))
    convert_peft_config_for_transformers(config, model, None)
    return frozenset(linears).difference(config.target_modules or ())


def lost_by_peft(model: PreTrainedModel, linears: tuple[str, ...]) -> frozenset[str]:
    """The linear layers whose adapter PEFT renames when it reads it."""
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    weights = {name: f"{name}.weight" for name in linears}
    return frozenset(name for name, weight in weights.items() if rename_source_key(weight, renamings, [])[0] != weight)
