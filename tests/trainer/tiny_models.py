"""A tiny random base model, prepared data for it, and the context of a train step: what the trainer's tests start from."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_api.contract import WorkspaceLayout
from qlora_api.status import DatasetStatus, MemoryStatus
from qlora_api.v1alpha1 import QLoRAJobDocument
from qlora_trainer.failures import StopRequest
from qlora_trainer.family import inspect_family
from qlora_trainer.packing import pack
from qlora_trainer.prepared import TokenizedRows, split_file, write_split
from qlora_trainer.records import PrepareRecord, RecordWriter, TrainRecord, write_completion
from qlora_trainer.step import Mounts, StepContext
from qlora_trainer.train import train

VOCABULARY = 512
SHORT_ROWS = (9, 14, 5, 21, 12, 30, 7, 16, 25, 11, 18, 6, 13, 28, 10, 22)


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    """Two blocks of 64 features with grouped-query attention; every linear layer has a size that bitsandbytes likes."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return LlamaConfig(**(settings | changes))


def write_tiny_llama(folder: Path, **changes: Any) -> Path:
    """config.json and random weights in bfloat16, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        LlamaForCausalLM(tiny_llama_config(**changes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_data(folder: Path, lengths: tuple[int, ...] = SHORT_ROWS, capacity: int = 64, *, packed: bool = True) -> Path:
    """Rows of a repeating pattern of tokens, which a model can learn; the latter half of each row is the target."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows_of_split in (("train", lengths), ("eval", lengths[:4])):
        rows = TokenizedRows()
        for number, length in enumerate(rows_of_split):
            tokens = [3 + (number * 17 + position * 5) % 50 for position in range(length)]
            rows.append(tokens, [position >= length // 2 for position in range(length)])
        arrangement = pack(rows.lengths, capacity) if packed else [[row] for row in range(len(rows))]
        write_split(split_file(folder, "train" if split == "train" else "eval"), rows, arrangement)
    (folder / "manifest.json").write_text(json.dumps({"fingerprint": "test"}))
    return folder


def document(**spec: Any) -> QLoRAJobDocument:
    """A job over the tiny model; `spec` replaces whole parts of the spec."""
    base: dict[str, Any] = {
        "model": {"source": "pvc://models/tiny"},
        "dataset": {"source": "pvc://data/rows.jsonl", "eval": {"fraction": 0.2}},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "training": {"maxSteps": 6, "gradientAccumulationSteps": 2, "learningRate": 0.01, "evalEverySteps": 2},
    }
    return QLoRAJobDocument.model_validate(
        {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRAJob",
            "metadata": {"name": "tiny", "uid": "job-uid"},
            "spec": base | spec,
        }
    )


def prepared_workspace(root: Path, model: Path, job: QLoRAJobDocument, *, packed: bool = True) -> StepContext:
    """A workspace in which prepare is done, and the context of the train step in it."""
    workspace = WorkspaceLayout(root)
    write_data(workspace.data / "test", packed=packed)
    family = inspect_family(model, job.spec.lora)
    record = PrepareRecord(
        fingerprint="prepared",
        model_path=str(model),
        model_revision="sha256:tiny",
        data_path="data/test",
        target_modules=family.target_modules,
        packed=packed,
        model_type=family.model_type,
        memory=MemoryStatus(estimate_bytes=1, low_bytes=1, high_bytes=1, verdict="unknown"),
        dataset=DatasetStatus(format="text", rows=len(SHORT_ROWS), used_rows=len(SHORT_ROWS)),
    )
    write_completion(workspace.completion("prepare"), record)
    return StepContext(job, workspace, Mounts(), "cpu", "pod-uid", 1, str(root))


def fixed_now() -> datetime:
    """A time that stands still."""
    return datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def run_train(context: StepContext, stop: StopRequest | None = None, stream: StringIO | None = None) -> TrainRecord:
    """The train step with a clock that ticks a second at every look."""
    clock = ticking()
    records = RecordWriter(stream or StringIO(), clock)
    return train(context, records, stop=stop or StopRequest(), now=fixed_now, monotonic=clock)


def ticking() -> Callable[[], float]:
    """A clock that goes on by a second whenever it is asked."""
    seconds = iter(range(10**9))
    return lambda: float(next(seconds))
