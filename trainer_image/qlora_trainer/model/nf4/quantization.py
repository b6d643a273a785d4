"""Quantizes weights to the 4-bit format of bitsandbytes, in pieces and to the same bytes on every machine.

bitsandbytes quantizes a tensor on a CPU in seven times its memory, more than a small pod has for the largest layers.
Its blocks of 64 weights are independent, so pieces give the same bytes.
"""

import math
from collections.abc import Mapping
from functools import cache
from itertools import chain, pairwise

import numpy
import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from torch import Tensor

from qlora_api.spec.training import QuantizationSpec

BLOCK = 64
"""Weights that share one quantization constant (arXiv 2305.14314, section 3)."""
OUTER_BLOCK = 256
"""Constants that share one constant of the second level (double quantization)."""
_FLOAT32_BYTES = 4
_CODE_BYTES = 16 * _FLOAT32_BYTES
_CONSTANTS_CODE_BYTES = 256 * _FLOAT32_BYTES


def layer_bytes(parameters: int, *, double_quant: bool) -> int:
    """Bytes of a layer of so many weights, constants and tables included."""
    blocks = -(-parameters // BLOCK)
    weights = -(-parameters // 2) + _CODE_BYTES
    if not double_quant:
        return weights + blocks * _FLOAT32_BYTES
    # Constants in 8 bit, for each outer block a float32, their mean, and the table of their 256 values.
    outer_blocks = -(-blocks // OUTER_BLOCK)
    return weights + blocks + outer_blocks * _FLOAT32_BYTES + _FLOAT32_BYTES + _CONSTANTS_CODE_BYTES


_EXPONENTS = 7


@cache
def dynamic_map() -> Tensor:
    """The 256 values, float32, in ascending order (arXiv 1511.04561). Do not change them.

    bitsandbytes' `create_dynamic_map` rounds once or twice, as the CPU multiplies and adds. Here products and sums are
    computed in 64 bit and rounded once, whatever the CPU: quantized constants depend on the values.
    """
    values = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        count = 2**exponent
        power = numpy.float32(10.0 ** (exponent - _EXPONENTS + 1))
        for low, high in pairwise(_evenly_spaced(count)):
            value = float(power * ((low + high) / numpy.float32(2)))
            values += [value, -value]
    # Models are built on the meta device, and these values are kept.
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def _evenly_spaced(count: int) -> list[numpy.float32]:
    """`count` steps from 0.1 to 1, up to the middle and down from the last."""
    first, last = numpy.float32(0.1), numpy.float32(1)
    step = float((last - first) / numpy.float32(count))
    middle = (count + 1) // 2
    up = [numpy.float32(float(first) + step * place) for place in range(middle)]
    return up + [numpy.float32(float(last) - step * (count - place)) for place in range(middle, count + 1)]


class NearestValues:
    """Quantizes blocks of 64 weights, and reuses its working memory.

    bitsandbytes compares each weight with the fifteen means of neighboring values. Here all weights of a piece are
    compared with one mean after the other, in parallel: the bytes are the same, 3.4 times as fast
    (`python -m benchmarks.base`).
    """

    def __init__(self, kind: str, weights: int) -> None:
        """Create for pieces of up to `weights` weights. `kind` is "nf4" or "fp4"."""
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


BASE_DTYPE = torch.bfloat16
"""The type that a weight is rounded to before it is quantized, and that it is dequantized to in 16-bit runs."""
PIECE = 2**18
"""Weights that are quantized together. Each takes twelve bytes of working memory, which fit in the caches."""


def quantize(weight: Tensor, quantization: QuantizationSpec) -> Mapping[str, Tensor]:
    """The tensors of a 4-bit layer for a floating point `weight` of any shape, named as in a checkpoint after `weight`.

    These are "" (two weights a byte, [bytes, 1]), ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4" or `fp4`,
    and with double quantization ".nested_absmax" and ".nested_quant_map" (arXiv 2305.14314, section 3).

    Every byte is as bitsandbytes makes it on a CPU with AVX2, except for the mean that double quantization subtracts
    from the constants. bitsandbytes adds in 32 bit, in an order that depends on the number of threads; here the sum is
    exact. The two differ by less than 2^-24 times the mean and the number of constants.
    Raises ValueError if a weight is infinite or not a number.
    """
    packed, absmax = _in_pieces(weight.detach().reshape(-1), quantization.type)
    if not absmax.isfinite().all():
        raise ValueError("it has values that are infinite or not a number")
    offset, outer = None, None
    if quantization.double_quant:
        total = math.fsum(chain.from_iterable(piece.tolist() for piece in absmax.split(PIECE // BLOCK)))
        offset = torch.tensor(total / absmax.numel(), dtype=torch.float32)
        code = dynamic_map()
        absmax, outer_absmax = torch.ops.bitsandbytes.quantize_blockwise.default(absmax.sub_(offset), code, OUTER_BLOCK)
        outer = QuantState(absmax=outer_absmax, code=code, blocksize=OUTER_BLOCK, dtype=torch.float32)
    state = QuantState(
        absmax=absmax,
        shape=weight.shape,
        code=get_4bit_type(quantization.type, device=torch.device("cpu")),
        blocksize=BLOCK,
        quant_type=quantization.type,
        dtype=BASE_DTYPE,
        offset=offset,
        state2=outer,
    )
    return {"": packed, **{f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}


def _in_pieces(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    packed = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
    absmax = torch.empty(-(-weight.numel() // BLOCK), dtype=torch.float32)
    whole = weight.numel() // BLOCK * BLOCK
    nearest = NearestValues(kind, min(PIECE, whole))
    for first in range(0, whole, PIECE):
        end = min(first + PIECE, whole)
        rounded = weight[first:end].to(BASE_DTYPE)
        nearest.quantize(rounded, packed[first // 2 : end // 2], absmax[first // BLOCK : end // BLOCK])
    if whole < weight.numel():
        rest = weight[whole:].to(BASE_DTYPE)
        packed[whole // 2 :], absmax[-1:] = torch.ops.bitsandbytes.quantize_4bit.default(rest, BLOCK, kind, torch.uint8)
    return packed, absmax
