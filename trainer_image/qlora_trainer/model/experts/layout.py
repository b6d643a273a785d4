"""Decides which weights are stacks of experts, and the places of tensors in them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from re import fullmatch, search
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.protocols import TensorFile
from qlora_trainer.model.experts.compute import expert_modules
from qlora_trainer.model.experts.stack import BLOCKS, GROUP, SCALES, ExpertStack, Mxfp4Stack, Stack
from qlora_trainer.model.nf4.quantization import BLOCK
from qlora_trainer.model.protocols import Network
from qlora_trainer.model.source.quantization import experts_in_mxfp4

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""The names that families have for the number of routed experts."""

_ROUTERS = ("gate", "router")
"""What families call a router, next to the experts."""


@dataclass(frozen=True)
class StackShape:
    """A weight of all experts of a block."""

    shape: tuple[int, int, int]
    """Experts, rows, columns."""
    pieces: int
    """Matrices of an expert, such as gate and up. A checkpoint has them apart."""
    is_mxfp4: bool = False
    """Whether it is stored in MXFP4, and stays so."""
    can_be_turned: bool = False
    """Whether files may have each matrix transposed, as the tensor's shape shows."""

    @property
    def piece_shape(self) -> tuple[int, int]:
        """Rows and columns of a piece."""
        return self.shape[1] // self.pieces, self.shape[2]

    def is_turned(self, stored: tuple[int, ...]) -> bool:
        """Whether a tensor of all experts is transposed. Squares are not."""
        experts, rows, columns = self.shape
        return self.can_be_turned and stored == (experts, columns, rows) != self.shape

    def stack(self, quantization: QuantizationSpec, device: torch.device | str) -> Stack:
        """A stack without values."""
        if self.is_mxfp4:
            return Mxfp4Stack(self.shape, device)
        return ExpertStack(self.shape, self.pieces, quantization, device)

    def matrices(self, place: "Place") -> Iterator[tuple[int, int]]:
        """Expert and piece of each matrix in the tensor that has this place."""
        if place.expert is not None:
            return iter([(place.expert, place.piece)])
        return product(range(self.shape[0]), range(self.pieces))


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file belongs."""

    stack: str
    expert: int | None
    """None for a tensor that has all experts, with all their pieces."""
    piece: int = 0
    role: str = ""
    """Which tensor of a stack in MXFP4 it is: `BLOCKS`, or `SCALES`."""


@dataclass(frozen=True)
class ExpertLayout:
    """The stacks of a model, and how the tensors in its files are named."""

    stacks: Mapping[str, StackShape]
    """By the name of the parameter in the model, without weights or with them."""
    renamings: Sequence[WeightRenaming]
    converters: Sequence[WeightConverter]
    prefix: str

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Self:
        """The layout of a transformers model with parameters as experts, or an empty one."""
        mapping = get_model_conversion_mapping(model)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        is_mxfp4 = experts_in_mxfp4(model.config)
        stacks = {
            f"{module_name}.{name}": _stack_shape(f"{module_name}.{name}", parameter.shape, converters, is_mxfp4)
            for module_name, module in expert_modules(model)
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3
        }
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        return cls(stacks, renamings, converters, model.base_model_prefix)

    def place(self, stored: str) -> Place | None:
        """The place of a file's tensor, or None if it is no part of a stack."""
        for role in (BLOCKS, SCALES):
            stack = stored.removesuffix(role)
            if stack != stored and stack in self.stacks and self.stacks[stack].is_mxfp4:
                return Place(stack, None, role=role)
        entry = fullmatch(r"(.+)\.(\d+)\.(\d+)", stored)
        if entry is not None and entry[1] in self.stacks:
            return Place(entry[1], int(entry[2]), int(entry[3]))
        names = dict.fromkeys(self.stacks, True)
        name, source = rename_source_key(stored, list(self.renamings), list(self.converters), self.prefix, names)
        if name not in names:
            return None
        numbers = [int(part) for part in stored.split(".") if part.isdecimal()]
        for converter in self.converters:
            if source in converter.source_patterns and _merges(converter):
                return Place(name, numbers[-1], list(converter.source_patterns).index(source))
        return Place(name, None)

    def entries(self, names: Iterable[str]) -> Iterator[str]:
        """The name of each piece of the stacks of these names in a file of ours."""
        for name in names:
            stack = self.stacks[name]
            if stack.is_mxfp4:
                yield from (f"{name}{role}" for role in (BLOCKS, SCALES))
            else:
                yield from (entry_name(name, *matrix) for matrix in stack.matrices(Place(name, None)))


