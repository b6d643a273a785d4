"""The 4-bit format of bitsandbytes: which weights share a constant, and the bytes of a layer."""

BLOCK = 64
"""Weights that share one quantization constant (arXiv 2305.14314, section 3)."""
OUTER_BLOCK = 256
"""Constants that share one constant of the second level, if they are quantized too."""
_FLOAT32_BYTES = 4
_CODE_BYTES = 16 * _FLOAT32_BYTES
_CONSTANTS_CODE_BYTES = 256 * _FLOAT32_BYTES


def layer_bytes(parameters: int, *, double_quant: bool) -> int:
    """Bytes of one layer of so many weights in the format of bitsandbytes.

    Two weights per byte, a constant for each block, and the table of the 16 values. Double quantization stores the
    constants in 8 bit: with a float32 for each outer block of them, their mean, and the table of their 256 values.
    """
    blocks = -(-parameters // BLOCK)
    weights = -(-parameters // 2) + _CODE_BYTES
    if not double_quant:
        return weights + blocks * _FLOAT32_BYTES
    outer_blocks = -(-blocks // OUTER_BLOCK)
    return weights + blocks + outer_blocks * _FLOAT32_BYTES + _FLOAT32_BYTES + _CONSTANTS_CODE_BYTES
