"""Reads the weights of a base model's folder one tensor at a time, by the names that they have in the loaded model."""

import json
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_trainer.failures import model_unavailable

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class BaseWeights:
    """The tensors of `model.safetensors`, or of the files that its index names. Each is read when it is asked for."""

    def __init__(self, folder: Path, base_prefix: str = "model") -> None:
        """Look at the files' headers. `base_prefix` is what a checkpoint without an output layer leaves out of names.

        Raises StepFailure MODEL_UNAVAILABLE if a file is missing or no safetensors file.
        """
        self._folder, self._prefix = folder, f"{base_prefix}."
        self._files = {}
        for file in _files(folder):
            try:
                opened = cast("Any", safe_open(folder / file, framework="pt"))
            except (FileNotFoundError, SafetensorError) as error:
                raise model_unavailable(f"{folder / file} cannot be read: {error}") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: str) -> bool:
        return self._stored(name) is not None

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as it is stored. Raises StepFailure MODEL_UNAVAILABLE if there is none of this name."""
        stored = self._stored(name)
        if stored is None:
            raise model_unavailable(
                f"the weights in {self._folder} have no tensor {name}: their names are not those of the model's layers "
                "in transformers, which merging and loftq need"
            )
        return cast("Tensor", self._files[stored].get_tensor(stored))

    def _stored(self, name: str) -> str | None:
        return next((known for known in (name, name.removeprefix(self._prefix)) if known in self._files), None)


def _files(folder: Path) -> list[str]:
    """The weights' files, as transformers chooses them."""
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    try:
        return sorted(set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values()))
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise model_unavailable(f"{folder} holds neither {_SINGLE} nor a usable {_INDEX}: {error}") from error