NO_EXPERTS = ExpertLayout({}, (), (), "")


def entry_name(stack: str, expert: int, piece: int) -> str:
    """The name of a piece of an expert in a file of ours."""
    return f"{stack}.{expert}.{piece}"


def matrices(
    opened: TensorFile[Tensor], stored: str, place: Place, stack: StackShape
) -> Iterator[tuple[int, int, Tensor]]:
    """Expert, piece and weight of each matrix in a tensor, read one at a time."""
    for expert, piece in stack.matrices(place):
        if place.expert is not None:
            yield expert, piece, opened.get_tensor(stored)
            continue
        whole = opened.get_slice(stored)
        matrix = whole[expert].T if stack.is_turned(tuple(whole.get_shape())) else whole[expert]
        yield expert, piece, matrix.chunk(stack.pieces)[piece]


def _stack_shape(stack: str, shape: torch.Size, converters: Sequence[WeightConverter], is_mxfp4: bool) -> StackShape:
    into = _into(stack, converters)
    pieces = next((len(converter.source_patterns) for converter in into if _merges(converter)), 1)
    return StackShape((shape[0], shape[1], shape[2]), pieces, is_mxfp4, any(map(_turns, into)))


def _into(stack: str, converters: Sequence[WeightConverter]) -> list[WeightConverter]:
    """The converters that compute the stack. up_proj does not mean gate_up_proj."""
    return [entry for entry in converters if any(search(rf"\b{target}", stack) for target in entry.target_patterns)]


def _merges(converter: WeightConverter) -> bool:
    """Whether it concatenates the matrices of each expert, and stacks the experts."""
    operations = list(converter.operations)
    if not operations or type(operations[0]) is not MergeModulelist or operations[0].dim != 0:
        return False
    others = operations[1:]
    one_below_the_other = len(others) == 1 and type(others[0]) is Concatenate and others[0].dim == 1
    return one_below_the_other if len(converter.source_patterns) > 1 else not others


def _turns(converter: WeightConverter) -> bool:
    """Whether it transposes each matrix in a tensor of all experts, by its shape."""
    turn, *others = converter.operations
    return not others and type(turn) is Transpose and {turn.dim0, turn.dim1} == {1, 2} and turn.check_dims


def reason_against_experts(model: PreTrainedModel) -> str | None:
    """Why routed experts that use transformers' interface, of a model without weights, cannot be kept in 4-bit.

    None if they can, or if the model has none.
    """
    layout = ExpertLayout.from_model(model)
    for name, stack in layout.stacks.items():
        size = prod(stack.piece_shape)
        if stack.is_mxfp4 and stack.shape[1] % GROUP:
            return f"it is a mixture of experts in MXFP4 with {stack.shape[1]} inputs ({name}), no multiple of {GROUP}"
        if stack.shape[1] % stack.pieces or size % BLOCK:
            return f"it is a mixture of experts of {size} weights ({name}), which must be a multiple of {BLOCK}"
        for converter in _into(name, layout.converters):
            if len(converter.target_patterns) > 1:
                parts = " and ".join(converter.target_patterns)
                return f"it is a mixture of experts whose files have {parts} in one list, which is not taken apart here"
            if not _merges(converter) and not _turns(converter):
                return f"it is a mixture of experts whose weights ({name}) are stored in a form that is not read here"
    return None


def routing_linears(model: Network) -> tuple[str, ...]:
    """Sorted names of linear layers that only decide about experts: they stay in 16 bit, and get no adapter.

    Those are all that are inside a router, which is a neighbor of the routed experts: it is called so, or its last
    layer has one output for each expert. So does the layer with a single one, the weight of what all tokens share.
    """
    found: set[str] = set()
    for name, experts in expert_modules(model):
        parent = name.rpartition(".")[0]
        for neighbor, module in model.get_submodule(parent).named_children():
            inner = {
                name: layer
                for name, layer in module.named_modules(prefix=f"{parent}.{neighbor}")
                if isinstance(layer, nn.Linear)
            }
            last = next(reversed(inner.values()), None)
            if last is not None and (neighbor in _ROUTERS or last.out_features in (1, experts.num_experts)):
                found.update(inner)
    return tuple(sorted(found))
