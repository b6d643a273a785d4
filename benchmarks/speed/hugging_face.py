"""Shared by the compared systems: the quantized base as they load it, and the rows as their tokens."""

import json
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks.speed.settings import ALPHA, RANK


def load_base(folder: Path, device: str = "cpu", attention: str = "sdpa") -> Any:
    """Load the base in NF4, double quantized, with bf16 products."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        dtype=torch.bfloat16,
        attn_implementation=attention,
        device_map=device,
        local_files_only=True,
    )
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # Otherwise an evaluation on a CPU with AVX512-BF16 repacks the weights for a path without gradients.
            layer.support_avx512bf16_for_cpu = False
    return model


def lora_config(rank: int = RANK, alpha: int = ALPHA) -> LoraConfig:
    """Adapters on every linear layer of the blocks."""
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules="all-linear")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokenized(model: Path, path: Path) -> list[list[int]]:
    """The tokens of each row, through the model's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in read_rows(path)]


class CountingCollator:
    """Wraps a collator and counts each micro batch's rows, and tokens but padding."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator
        self._tokens: list[int] = []
        self._rows: list[int] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch."""
        self._tokens.append(sum(len(example["input_ids"]) for example in examples))
        # Where rows are packed, TRL keeps the length of each.
        self._rows.append(sum(len(example.get("seq_lengths", "1")) for example in examples))
        batch: dict[str, Tensor] = self._collator(examples)
        return batch

    def by_step(self, steps: int, accumulation: int) -> tuple[list[int], list[int]]:
        """Return tokens and rows of each step that was used: the loader reads ahead."""

        def sums(values: list[int]) -> list[int]:
            return [sum(values[step * accumulation : (step + 1) * accumulation]) for step in range(steps)]

        return sums(self._tokens), sums(self._rows)
