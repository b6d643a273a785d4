"""Reads the weights of a base model, in 4-bit or not, one tensor at a time and by their names in the loaded model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_trainer.core.failures import model_unavailable
from qlora_trainer.model.dequantization import correct_dequantization
from qlora_trainer.model.source import WEIGHTS, WEIGHTS_INDEX, weight_files


class BaseWeights:
    """The tensors of `model.safetensors`, or of the files that its index names. Each is read when it is needed."""

    def __init__(self, folder: Path, model: Any) -> None:
        """Read the files' headers. `model` is transformers' model for the folder, with weights or without.

        Raises StepFailure: MODEL_UNAVAILABLE if a file is missing or no safetensors file, UNSAFE_ARTIFACT if the index
        names a file elsewhere.
        """
        correct_dequantization()
        self._folder = folder
        self._stored: dict[str, tuple[Any, str]] = {}
        self._constants: dict[str, dict[str, Any]] = {}
        name_in_model = renaming(model)
        for file in chosen_files(folder):
            try:
                opened = cast("Any", safe_open(folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise model_unavailable(f"{folder / file} cannot be read: {error}") from error
            for stored in opened.keys():  # noqa: SIM118 - it is no dictionary
                name = name_in_model(stored)
                if name is not None:
                    self._stored[name] = (opened, stored)
                weight, _, constant = stored.partition(".weight.")
                if constant:
                    self._constants.setdefault(f"{weight}.weight", {})[constant] = opened

    def require(self, name: str) -> None:
        """Raise StepFailure MODEL_UNAVAILABLE unless there is a tensor of this name."""
        if name not in self._stored:
            raise model_unavailable(
                f"the weights in {self._folder} have no tensor for {name}: spec.lora.initialization: loftq needs each "
                "layer's weight as the model computes with it; leave it out, or name a model that stores it so"
            )

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as the model computes with it: as it is stored, or dequantized.

        Raises StepFailure MODEL_UNAVAILABLE if there is none of this name.
        """
        self.require(name)
        opened, stored = self._stored[name]
        tensor = cast("Tensor", opened.get_tensor(stored))
        if stored not in self._constants:
            return tensor
        constants = {key: file.get_tensor(f"{stored}.{key}") for key, file in self._constants[stored].items()}
        return dequantize_4bit(tensor, QuantState.from_dict(constants, torch.device("cpu")))


def renaming(model: Any) -> Callable[[str], str | None]:
    """A function from a tensor's name in a file to its name in the model; None for one that is not stored as a weight.

    It renames as transformers does when it loads: a checkpoint of the inner model lacks the inner model's name, and a
    multimodal one has older names for its parts.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    # With the names of buffers, which some families store under others too.
    names = dict.fromkeys(model.state_dict().keys() | dict(model.named_parameters(remove_duplicate=False)), True)

    def name_in_model(stored: str) -> str | None:
        name, computed = rename_source_key(stored, renamings, converters, model.base_model_prefix, names)
        if name not in names:
            return stored
        return name if computed is None else None

    return name_in_model


def chosen_files(folder: Path) -> list[str]:
    """The weights' files, as transformers chooses them."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise model_unavailable(f"{folder} holds neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    return weight_files(index.read_bytes(), [entry.name for entry in folder.iterdir()], str(folder))
