"""Runs TRL's SFTTrainer with QLoRA as its documentation shows, with its defaults, without or with packing."""

from datasets import Dataset
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
    micro_batch = 1 if packing else DEFAULT_BATCH
    accumulation = SEQUENCES_PER_STEP if packing else ROWS_PER_STEP // DEFAULT_BATCH
    steps = instrument.total_steps
    trainer = SFTTrainer(
        model=load_base(inputs.model),
        args=SFTConfig(
            output_dir=str(inputs.folder / "trl"),
            max_steps=steps,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            packing=packing,
            max_length=MAX_LENGTH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            gradient_checkpointing=True,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            seed=SEED,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(read_rows(inputs.train)),
        processing_class=AutoTokenizer.from_pretrained(inputs.model, local_files_only=True),
        peft_config=lora_config(),
    )
    trainer.data_collator = counted = CountingCollator(trainer.data_collator)
    trainer.train()
    return counted.by_step(steps, accumulation)
