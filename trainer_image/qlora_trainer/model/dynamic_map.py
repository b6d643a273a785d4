"""Computes the values of bitsandbytes' dynamic 8-bit type, to the same bits on every machine."""

from functools import cache
from itertools import pairwise

import numpy
import torch
from torch import Tensor

_EXPONENTS = 7


@cache
def dynamic_map() -> Tensor:
    """The 256 values, float32, in ascending order; do not change them (arXiv 1511.04561).

    For each of the exponents 10^-6 to 10^0, 1, 2, … 64 means of neighbors among evenly spaced numbers from 0.1 to 1,
    with both signs; 0 and 1. bitsandbytes' `create_dynamic_map` has PyTorch space them, which rounds once for each
    where the CPU multiplies and adds in one operation, as all with AVX2 do, and otherwise twice. Quantized constants
    depend on the values. Here products and sums are computed in 64 bit and rounded once, whatever the CPU.
    """
    values = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        count = 2**exponent
        edges = _evenly_spaced(count)
        power = numpy.float32(10.0 ** (exponent - _EXPONENTS + 1))
        for low, high in pairwise(edges):
            value = float(power * ((low + high) / numpy.float32(2)))
            values += [value, -value]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def _evenly_spaced(count: int) -> list[numpy.float32]:
    """`count` steps from 0.1 to 1: up from the first up to the middle, and down from the last beyond it."""
    first, last = numpy.float32(0.1), numpy.float32(1)
    step = float((last - first) / numpy.float32(count))
    middle = (count + 1) // 2
    up = [numpy.float32(float(first) + step * place) for place in range(middle)]
    return up + [numpy.float32(float(last) - step * (count - place)) for place in range(middle, count + 1)]
