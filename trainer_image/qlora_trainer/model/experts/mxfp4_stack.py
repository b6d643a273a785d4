"""Keeps the frozen weights of routed experts in MXFP4, as they were published, and dequantizes any of them.

gpt-oss is published in MXFP4 only. Quantizing its experts to NF4 would add an error of 7.4 %, for a base that no server
uses.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

GROUP = 32
"""Weights that share a scale."""
BLOCKS, SCALES = "_blocks", "_scales"
"""What follows a stack's name in a file: its values, two a byte, and its scales."""
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_LARGEST_SCALE = 252
"""6 · 2^(252 - 127) is the largest finite product in bfloat16, 255 is no number."""


@dataclass(frozen=True)
class Mxfp4Tensor:
    """One of the two tensors of a stack in a file, by what it must be."""

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


class Mxfp4Stack(nn.Module):
    """One weight of all experts of a block: [experts, inputs, outputs], not a parameter.

    An output's weights follow one another, in groups of 32 with one scale each: 4.25 bits a weight (OCP Microscaling
    Formats 1.0, sections 5.2 and 6.3).
    """

    blocks: Tensor
    """uint8 [experts, outputs, groups, 16]: two weights a byte, the lower half first."""
    scales: Tensor
    """uint8 [experts, outputs, groups]: exponents of two, plus 127."""
    pairs: Tensor
    """bfloat16 [256, 2]: the two values of each byte."""
    powers: Tensor
    """bfloat16 [256]: the factor of each scale."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str) -> None:
        """Create without values. Raises ValueError if inputs cannot be cut into groups."""
        super().__init__()
        if shape[1] % GROUP:
            raise ValueError(f"{shape[1]} inputs cannot be cut into groups of {GROUP}")
        self.shape = shape
        self._tensors = tensors_of(shape)
        # Not persistent: transformers would ask the checkpoint for them.
        for name, tensor in {
            "blocks": torch.empty(self._tensors[BLOCKS].shape, dtype=torch.uint8, device=device),
            "scales": torch.empty(self._tensors[SCALES].shape, dtype=torch.uint8, device=device),
            "pairs": _pairs().to(device),
            "powers": _powers().to(device),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def parameters_count(self) -> int:
        """Weights of all experts."""
        experts, inputs, outputs = self.shape
        return experts * inputs * outputs

    @property
    def bytes(self) -> int:
        """Bytes of everything that is needed to read the weights."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers())

    @property
    def expected_bytes(self) -> int:
        """Bytes of so many weights in this format."""
        return self.parameters_count * (GROUP // 2 + 1) // GROUP + _pairs().nbytes + _powers().nbytes

    def put(self, role: str, tensor: Tensor) -> None:
        """Set one of its two tensors. Raises ValueError for a wrong role, type or shape."""
        wanted = self._tensors.get(role)
        if wanted is None or tensor.dtype != torch.uint8 or tuple(tensor.shape) != wanted.shape:
            raise ValueError(f"it is {tensor.dtype} {list(tensor.shape)}, and no part of experts in MXFP4")
        (self.blocks if role == BLOCKS else self.scales).copy_(tensor)

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """The weights [end - first, inputs, outputs] of the experts from `first` to before `end`.

        They are exact: each is one of sixteen values times a power of two.
        """
        blocks, scales = self.blocks[first:end], self.scales[first:end]
        weights = looked_up(self.pairs, blocks).view(*scales.shape, GROUP)
        weights.mul_(looked_up(self.powers, scales).view(*scales.shape, 1))
        return cast("Tensor", weights.view(end - first, self.shape[2], self.shape[1]).mT.to(dtype))


def looked_up(table: Tensor, places: Tensor) -> Tensor:
    """The entries of a table [256, ...] at `places`, uint8: [places, ...].

    Indexing with them would copy the places to 64 bit (PyTorch's `make_info`): twice the bytes of dequantized MXFP4.
    """
    return table.index_select(0, places.reshape(-1).int())


def _pairs() -> Tensor:
    values = [*_VALUES, *(-value for value in _VALUES)]
    return torch.tensor([[values[byte & 15], values[byte >> 4]] for byte in range(256)], dtype=torch.bfloat16)


def _powers() -> Tensor:
    powers = [2.0 ** (scale - _BIAS) for scale in range(255)]
    return torch.tensor([*powers, float("nan")], dtype=torch.bfloat16)
