"""Weights in the 4-bit format of bitsandbytes: quantizing, reading and dequantizing them."""
