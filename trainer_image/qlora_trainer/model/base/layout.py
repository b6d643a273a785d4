"""Decides which tensors of a base become 4-bit, and the content of its files."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import model_unavailable
from qlora_trainer.core.paths import some_names
from qlora_trainer.core.protocols import TensorFile
from qlora_trainer.model.base.chosen_layers import (
    library_config,
    modules_in_16_bit,
    quantized_names,
    require_same_layers,
    unloaded_model,
)
from qlora_trainer.model.experts.layout import ExpertLayout, Place, entry_name, matrices
from qlora_trainer.model.experts.stack import Mxfp4Tensor, tensors_of
from qlora_trainer.model.nf4.base_weights import StoredName, renaming
from qlora_trainer.model.nf4.quantization import BLOCK, OUTER_BLOCK, layer_bytes
from qlora_trainer.model.nf4.stored_layer import PACKED, StoredTensor, split
from qlora_trainer.model.source.files import CONFIG
from qlora_trainer.model.source.quantization import (
    EXPERTS_FORMAT,
    ORIGINAL,
    SETTINGS,
    require_agreement,
    skipped_modules,
    source_quantization,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""The types of tensors that are written, by their names in the format."""
ALIGNMENT = 8
"""The first tensor's place in the file is a multiple of this many bytes."""
STATE_BYTES = 256
"""Bytes of a layer's description in JSON, padded with spaces to a fixed length."""
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
"""The types that a weight may be stored in."""
_PACKED_ALIGNMENT = 4


