"""Runs TRL's SFTTrainer with QLoRA as its documentation shows, with its defaults, without or with packing."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks.speed.hugging_face import CountingCollator, load_base, lora_config, read_rows
from benchmarks.speed.instrument import Instrument
from benchmarks.speed.settings import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MAX_LENGTH,
    ROWS_PER_STEP,
    SEED,
    SEQUENCES_PER_STEP,
    Inputs,
)

DEFAULT_BATCH = 8
"""TRL's default per_device_train_batch_size."""


def train(inputs: Inputs, instrument: Instrument, *, packing: bool) -> tuple[list[int], list[int]]:
    """Train; returns the tokens and the rows of each step."""
    instrument.install()
    return fit(
        load_base(inputs.model),
        inputs.model,
        Dataset.from_list(read_rows(inputs.train)),
        lora_config(),
        output_dir=str(inputs.folder / "trl"),
        max_steps=instrument.total_steps,
        per_device_train_batch_size=1 if packing else DEFAULT_BATCH,
        gradient_accumulation_steps=SEQUENCES_PER_STEP if packing else ROWS_PER_STEP // DEFAULT_BATCH,
        packing=packing,
        max_length=MAX_LENGTH,
        gradient_checkpointing=inputs.recomputes,
        use_cpu=True,
    )


def fit(
    base: Any, tokenizer: Path, rows: Dataset, peft_config: LoraConfig | None, **settings: Any
) -> tuple[list[int], list[int]]:
    """Train the base with settings of SFTConfig; returns the tokens and the rows of each step."""
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            bf16=True,
            save_strategy="no",
            report_to="none",
            seed=SEED,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(tokenizer, local_files_only=True),
        peft_config=peft_config,
    )
    trainer.data_collator = counted = CountingCollator(trainer.data_collator)
    trainer.train()
    return counted.by_step(settings["max_steps"], settings["gradient_accumulation_steps"])
