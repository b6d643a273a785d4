"""Finds the nearest of the sixteen values of a 4-bit type, for whole blocks of weights and to bitsandbytes' bytes."""

from itertools import pairwise

import torch
from bitsandbytes.functional import get_4bit_type
from torch import Tensor

from qlora_trainer.model.layer_format import BLOCK


class NearestValues:
    """Quantizes blocks of 64 weights; what it needs meanwhile is used again for the next piece.

    bitsandbytes searches the place of each weight among the fifteen means of neighboring values, one weight at a time.
    Here all weights of a piece are compared with one mean after the other, which is faster: processors compare eight
    or more numbers at once. The numbers that are compared are the same, and so are the bytes.
    """

    def __init__(self, kind: str, weights: int) -> None:
        """`kind` is "nf4" or "fp4"; no piece has more than so many `weights`."""
        values = get_4bit_type(kind, device="cpu")
        order = torch.argsort(values)
        ascending = values[order]
        codes = order.tolist()
        self._lowest = codes[0]
        # Beyond each mean the code grows by this much, in the arithmetic of one byte.
        means = ((ascending[:-1] + ascending[1:]) / 2).tolist()
        self._steps = [
            (mean, (after - before) % 256) for mean, (before, after) in zip(means, pairwise(codes), strict=True)
        ]
        self._scaled = torch.empty(weights, dtype=torch.float32)
        self._beyond = torch.empty(weights, dtype=torch.bool)
        self._codes = torch.empty(weights, dtype=torch.uint8)

    def quantize(self, piece: Tensor, packed: Tensor, absmax: Tensor) -> None:
        """Quantize [weights], a multiple of 64, of a floating point type.

        Sets `packed`, uint8 [weights / 2, 1], to two codes a byte, and `absmax`, float32 [weights / 64], to the largest
        magnitude of each block: not finite if one of its weights is not.
        """
        scaled, beyond, codes = (buffer[: piece.numel()] for buffer in (self._scaled, self._beyond, self._codes))
        scaled.copy_(piece)
        blocks = scaled.view(-1, BLOCK)
        torch.amax(blocks.abs(), dim=1, out=absmax)
        # A block of zeros is divided by the smallest number that bitsandbytes divides by.
        blocks.mul_(absmax.clamp(min=1e-38).reciprocal_().unsqueeze(1)).clamp_(-1, 1)
        codes.fill_(self._lowest)
        for mean, step in self._steps:
            torch.gt(scaled, mean, out=beyond)
            codes.add_(beyond.view(torch.uint8), alpha=step)
        high, low = codes.view(-1, 2).unbind(1)
        torch.bitwise_or(high << 4, low, out=packed.view(-1))
