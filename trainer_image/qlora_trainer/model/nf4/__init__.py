"""Weights in bitsandbytes' 4-bit format: quantizing, reading, dequantizing."""
