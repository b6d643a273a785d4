"""Prepares, trains and scores models for benchmarks, by the functions of the product."""

from typing import Literal

Arm = Literal["full", "lora", "nf4-dq"]
"""Full fine-tuning, LoRA on the base in 16 bit, and QLoRA on a base in NF4 with double quantization."""
