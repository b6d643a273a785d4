"""Keeps routed experts' frozen weights in 4-bit or MXFP4, and dequantizes any of them.

gpt-oss is published in MXFP4 only. Quantizing its experts to NF4 would add an error of 7.4 %, for a base that no server
uses.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar, TypeAlias

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from torch import Tensor, nn

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.nf4.quantization import BLOCK, OUTER_BLOCK, dynamic_map, layer_bytes
from qlora_trainer.model.protocols import Network

GROUP = 32
"""Weights that share a scale in MXFP4."""
BLOCKS, SCALES = "_blocks", "_scales"
"""What follows a stack's name in a file: its values, two a byte, and its scales."""
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_PLACES = 2**26
_LARGEST_SCALE = 252
"""6 · 2^(252 - 127) is the largest finite product in bfloat16, 255 is no number."""


class _FrozenStack(nn.Module):
    """One weight of all experts of a block, not a parameter."""

    sharded: ClassVar[tuple[str, ...]]
    """Names of the tensors that have nearly all of the bytes."""

    def __init__(self, shape: tuple[int, int, int], buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.shape = shape
        # Not persistent: transformers would ask the checkpoint for them.
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def parameters_count(self) -> int:
        """Weights of all experts."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of everything that is needed to read the weights."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers())


class ExpertStack(_FrozenStack):
    """One weight of all experts of a block: [experts, rows, columns] in 4-bit.

    An expert consists of one or more `pieces` of the same size, which follow one another: its matrices in the
    checkpoint, such as gate and up. Each was quantized separately, exactly as bitsandbytes quantizes a linear layer, so
    no block of 64 weights and no constant of the second level crosses from one to the next. Therefore a piece has a
    multiple of 64 weights. The tables of the values are the same for all, and are kept once.

    Without double quantization `outer_absmax`, `outer_code` and `offset` are empty.
    """

    sharded = ("packed", "absmax")
    packed: Tensor
    """uint8 [experts, bytes]: two weights a byte."""
    absmax: Tensor
    """[experts, blocks]: the constants, float32 or, with double quantization, uint8."""
    code: Tensor
    """float32 [16]: the 4-bit values."""
    outer_absmax: Tensor
    """float32 [experts, pieces, outer blocks]: the constants of the constants."""
    outer_code: Tensor
    """float32 [256]: values of 8-bit constants."""
    offset: Tensor
    """float32 [experts, pieces]: the mean that was subtracted from the constants."""

    def __init__(
        self, shape: tuple[int, int, int], pieces: int, quantization: QuantizationSpec, device: torch.device | str
    ) -> None:
        """Create without values. Raises ValueError unless pieces have 64 N weights."""
        experts, size = shape[0], shape[1] * shape[2]
        if size % (pieces * BLOCK):
            raise ValueError(f"{pieces} pieces of {size} weights cannot be cut into blocks of {BLOCK}")
        double, blocks = quantization.double_quant, size // BLOCK
        outer_blocks = -(-blocks // pieces // OUTER_BLOCK)
        outer_shape, offset_shape = ((experts, pieces, outer_blocks), (experts, pieces)) if double else ((0,), (0,))
        buffers = {
            "packed": torch.empty(experts, size // 2, dtype=torch.uint8, device=device),
            "absmax": torch.empty(experts, blocks, dtype=torch.uint8 if double else torch.float32, device=device),
            "code": get_4bit_type(quantization.type, device="cpu").to(device),
            "outer_absmax": torch.empty(outer_shape, dtype=torch.float32, device=device),
            "outer_code": dynamic_map().to(device, copy=True) if double else torch.empty(0, device=device),
            "offset": torch.empty(offset_shape, dtype=torch.float32, device=device),
        }
        super().__init__(shape, buffers)
        self.pieces, self.quantization = pieces, quantization

    @property
    def expected_bytes(self) -> int:
        """Bytes of so many weights in this format."""
        double = self.quantization.double_quant
        tables = layer_bytes(0, double_quant=False) + (4 * 256 if double else 0)
        piece = self.shape[1] * self.shape[2] // self.pieces
        return tables + self.shape[0] * self.pieces * (layer_bytes(piece, double_quant=double) - tables)

    def put(self, expert: int, piece: int, layer: Mapping[str, Tensor]) -> None:
        """Set a piece of an expert to the tensors of a 4-bit layer, as `four_bit.quantize` names them.

        Raises ValueError if they are of another type or size.
        """
        tensors = {name.removeprefix("."): tensor for name, tensor in layer.items() if name}
        state = QuantState.from_dict(tensors, torch.device("cpu"))
        found = (state.quant_type, state.nested, state.blocksize, tuple(state.shape))
        piece_shape = (self.shape[1] // self.pieces, self.shape[2])
        wanted = (self.quantization.type, self.quantization.double_quant, BLOCK, piece_shape)
        if found != wanted:
            raise ValueError(f"it has (type, double quantization, block, shape) {found}, not {wanted}")
        self.packed[expert].chunk(self.pieces)[piece].copy_(layer[""].reshape(-1))
        self.absmax[expert].chunk(self.pieces)[piece].copy_(state.absmax)
        if state.nested:
            self.outer_absmax[expert, piece].copy_(state.state2.absmax)
            self.offset[expert, piece].copy_(state.offset)

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """The weights [end - first, rows, columns] of experts `first` to before `end`."""
        weights = (end - first) * self.shape[1] * self.shape[2]
        state = QuantState(
            absmax=self._constants(first, end).reshape(-1),
            # bitsandbytes' kernel for CPUs lets no block cross rows: it gives wrong values for rows of 32, for example.
            shape=torch.Size((weights // BLOCK, BLOCK)),
            code=self.code,
            blocksize=BLOCK,
            quant_type=self.quantization.type,
            dtype=torch.bfloat16,
        )
        dense = dequantize_4bit(self.packed[first:end].reshape(-1, 1), state)
        return dense.view(end - first, *self.shape[1:]).to(dtype)

    def _constants(self, first: int, end: int) -> Tensor:
        """float32 [experts, blocks]: what each block of 64 is multiplied with."""
        if not self.quantization.double_quant:
            return self.absmax[first:end]
        values = _look_up(self.outer_code, self.absmax[first:end]).view(end - first, self.pieces, -1)
        outer = self.outer_absmax[first:end].repeat_interleave(OUTER_BLOCK, dim=2)[..., : values.shape[2]]
        return values.mul_(outer).add_(self.offset[first:end, :, None]).reshape(end - first, -1)


@dataclass(frozen=True)
class Mxfp4Tensor:
    """The required shape of one of the two tensors of a stack in a file."""

    role: str
    """`BLOCKS` or `SCALES`."""
    shape: tuple[int, ...]

    def require_header(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless a tensor of this type and shape can be it."""
        if (dtype, shape) != ("U8", self.shape):
            raise ValueError(f"it is {dtype} {list(shape)}, and must be U8 {list(self.shape)}")

    def ours(self, tensor: Tensor) -> Tensor:
        """The unchanged tensor. Raises ValueError for scales of infinite or NaN weights."""
        if self.role == SCALES and tensor.numel() and int(tensor.max()) > _LARGEST_SCALE:
            raise ValueError(f"it has the scale {int(tensor.max())}, and at most {_LARGEST_SCALE} is finite")
        return tensor


def tensors_of(shape: tuple[int, int, int]) -> dict[str, Mxfp4Tensor]:
    """The tensors of a stack of this shape [experts, inputs, outputs], by their role."""
    experts, inputs, outputs = shape
    groups = (experts, outputs, inputs // GROUP)
    return {BLOCKS: Mxfp4Tensor(BLOCKS, (*groups, GROUP // 2)), SCALES: Mxfp4Tensor(SCALES, groups)}


class Mxfp4Stack(_FrozenStack):
    """One weight of all experts of a block: [experts, inputs, outputs] in MXFP4, as published.

    An output's weights follow one another, in groups of 32 with one scale each: 4.25 bits a weight (OCP Microscaling
    Formats 1.0, sections 5.2 and 6.3).
    """

    sharded = ("blocks", "scales")
    blocks: Tensor
    """uint8 [experts, outputs, groups, 16]: two weights a byte, the lower half first."""
    scales: Tensor
    """uint8 [experts, outputs, groups]: exponents of two, plus 127."""
    pairs: Tensor
    """int32 [256]: the two bfloat16 values of each byte."""
    powers: Tensor
    """bfloat16 [256]: the factor of each scale."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str) -> None:
        """Create without values. Raises ValueError if inputs cannot be cut into groups."""
        if shape[1] % GROUP:
            raise ValueError(f"{shape[1]} inputs cannot be cut into groups of {GROUP}")
        tensors = tensors_of(shape)
        buffers = {
            "blocks": torch.empty(tensors[BLOCKS].shape, dtype=torch.uint8, device=device),
            "scales": torch.empty(tensors[SCALES].shape, dtype=torch.uint8, device=device),
            "pairs": _pairs().to(device),
            "powers": _powers().to(device),
        }
        super().__init__(shape, buffers)

    @property
    def expected_bytes(self) -> int:
        """Bytes of so many weights in this format."""
        return self.parameters_count * (GROUP // 2 + 1) // GROUP + _pairs().nbytes + _powers().nbytes

    def put(self, role: str, tensor: Tensor) -> None:
        """Set one of its two tensors. Raises ValueError for a wrong role, type or shape."""
        wanted = tensors_of(self.shape).get(role)
        if wanted is None or tensor.dtype != torch.uint8 or tuple(tensor.shape) != wanted.shape:
            raise ValueError(f"it is {tensor.dtype} {list(tensor.shape)}, and no part of experts in MXFP4")
        (self.blocks if role == BLOCKS else self.scales).copy_(tensor)

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """The weights [end - first, inputs, outputs] of the experts from `first` to before `end`.

        They are exact: each is one of sixteen values times a power of two.
        """
        blocks, scales = self.blocks[first:end], self.scales[first:end]
        weights = _look_up(self.pairs, blocks).view(torch.bfloat16).view(*scales.shape, GROUP)
        weights.mul_(_look_up(self.powers, scales).view(*scales.shape, 1))
        return weights.view(end - first, self.shape[2], self.shape[1]).mT.to(dtype)


def _look_up(table: Tensor, places: Tensor) -> Tensor:
    """The entries of a table [256] at `places`, uint8: [places].

    PyTorch takes places of 32 bit, as many bytes as dequantized MXFP4: there are only those of a part at a time.
    """
    places = places.reshape(-1)
    found = table.new_empty(len(places))
    for part, found_part in zip(places.split(_PLACES), found.split(_PLACES), strict=True):
        torch.index_select(table, 0, part.int(), out=found_part)
    return found


def _pairs() -> Tensor:
    values = [*_VALUES, *(-value for value in _VALUES)]
    pairs = [[values[byte & 15], values[byte >> 4]] for byte in range(256)]
    # As one element, so that there are half as many to look up.
    return torch.tensor(pairs, dtype=torch.bfloat16).view(torch.int32).view(-1)


def _powers() -> Tensor:
    powers = [2.0 ** (scale - _BIAS) for scale in range(255)]
    return torch.tensor([*powers, float("nan")], dtype=torch.bfloat16)


Stack: TypeAlias = ExpertStack | Mxfp4Stack


def expert_stacks(model: Network) -> Iterator[tuple[str, Stack]]:
    """Name and stack of each weight of routed experts that is in 4-bit."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Stack))
