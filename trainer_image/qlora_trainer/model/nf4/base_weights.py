"""Reads a base model's weights, one tensor at a time, by their names in the model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from re import search
from typing import cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming, rename_source_key

from qlora_trainer.core.failures import model_unavailable
from qlora_trainer.core.protocols import TensorFile
from qlora_trainer.model.nf4.dequantization import correct_dequantization
from qlora_trainer.model.source.files import WEIGHTS, WEIGHTS_INDEX, weight_files


@dataclass(frozen=True)
class StoredName:
    """The place of a file's tensor in the model."""

    name: str
    """The parameter or buffer, or else a name that the model does not have."""
    piece: int = 0
    """The tensor's number among those whose rows follow one another in the parameter."""
    pieces: int = 1


class BaseWeights:
    """The tensors of `model.safetensors`, or of an index's files, read when needed."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Read the files' headers. `model` is transformers' model for the folder, with weights or without.

        Raises StepFailure: MODEL_UNAVAILABLE if a file is missing or no safetensors file, UNSAFE_ARTIFACT if the index
        names a file elsewhere.
        """
        correct_dequantization()
        self._folder = folder
        self._stored: dict[str, dict[int, tuple[TensorFile[Tensor], str]]] = {}
        self._constants: dict[str, dict[str, TensorFile[Tensor]]] = {}
        name_in_model = renaming(model)
        for file in chosen_files(folder):
            try:
                opened = cast("TensorFile[Tensor]", safe_open(folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise model_unavailable(f"{folder / file} cannot be read: {error}") from error
            for stored in opened.keys():  # noqa: SIM118 - it is no dictionary
                place = name_in_model(stored)
                if place is not None:
                    self._stored.setdefault(place.name, {})[place.piece] = (opened, stored)
                weight, _, constant = stored.partition(".weight.")
                if constant:
                    self._constants.setdefault(f"{weight}.weight", {})[constant] = opened

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._stored

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as the model computes with it: as it is stored, or dequantized.

        Raises StepFailure MODEL_UNAVAILABLE if there is none of this name.
        """
        if name not in self:
            raise model_unavailable(f"the weights in {self._folder} have no tensor for {name}: create the job again")
        pieces = [self._dequantize(*self._stored[name][piece]) for piece in sorted(self._stored[name])]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _dequantize(self, opened: TensorFile[Tensor], stored: str) -> Tensor:
        tensor = opened.get_tensor(stored)
        if stored not in self._constants:
            return tensor
        constants = {key: file.get_tensor(f"{stored}.{key}") for key, file in self._constants[stored].items()}
        return dequantize_4bit(tensor, QuantState.from_dict(constants, torch.device("cpu")))


def renaming(model: PreTrainedModel) -> Callable[[str], StoredName | None]:
    """A function from a tensor's name in a file to its place in the model.

    It renames as transformers does when it loads: a checkpoint of the inner model lacks the inner model's name, and a
    multimodal one has older names for its parts. The function returns None for a tensor if transformers computes its
    weight by more than putting pieces together.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    # With the names of buffers, which some families store under others too.
    names = dict.fromkeys(model.state_dict().keys() | dict(model.named_parameters(remove_duplicate=False)), True)

    def name_in_model(stored: str) -> StoredName | None:
        name, source = rename_source_key(stored, renamings, converters, model.base_model_prefix, names)
        if name not in names:
            return StoredName(stored)
        if source is None:
            return StoredName(name)
        converter = next(entry for entry in converters if source in entry.source_patterns)
        sources = list(converter.source_patterns)
        return StoredName(name, sources.index(source), len(sources)) if _joins_rows(converter) else None

    return name_in_model


def _joins_rows(converter: WeightConverter) -> bool:
    """Whether it puts the rows of several tensors one below the other."""
    operations = list(converter.operations)
    return len(operations) == 1 and type(operations[0]) is Concatenate and operations[0].dim == 0


def reason_against_storage(model: PreTrainedModel) -> str | None:
    """Why a model whose layers' weights are stored in another form than it computes with cannot be kept in 4-bit.

    `model` is without weights. None if each of its linear layers has a separate weight in a checkpoint.
    """
    weights = [f".{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear]
    for entry in get_model_conversion_mapping(model):
        for target in entry.target_patterns if isinstance(entry, WeightConverter) else ():
            ending = f".{target.removesuffix('.weight').lstrip('.')}.weight"
            name = next((name[1:] for name in weights if name.endswith(ending)), None)
            if name is not None:
                return f"its checkpoints store {name} together with others, which are not taken apart here"
    return None


def reason_against_stored_parts(model: PreTrainedModel, parts: Iterable[str]) -> str | None:
    """Why modules of these names, such as towers, cannot be kept as they are stored, or None if they can.

    `model` is the whole one, without weights.
    """
    prefixes = tuple(f"{part}." for part in parts)
    names = [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    for entry in get_model_conversion_mapping(model):
        if isinstance(entry, WeightConverter) and not _joins_rows(entry):
            name = next((name for name in names if any(search(target, name) for target in entry.target_patterns)), None)
            if name is not None:
                return (
                    f"its checkpoints store {name} in another form than the model computes with, which is not read here"
                )
    return None


def chosen_files(folder: Path) -> list[str]:
    """The weights' files, as transformers chooses them."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise model_unavailable(f"{folder} holds neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    return weight_files(index.read_bytes(), [entry.name for entry in folder.iterdir()], str(folder))
