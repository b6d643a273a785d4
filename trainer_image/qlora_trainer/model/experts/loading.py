"""Loads routed experts as 4-bit stacks, one by one. transformers loads the rest."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias, cast

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import model_unavailable
from qlora_trainer.core.paths import some_names
from qlora_trainer.core.protocols import TensorFile
from qlora_trainer.model.experts.layout import Place, StackShape, entry_name, matrices
from qlora_trainer.model.experts.quantizer import ExpertsQuantizer, holder
from qlora_trainer.model.experts.stack import Mxfp4Stack, expert_stacks
from qlora_trainer.model.nf4.base_weights import chosen_files
from qlora_trainer.model.nf4.quantization import quantize


def load_experts(model: PreTrainedModel, folder: Path, quantization: QuantizationSpec) -> None:
    """Fill the stacks of a model, whose other weights are loaded, from the files in `folder`.

    A matrix that is stored in 16 bit is quantized. Raises StepFailure MODEL_UNAVAILABLE if one is missing, has another
    shape, or cannot be quantized.
    """
    quantizer = model.hf_quantizer
    if not isinstance(quantizer, ExpertsQuantizer) or not quantizer.layout.stacks:
        return
    for name, shape in quantizer.layout.stacks.items():
        module, weight = holder(model, name)
        setattr(module, weight, shape.stack(quantization, model.device))
    shapes, stacks, missing = quantizer.layout.stacks, dict(expert_stacks(model)), set(quantizer.layout.entries())
    for file in chosen_files(folder):
        with cast("TensorFile[Tensor]", safe_open(folder / file, framework="pt")) as opened:
            names = set(opened.keys())
            for stored in sorted(names):
                place = quantizer.layout.place(stored)
                if place is None:
                    continue
                stack = stacks[place.stack]
                if isinstance(stack, Mxfp4Stack):
                    stack.put(place.role, opened.get_tensor(stored))
                    missing.discard(f"{place.stack}{place.role}")
                    continue
                read = _four_bit if f"{stored}.absmax" in names else _quantize
                try:
                    for expert, piece, layer in read(opened, stored, place, shapes[place.stack], quantization):
                        stack.put(expert, piece, layer)
                        missing.discard(entry_name(place.stack, expert, piece))
                except (ValueError, IndexError) as error:
                    raise model_unavailable(f"{stored} in {folder / file} cannot be loaded: {error}") from error
    if missing:
        raise model_unavailable(
            f"the weights in {folder} do not fit config.json: {len(missing)} matrices of experts are missing, first "
            f"{some_names(sorted(missing))}"
        )


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
