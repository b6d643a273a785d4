"""Runs the recipe of the QLoRA paper's program on today's plain transformers and PEFT.

As artidoro/qlora: PEFT's preparation for k-bit training, then LoRA weights and embeddings back to bf16 and norms in 32
bit, rows sorted by length, one row padded to the longest of its batch, 16 accumulated, paged 32-bit AdamW, a constant
rate and transformers' Trainer. Every token is trained on, as in the others.
"""

from typing import Any

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import Dataset
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from benchmarks.speed.hugging_face import CountingCollator, load_base, lora_config, tokenized
from benchmarks.speed.instrument import Instrument
from benchmarks.speed.settings import LEARNING_RATE, MAX_GRAD_NORM, ROWS_PER_STEP, SEED, Inputs

MICRO_BATCH = 1
"""The paper's scripts: per_device_train_batch_size 1, gradient_accumulation_steps 16."""


class _Rows(Dataset[dict[str, list[int]]]):
    """Tokenized rows, every token a label."""

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self._rows[index]
        return {"input_ids": row, "attention_mask": [1] * len(row), "labels": row}


def train(inputs: Inputs, instrument: Instrument) -> tuple[list[int], list[int]]:
    """Train; returns the tokens and the rows of each step."""
    instrument.install()
    steps, accumulation = instrument.total_steps, ROWS_PER_STEP // MICRO_BATCH
    tokenizer = AutoTokenizer.from_pretrained(inputs.model, local_files_only=True)
    collator = CountingCollator(DataCollatorForSeq2Seq(tokenizer))
    trainer = Trainer(
        model=_model(inputs),
        args=TrainingArguments(
            output_dir=str(inputs.folder / "original"),
            max_steps=steps,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="group_by_length",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            adam_beta2=0.999,
            optim="paged_adamw_32bit",
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            seed=SEED,
            disable_tqdm=True,
        ),
        train_dataset=_Rows(tokenized(inputs.model, inputs.train)),
        data_collator=collator,
    )
    trainer.train()
    return collator.by_step(steps, accumulation)


def _model(inputs: Inputs) -> Any:
    model = prepare_model_for_kbit_training(load_base(inputs.model), use_gradient_checkpointing=inputs.recomputes)
    model = get_peft_model(model, lora_config())
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            module.to(torch.bfloat16)
        elif "norm" in name:
            module.to(torch.float32)
        elif "lm_head" in name or "embed_tokens" in name:
            module.to(torch.bfloat16)
    return model
