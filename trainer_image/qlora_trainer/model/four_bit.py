"""Quantizes a weight to the 4-bit format of bitsandbytes, in pieces and to the same bytes on every machine."""

import math
from collections.abc import Mapping
from itertools import chain

import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from torch import Tensor

from qlora_api.training import QuantizationSpec
from qlora_trainer.model.dynamic_map import dynamic_map
from qlora_trainer.model.layer_format import BLOCK, OUTER_BLOCK
from qlora_trainer.model.nearest_values import NearestValues

COMPUTE_DTYPE = torch.bfloat16
"""The type in which 4-bit layers multiply, and to which a weight is rounded before it is quantized."""
PIECE = 2**18
"""Weights that are quantized at a time. Each takes twelve bytes meanwhile, which should stay in the caches."""


def quantize(weight: Tensor, quantization: QuantizationSpec) -> Mapping[str, Tensor]:
    """The tensors of a 4-bit layer for a floating point `weight` of any shape, named as in a checkpoint after `weight`.

    These are "" (two weights a byte, [bytes, 1]), ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4" or `fp4`,
    and with double quantization ".nested_absmax" and ".nested_quant_map" (arXiv 2305.14314, section 3). Besides them
    it takes `PIECE` times 12 bytes, and 4 for each block of 64 weights.

    Every byte is as bitsandbytes makes it on a CPU, except where the mean of the constants matters, which double
    quantization subtracts from them, and on one without AVX2, where 42 of its 256 values for constants are others in
    their last bit (see `dynamic_map`). bitsandbytes adds in 32 bit, in an order that depends on the number of threads;
    here it is the exact sum, divided and rounded once. The two differ in the last bits, by less than 2^-24 times the
    mean and the number of constants; a constant that lies between two of its 256 values may then get the other one.
    Raises ValueError if a weight is infinite or not a number.
    """
    packed, absmax = _in_pieces(weight.detach().reshape(-1), quantization.type)
    if not absmax.isfinite().all():
        raise ValueError("it has values that are infinite or not a number")
    offset, outer = None, None
    if quantization.double_quant:
        offset = _mean(absmax)
        absmax, outer = _nested(absmax.sub_(offset))
    state = QuantState(
        absmax=absmax,
        shape=weight.shape,
        code=get_4bit_type(quantization.type, device=torch.device("cpu")),
        blocksize=BLOCK,
        quant_type=quantization.type,
        dtype=COMPUTE_DTYPE,
        offset=offset,
        state2=outer,
    )
    return {"": packed, **{f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()}}


def _in_pieces(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Packed weights and the largest magnitude of each block."""
    packed = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
    absmax = torch.empty(-(-weight.numel() // BLOCK), dtype=torch.float32)
    whole = weight.numel() // BLOCK * BLOCK
    nearest = NearestValues(kind, min(PIECE, whole))
    for first in range(0, whole, PIECE):
        end = min(first + PIECE, whole)
        rounded = weight[first:end].to(COMPUTE_DTYPE)
        nearest.quantize(rounded, packed[first // 2 : end // 2], absmax[first // BLOCK : end // BLOCK])
    if whole < weight.numel():
        rest = weight[whole:].to(COMPUTE_DTYPE)
        packed[whole // 2 :], absmax[-1:] = torch.ops.bitsandbytes.quantize_4bit.default(rest, BLOCK, kind, torch.uint8)
    return packed, absmax


def _mean(values: Tensor) -> Tensor:
    total = math.fsum(chain.from_iterable(piece.tolist() for piece in values.split(PIECE // BLOCK)))
    return torch.tensor(total / values.numel(), dtype=torch.float32)


def _nested(constants: Tensor) -> tuple[Tensor, QuantState]:
    """Constants of the first level in 8 bit, and those of the second level."""
    code = dynamic_map()
    eight_bit, absmax = torch.ops.bitsandbytes.quantize_blockwise.default(constants, code, OUTER_BLOCK)
    return eight_bit, QuantState(absmax=absmax, code=code, blocksize=OUTER_BLOCK, dtype=torch.float32)
