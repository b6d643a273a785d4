"""Has a model answer prompts: greedy, in batches, for every arm in the same way."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qlora_trainer.model.nf4.quantization import COMPUTE_DTYPE

BATCH = 50
"""Prompts that are answered at a time, padded on the left to the longest of them."""


def answers(model: Any, tokenizer_folder: Path, prompts: Sequence[str], longest: int) -> list[str]:
    """The answers, of at most `longest` tokens each, up to the token that ends them.

    The model must not be trained any further: it has transformers' attention from here on.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, padding_side="left")
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    network.set_attn_implementation("sdpa")
    model.eval()
    found: list[str] = []
    for first in range(0, len(prompts), BATCH):
        inputs = tokenizer(
            list(prompts[first : first + BATCH]), return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.no_grad(), torch.autocast("cpu", dtype=COMPUTE_DTYPE):
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        found += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found
