"""Runs TRL's SFTTrainer with QLoRA, plain or through Unsloth, as their documentations show."""

from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import ALPHA, RANK, Case, Workload
from benchmarks.speed.settings import SEED

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def train(case: Case, workload: Workload, folder: Path, model: Path) -> dict[str, Any]:
    """Train; returns the measurement."""
    if case.system == "unsloth":
        base, peft_config = _unsloth(case, workload, model), None
    else:
        from benchmarks.speed.hugging_face import load_base, lora_config

        attention = "kernels-community/flash-attn2" if case.system == "trl-flash" else "sdpa"
        base, peft_config = load_base(model, workload.device, attention), lora_config(RANK, ALPHA)
    from datasets import Dataset

    from benchmarks.gpu.meter import Meter
    from benchmarks.speed.hugging_face import tokenized
    from benchmarks.speed.trl import fit

    rows = Dataset.from_dict({"input_ids": tokenized(model, folder / "train.jsonl")})
    meter = Meter(workload)
    meter.install()
    tokens, _rows = fit(
        base,
        model,
        rows,
        peft_config,
        output_dir=str(folder / "trained"),
        max_steps=workload.steps + 1,
        per_device_train_batch_size=case.micro_batch,
        gradient_accumulation_steps=case.accumulation,
        gradient_checkpointing=case.recompute,
        packing=True,
        max_length=workload.max_length,
        optim="adamw_torch",
        use_cpu=workload.device == "cpu",
        logging_strategy="no",
    )
    return meter.result(tokens)


def _unsloth(case: Case, workload: Workload, model: Path) -> Any:
    """The base with its adapter. Unsloth replaces classes of the other libraries, which are imported later."""
    from unsloth import FastLanguageModel

    # As its documentation advises: it also moves the inputs of blocks to main memory.
    recompute = "unsloth" if case.recompute else False
    base, _tokenizer = FastLanguageModel.from_pretrained(
        str(model),
        max_seq_length=workload.max_length,
        load_in_4bit=True,
        use_gradient_checkpointing=recompute,
    )
    return FastLanguageModel.get_peft_model(
        base,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=list(_LINEAR),
        use_gradient_checkpointing=recompute,
        random_state=SEED,
    )
