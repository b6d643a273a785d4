"""Reads the weights of a base model's folder one tensor at a time, by the names that they have in the loaded model."""

from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_trainer.failures import model_unavailable
from qlora_trainer.model_source import WEIGHTS, WEIGHTS_INDEX, weight_files


class BaseWeights:
    """The tensors of `model.safetensors`, or of the files that its index names. Each is read when it is asked for."""

    def __init__(self, folder: Path, base_prefix: str = "model") -> None:
        """Look at the files' headers. `base_prefix` is what a checkpoint without an output layer leaves out of names.

        Raises StepFailure: MODEL_UNAVAILABLE if a file is missing or no safetensors file, UNSAFE_ARTEFACT if the index
        names a file elsewhere.
        """
        self._folder, self._prefix = folder, f"{base_prefix}."
        self._files: dict[str, Any] = {}
        for file in _files(folder):
            try:
                opened = cast("Any", safe_open(folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise model_unavailable(f"{folder / file} cannot be read: {error}") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def require(self, name: str) -> str:
        """The stored name of a tensor. Raises StepFailure MODEL_UNAVAILABLE if there is none."""
        stored = next((known for known in (name, name.removeprefix(self._prefix)) if known in self._files), None)
        if stored is None:
            raise model_unavailable(
                f"the weights in {self._folder} have no tensor {name}: merging (spec.output.merged) and loftq need the "
                "names that transformers gives the model's layers; leave these out, or save the model with transformers"
            )
        return stored

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as it is stored. Raises StepFailure MODEL_UNAVAILABLE if there is none of this name."""
        stored = self.require(name)
        return cast("Tensor", self._files[stored].get_tensor(stored))


def _files(folder: Path) -> list[str]:
    """The weights' files, as transformers chooses them."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        raise model_unavailable(f"{folder} holds neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    return weight_files(index.read_bytes(), [entry.name for entry in folder.iterdir()], str(folder))
