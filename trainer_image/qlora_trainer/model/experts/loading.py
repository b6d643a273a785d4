"""Loads routed experts as 4-bit stacks, matrix by matrix. transformers loads the rest."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeAlias, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import model_unavailable
from qlora_trainer.core.paths import some_names
from qlora_trainer.core.protocols import TensorFile
from qlora_trainer.model.experts.layout import ExpertLayout, Place, StackShape, entry_name, matrices
from qlora_trainer.model.experts.quantizer import holder, loaded_layout
from qlora_trainer.model.experts.stack import Mxfp4Stack, Stack, expert_stacks
from qlora_trainer.model.nf4.base_weights import chosen_files
from qlora_trainer.model.nf4.quantization import quantize
from qlora_trainer.model.protocols import Network


@dataclass(frozen=True)
class StoredExperts:
    """The routed experts in the files of a model: loads all of them, or those of one block."""

    folder: Path
    quantization: QuantizationSpec
    layout: ExpertLayout
    places: Mapping[str, Sequence[tuple[str, Place]]]
    """By file: its tensors of experts, sorted by name, with their places."""

    @classmethod
    def from_folder(cls, model: PreTrainedModel, folder: Path, quantization: QuantizationSpec) -> Self:
        """Those of a model whose other weights are loaded from the folder; none of a dense one."""
        layout, places = loaded_layout(model), {}
        for file in chosen_files(folder) if layout.stacks else ():
            with cast("TensorFile[Tensor]", safe_open(folder / file, framework="pt")) as opened:
                placed = ((stored, layout.place(stored)) for stored in sorted(opened.keys()))
                places[file] = [(stored, place) for stored, place in placed if place is not None]
        return cls(folder, quantization, layout, places)

    def load(self, model: Network, part: nn.Module, device: torch.device | str) -> None:
        """Fill the stacks in a part of the model, or in all of it, on the device.

        A matrix that is stored in 16 bit is quantized. Raises StepFailure MODEL_UNAVAILABLE if one is missing, has
        another shape, or cannot be quantized.
        """
        inside = set(part.modules())
        stacks: dict[str, Stack] = {}
        for name in [name for name, stack in expert_stacks(model) if stack in inside]:
            module, weight = holder(model, name)
            stacks[name] = self.layout.stacks[name].stack(self.quantization, device)
            setattr(module, weight, stacks[name])
        missing = set(self.layout.entries(stacks))
        for file, places in self.places.items():
            wanted = [(stored, place) for stored, place in places if place.stack in stacks]
            if wanted:
                missing.difference_update(self._read(file, wanted, stacks))
        if missing:
            raise model_unavailable(
                f"the weights in {self.folder} do not fit config.json: {len(missing)} matrices of experts are missing, "
                f"first {some_names(sorted(missing))}"
            )

    def _read(self, file: str, wanted: Sequence[tuple[str, Place]], stacks: Mapping[str, Stack]) -> Iterator[str]:
        """Put the tensors of a file into their stacks. Yields the name of each entry found."""
        with cast("TensorFile[Tensor]", safe_open(self.folder / file, framework="pt")) as opened:
            names = set(opened.keys())
            for stored, place in wanted:
                stack = stacks[place.stack]
                if isinstance(stack, Mxfp4Stack):
                    stack.put(place.role, opened.get_tensor(stored))
                    yield f"{place.stack}{place.role}"
                    continue
                read = _four_bit if f"{stored}.absmax" in names else _quantize
                shape = self.layout.stacks[place.stack]
                try:
                    for expert, piece, layer in read(opened, stored, place, shape, self.quantization):
                        stack.put(expert, piece, layer)
                        yield entry_name(place.stack, expert, piece)
                except (ValueError, IndexError) as error:
                    raise model_unavailable(f"{stored} in {self.folder / file} cannot be loaded: {error}") from error


Layers: TypeAlias = Iterator[tuple[int, int, Mapping[str, Tensor]]]
"""Expert, piece and 4-bit layer."""


def _four_bit(
    opened: TensorFile[Tensor], stored: str, place: Place, _shape: StackShape, quantization: QuantizationSpec
) -> Layers:
    """The layer that a base of ours has."""
    constants = [".absmax", ".quant_map", f".quant_state.bitsandbytes__{quantization.type}"]
    if quantization.double_quant:
        constants += [".nested_absmax", ".nested_quant_map"]
    yield place.expert or 0, place.piece, {name: opened.get_tensor(f"{stored}{name}") for name in ("", *constants)}


def _quantize(
    opened: TensorFile[Tensor], stored: str, place: Place, shape: StackShape, quantization: QuantizationSpec
) -> Layers:
    """The layers that quantization makes of a stored tensor."""
    for expert, piece, matrix in matrices(opened, stored, place, shape):
        if tuple(matrix.shape) != shape.piece_shape:
            raise ValueError(f"it has shape {list(matrix.shape)}, not {list(shape.piece_shape)}")
        yield expert, piece, quantize(matrix, quantization)