@dataclass(frozen=True)
class Entry:
    """A tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Part:
    """A tensor of the original, and its replacement: itself, or 4-bit tensors."""

    stored: str
    entries: tuple[Entry, ...]
    is_four_bit: bool = False
    place: Place | None = None
    """Among the experts, if it is a part of them."""
    layer: StoredTensor | Mxfp4Tensor | None = None
    """Of which 4-bit layer it is a part already, if the original is in 4 bit."""

    @property
    def alignment(self) -> int:
        """Where it may begin, and end, is a multiple of this many bytes."""
        if self.is_four_bit:
            return ALIGNMENT
        (entry,) = self.entries
        # Packed weights are read as another type too.
        packed = self.layer is not None and self.layer.role == PACKED and entry.bytes % _PACKED_ALIGNMENT == 0
        return _PACKED_ALIGNMENT if packed else DTYPES[entry.dtype].itemsize


@dataclass(frozen=True)
class BaseLayout:
    """Where the tensors of a model belong."""

    quantization: QuantizationSpec
    shapes: Mapping[str, tuple[int, ...]]
    """Of each parameter of the model, by each of its names: tied ones have several."""
    four_bit: frozenset[str]
    """Names of the parameters that become 4-bit."""
    tied: tuple[frozenset[str], ...]
    """The names of each parameter. One of them must be stored."""
    buffers: frozenset[str]
    in_32_bit: frozenset[str]
    """Names of the parameters that transformers always keeps in 32 bit."""
    name_in_model: Callable[[str], StoredName | None]
    """See `renaming`."""
    experts: ExpertLayout
    is_stored_in_4_bit: bool = False
    """Whether the original's layers are in 4 bit already, as in `quantization`."""
    in_16_bit: tuple[str, ...] = ()
    """Names of all modules that stay in 16 bit, if transformers would leave fewer."""

    @classmethod
    def from_folder(cls, config_folder: Path, quantization: QuantizationSpec) -> Self:
        """The layout of the model whose config.json is in the folder, and was checked. Reads no weights.

        transformers chooses the 4-bit layers in a model without weights. Towers are skipped: no adapter makes up for
        the error of their quantization.
        Raises StepFailure BAD_CONFIGURATION for a model that is in 4 bit in another format or in other layers.
        """
        settings = json.loads((config_folder / CONFIG).read_bytes())
        stored = source_quantization(settings, CONFIG)
        require_agreement(stored, quantization)
        model = unloaded_model(config_folder)
        rename, experts = renaming(model), ExpertLayout.from_model(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        names: dict[int, set[str]] = {}
        for name, tensor in parameters.items():
            names.setdefault(id(tensor), set()).add(name)
        buffers = frozenset(model.state_dict().keys() - shapes.keys())
        in_32_bit = set(model._keep_in_fp32_modules_strict or ())
        in_16_bit = modules_in_16_bit(config_folder)
        four_bit = quantized_names(config_folder, library_config(quantization, experts=True, in_16_bit=in_16_bit))
        if stored is not None:
            # Nothing else in them has an effect on the choice.
            skipped = skipped_modules(settings[SETTINGS[0]])
            theirs = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
            require_same_layers(quantized_names(config_folder, theirs), four_bit)
        return cls(
            quantization=quantization,
            shapes=shapes,
            four_bit=four_bit,
            tied=tuple(frozenset(group) for group in names.values() if not group & experts.stacks.keys()),
            buffers=buffers,
            in_32_bit=frozenset(
                name
                for name, tensor in parameters.items()
                if tensor.dtype == torch.float32 or any(part in name for part in in_32_bit)
            ),
            name_in_model=rename,
            experts=experts,
            is_stored_in_4_bit=stored is not None,
            in_16_bit=in_16_bit,
        )

    @property
    def bytes(self) -> int:
        """About what the base takes on a volume."""
        double = self.quantization.double_quant
        weights = sum(layer_bytes(prod(self.shapes[name]), double_quant=double) for name in self.four_bit)
        for stack in self.experts.stacks.values():
            if stack.is_mxfp4:
                weights += sum(prod(tensor.shape) for tensor in tensors_of(stack.shape).values())
                continue
            piece = STATE_BYTES + layer_bytes(prod(stack.piece_shape), double_quant=double)
            weights += stack.shape[0] * stack.pieces * piece
        others = (next(iter(group)) for group in self.tied if not group & self.four_bit)
        kept = sum(Entry(name, self._dtype(name), self.shapes[name]).bytes for name in others)
        return weights + len(self.four_bit) * STATE_BYTES + kept

    def parts(self, stored: Mapping[str, Entry], file: str) -> list[Part]:
        """The parts to write for a file of the original with these tensors, by name.

        Tensors that the model does not have are left out, such as those of a part for images. The others get the types
        that transformers would load them in. Raises StepFailure MODEL_UNAVAILABLE, naming the tensor, for one of
        another shape, of no floating point type, or that the model computes with in another form.
        """
        parts = [self._part(stored[name], file) for name in sorted(stored)]
        # A 4-bit layer ends at a multiple of eight bytes. Behind them those of large types precede those of small ones.
        found = [part for part in parts if part is not None]
        return sorted(found, key=lambda part: (not part.is_four_bit, -part.alignment))

    def _part(self, stored: Entry, file: str) -> Part | None:
        place = self.experts.place(stored.name)
        if place is not None:
            return self._expert_part(stored, place, file)
        weight, role = split(stored.name) if self.is_stored_in_4_bit else (stored.name, PACKED)
        found = self.name_in_model(weight)
        if found is None or (found.pieces > 1 and found.name in self.four_bit):
            raise model_unavailable(
                f"{file} stores {stored.name} in another form than the model computes with: use a conversion of the "
                "model that a present release of transformers has saved"
            )
        name = found.name
        if name in self.buffers:
            # Also of whole numbers.
            return Part(stored.name, (stored,)) if stored.dtype in DTYPES else None
        if name not in self.shapes:
            return None
        if self.is_stored_in_4_bit and (role or name in self.four_bit):
            return self._layer_part(stored, weight, role, name, file)
        # Pieces stay apart, as transformers finds them in the original, and have as many rows together as it needs.
        rows = self.shapes[name][:1] if found.pieces == 1 else stored.shape[:1]
        _validate_header(stored, (*rows, *self.shapes[name][1:]), file)
        if name not in self.four_bit:
            return Part(stored.name, (replace(stored, dtype=self._dtype(name)),))
        return Part(stored.name, tuple(_layer(stored.name, prod(stored.shape), self.quantization)), is_four_bit=True)

    def _layer_part(self, stored: Entry, weight: str, role: str, name: str, file: str) -> Part:
        entries = {entry.name: entry for entry in _layer(weight, prod(self.shapes[name]), self.quantization)}
        entry = entries.get(stored.name) if name in self.four_bit else None
        if entry is None:
            kind = f"{self.quantization.type}, double quantization {self.quantization.double_quant}"
            raise model_unavailable(
                f"{stored.name} in {file} belongs to no layer that is in 4 bit ({kind}), as config.json describes it; "
                f"{ORIGINAL}"
            )
        layer = StoredTensor(role, entry.dtype, entry.shape, self.shapes[name], self.quantization)
        return _keep(layer, entry, stored, file)

    def _dtype(self, name: str) -> str:
        """The type of a parameter that does not become 4-bit."""
        return "F32" if name in self.in_32_bit else "BF16"

    def _expert_part(self, stored: Entry, place: Place, file: str) -> Part:
        stack = self.experts.stacks[place.stack]
        if stack.is_mxfp4:
            tensor = tensors_of(stack.shape).get(place.role)
            if tensor is None:
                raise model_unavailable(
                    f"{stored.name} in {file} is not in MXFP4, as config.json describes it; {ORIGINAL}"
                )
            return _keep(tensor, Entry(f"{place.stack}{place.role}", "U8", tensor.shape), stored, file)
        whole = stored.shape if stack.is_turned(stored.shape) else stack.shape
        _validate_header(stored, whole if place.expert is None else stack.piece_shape, file)
        size = prod(stack.piece_shape)
        entries = (
            entry
            for expert, piece in stack.matrices(place)
            for entry in _layer(entry_name(place.stack, expert, piece), size, self.quantization)
        )
        return Part(stored.name, tuple(entries), is_four_bit=True, place=place)

    def matrices(self, opened: TensorFile[Tensor], part: Part) -> Iterator[tuple[str, Tensor]]:
        """Name and weight of each 4-bit layer that a part becomes, from an open file."""
        if part.place is None:
            yield part.stored, opened.get_tensor(part.stored)
            return
        for expert, piece, matrix in matrices(opened, part.stored, part.place, self.experts.stacks[part.place.stack]):
            yield entry_name(part.place.stack, expert, piece), matrix

    def tensors(self, stored: Mapping[str, Entry]) -> Mapping[str, tuple[Entry, StoredTensor | None]]:
        """The tensors of a base whose files have these, and their roles in layers."""
        found: dict[str, tuple[Entry, StoredTensor | None]] = {}
        for name, stack in self.experts.stacks.items():
            if stack.is_mxfp4:
                for role, tensor in tensors_of(stack.shape).items():
                    found[f"{name}{role}"] = (Entry(f"{name}{role}", "U8", tensor.shape), None)
                continue
            for matrix in stack.matrices(Place(name, None)):
                found |= self._layer_tensors(entry_name(name, *matrix), stack.piece_shape)
        for name in stored.keys() - found.keys():
            entry, place = stored[name], self.name_in_model(name)
            if place is None:
                continue
            whole = self.shapes.get(place.name)
            if place.name in self.buffers and entry.dtype in DTYPES:
                found[name] = (entry, None)
            elif whole is not None and place.name not in self.four_bit:
                rows = whole[:1] if place.pieces == 1 else entry.shape[:1]
                found[name] = (Entry(name, self._dtype(place.name), (*rows, *whole[1:])), None)
            elif whole is not None and place.pieces == 1:
                found |= self._layer_tensors(name, whole)
        return found

    def _layer_tensors(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[Entry, StoredTensor | None]]:
        return {
            entry.name: (
                entry,
                StoredTensor(entry.name[len(name) + 1 :], entry.dtype, entry.shape, shape, self.quantization),
            )
            for entry in _layer(name, prod(shape), self.quantization)
        }

    def library_config(self) -> BitsAndBytesConfig:
        """The base's quantization as transformers' configuration."""
        stacks = self.experts.stacks.values()
        settings = library_config(self.quantization, experts=bool(stacks), in_16_bit=self.in_16_bit)
        if any(stack.is_mxfp4 for stack in stacks):
            setattr(settings, EXPERTS_FORMAT, "mxfp4")
        return settings

    def require_complete(self, stored: Collection[str]) -> None:
        """Raise StepFailure MODEL_UNAVAILABLE unless each parameter is stored."""
        places = {name: place for name in stored if (place := self.name_in_model(name)) is not None}
        pieces: dict[tuple[str, int], set[int]] = {}
        for place in places.values():
            pieces.setdefault((place.name, place.pieces), set()).add(place.piece)
        found = {name for (name, count), those in pieces.items() if len(those) == count}
        missing = sorted(min(group) for group in self.tied if not group & found)
        missing += sorted(set(self.experts.entries(self.experts.stacks)).difference(stored))
        if self.is_stored_in_4_bit:
            layers = [name for name, place in places.items() if place.name in self.four_bit]
            needed = {entry.name for layer in layers for entry in _layer(layer, 0, self.quantization)}
            missing += sorted(needed.difference(stored))
        if missing:
            raise model_unavailable(
                f"the weights do not fit config.json: {len(missing)} tensors are missing, first {some_names(missing)}"
            )


def _keep(layer: StoredTensor | Mxfp4Tensor, entry: Entry, stored: Entry, file: str) -> Part:
    """The part of a tensor that is in 4 bit already. Raises StepFailure."""
    try:
        layer.require_header(stored.dtype, stored.shape)
    except ValueError as error:
        raise model_unavailable(f"{stored.name} in {file} is no part of a 4-bit layer: {error}; {ORIGINAL}") from error
    return Part(stored.name, (entry,), layer=layer)


def _validate_header(stored: Entry, wanted: tuple[int, ...], file: str) -> None:
    name, shape = stored.name, list(stored.shape)
    if stored.shape != wanted:
        raise model_unavailable(
            f"the weights do not fit config.json: {name} in {file} has shape {shape}, not {list(wanted)}"
        )
    if stored.dtype not in _WEIGHT_TYPES:
        raise model_unavailable(
            f"{name} in {file} is stored as {stored.dtype}, and must be one of {', '.join(_WEIGHT_TYPES)}: use a "
            "revision that is not quantized"
        )


def _layer(name: str, parameters: int, quantization: QuantizationSpec) -> Iterator[Entry]:
    """The tensors of a 4-bit layer: 32 bit first, so that each begins at a multiple of its size, and so the next layer.

    Packed bytes begin at a multiple of four: a sharded base reads them as another type.
    """
    blocks = -(-parameters // BLOCK)
    entries = [Entry(f"{name}.quant_map", "F32", (16,))]
    packed = Entry(name, "U8", (-(-parameters // 2), 1))
    if quantization.double_quant:
        entries += [
            Entry(f"{name}.nested_absmax", "F32", (-(-blocks // OUTER_BLOCK),)),
            Entry(f"{name}.nested_quant_map", "F32", (256,)),
            packed,
            Entry(f"{name}.absmax", "U8", (blocks,)),
        ]
    else:
        entries += [Entry(f"{name}.absmax", "F32", (blocks,)), packed]
    filled = -sum(entry.bytes for entry in entries) % ALIGNMENT
    yield from entries
    yield Entry(f"{name}.quant_state.bitsandbytes__{quantization.type}", "U8", (STATE_BYTES + filled,))
