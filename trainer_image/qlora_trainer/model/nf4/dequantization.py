"""Corrects bitsandbytes' dequantization on a CPU for weights of any shape."""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import cast

import bitsandbytes  # noqa: F401 - defines the operation
import torch
from torch import Tensor

_NAMESPACE, _OPERATION, _DEVICE = "bitsandbytes", "dequantize_4bit", "CPU"


@cache
def correct_dequantization() -> torch.library.Library:
    """Put a kernel before that of `bitsandbytes::dequantize_4bit` for CPUs which gives it rows of whole blocks only.

    The library's own begins a block with each row, if rows are of even length. Blocks of 64 weights were quantized
    across rows, and GPUs dequantize them so: in a weight of [64, 32] every second row would get the constant of another
    block. This operation computes the weights that a 4-bit layer multiplies with on a CPU, that PEFT adds an adapter
    to, and that are merged. Weights whose rows are a multiple of a block, as in nearly every model, are not affected.
    The returned registration lasts as long as the process, and is made once.
    """
    theirs = torch.library.get_kernel(f"{_NAMESPACE}::{_OPERATION}", _DEVICE)

    def dequantize(
        keys: torch.DispatchKeySet,
        packed: Tensor,
        absmax: Tensor,
        block: int,
        kind: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        def given(bytes_of: Tensor, constants: Tensor, rows: Sequence[int]) -> Tensor:
            return cast("Tensor", theirs.call_boxed(keys, bytes_of, constants, block, kind, list(rows), dtype))

        # Rows of odd length take another path in the library, which is right.
        if shape[-1] % block == 0 or shape[-1] % 2:
            return given(packed, absmax, shape)
        blocks, rest = divmod(prod(shape), block)
        flat, whole = packed.reshape(-1).view(torch.uint8), blocks * block // 2
        dense = given(flat[:whole], absmax[:blocks], (blocks, block)).view(-1) if blocks else absmax.new_empty(0)
        if rest:
            dense = torch.cat([dense.to(dtype), given(flat[whole:], absmax[blocks:], (1, rest)).view(-1)])
        return dense.view(*shape)

    library = torch.library.Library(_NAMESPACE, "IMPL")
    library.impl(_OPERATION, dequantize, _DEVICE, with_keyset=True, allow_override=True)
    return library
