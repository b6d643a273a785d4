"""A prepared workspace, and the train step over it, for the trainer's tests."""

import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import pytest
from transformers import AutoTokenizer

from qlora_api.artifact_status import BaseStatus
from qlora_api.contract import WorkspaceLayout
from qlora_api.schema import replace
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.status import DatasetStatus, MemoryStatus
from qlora_trainer.core.completion import PrepareRecord, TrainRecord, read_completion, write_completion
from qlora_trainer.core.context import Mounts, StepContext
from qlora_trainer.core.failures import Interrupted, StepFailure, StopRequest
from qlora_trainer.data.examples.example import TokenizedRow
from qlora_trainer.data.examples.row_check import RowCheck
from qlora_trainer.data.packing import one_row_each, pack
from qlora_trainer.data.prepared import guard_split, split_file, write_split
from qlora_trainer.data.statistics import DataStatistics, Lengths, SourceStatistics, SplitStatistics
from qlora_trainer.data.tokenize.chunks import Chunk, TokenizedRows
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.kernels.attention import ATTENTION
from qlora_trainer.steps.train import train
from tests.support.manifests import merged
from tests.support.models.four_bit import convert
from tests.support.models.tiny import JOB_UID, POD_UID, Recorded
from tests.support.resolved import TRAINING

ROW_LENGTHS = (9, 14, 5, 21, 12, 30, 7, 16, 25, 11, 18, 6, 13, 28, 10, 22)
RARE_TOKEN = 500
"""A token that only the longest row has."""


def job(spec: dict[str, Any] | None = None) -> QLoRAJobDocument:
    """Return a job of six steps with dropout, accumulation, evaluation and decay."""
    default = {
        "model": {"source": "pvc://models/tiny"},
        "dataset": {"source": "pvc://data/rows.jsonl", "eval": {"fraction": 0.2}},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "training": TRAINING
        | {
            "maxSteps": 6,
            "gradientAccumulationSteps": 2,
            "learningRate": 0.01,
            "scheduler": "cosine",
            "warmupSteps": 2,
            "weightDecay": 0.01,
            "evalEverySteps": 2,
            "saveEverySteps": 2,
            "samples": 0,
        },
    }
    return QLoRAJobDocument.model_validate(
        {
            "apiVersion": "qlora.dev/v1beta1",
            "kind": "QLoRAJob",
            "metadata": {"name": "tiny", "uid": JOB_UID},
            "spec": merged(default, spec or {}),
        }
    )


def write_data(
    folder: Path,
    *,
    packed: bool,
    pairs: bool = False,
    checks: Sequence[str] | None = None,
    lengths: Sequence[int] = ROW_LENGTHS,
) -> None:
    """Rows of a pattern that a model can learn; the latter half of each row is the target. Four rows are held out.

    As `pairs` each row is a chosen answer, and a rejected one that repeats a token follows it. `checks` are those that
    the held-out rows bring, in their order.
    """
    folder.mkdir(parents=True)
    statistics = {}
    for split, of_split in (("train", lengths), ("eval", lengths[:4])):
        rows = []
        for number, length in enumerate(of_split):
            tokens = [3 + (number * 17 + position * 5) % 50 for position in range(length)]
            tokens[0] = RARE_TOKEN if length == max(lengths) else tokens[0]
            targets = numpy.arange(length) >= length // 2
            row = TokenizedRow(numpy.array(tokens, dtype=numpy.int32), targets)
            rows.append(_with_rejected(row) if pairs else row)
        tokenized = TokenizedRows([Chunk.from_rows(rows)])
        used = numpy.arange(len(rows))
        sequences = pack(used, tokenized.lengths, 64, seed=0) if packed else one_row_each(used)
        brought = None
        if checks is not None and split == "eval":
            brought = [RowCheck(f"row {row}", checks[row]).dump() for row in sequences.rows]
        write_split(split_file(folder, "train" if split == "train" else "eval"), tokenized, sequences, checks=brought)
        statistics[split] = SplitStatistics.from_rows(tokenized, sequences, 64, packed=packed)
    source = SourceStatistics(
        uri="pvc://data/rows.jsonl",
        files=("rows.jsonl",),
        file_count=1,
        sha256="0" * 64,
        format="text",
        columns=("text",),
        ignored_columns=(),
        rows_read=len(lengths),
        lengths=Lengths.from_lengths(numpy.array(lengths, dtype=numpy.int32)),
    )
    DataStatistics(sources=(source,), train=statistics["train"], eval=statistics["eval"]).write(folder)
    (folder / "manifest.json").write_text(json.dumps({"fingerprint": "rows"}))


def write_held_out(folder: Path, model: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Replace `write_data`'s held-out rows by these prompts and answers, in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    written = []
    for prompt, answer in rows:
        asked, answered = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
        targets = numpy.arange(len(asked) + len(answered)) >= len(asked)
        written.append(TokenizedRow(numpy.array(asked + answered, dtype=numpy.int32), targets))
    used = numpy.arange(len(written))
    write_split(split_file(folder, "eval"), TokenizedRows([Chunk.from_rows(written)]), one_row_each(used), checks=None)


def guard_by_held_out(context: StepContext) -> StepContext:
    """Give the guards of the job, as prepare would, the rows that are held out."""
    folder, guards = context.workspace.data / "rows", context.spec.guards
    for guard in guards:
        shutil.copyfile(split_file(folder, "eval"), split_file(folder, guard_split(guard.name)))
    return with_record(context, guards={guard.name: "0" * 64 for guard in guards})


def _with_rejected(row: TokenizedRow) -> TokenizedRow:
    rejected = numpy.where(row.is_target, 3, row.input_ids).astype(numpy.int32)
    return TokenizedRow(
        numpy.concatenate([row.input_ids, rejected]), numpy.tile(row.is_target, 2), chosen_length=len(row.input_ids)
    )


def prepared(
    root: Path,
    model: Path,
    spec: dict[str, Any] | None = None,
    *,
    packed: bool = True,
    pairs: bool = False,
    checks: Sequence[str] | None = None,
    lengths: Sequence[int] = ROW_LENGTHS,
) -> StepContext:
    """The context of the train step in a new workspace that prepare has filled."""
    document = job(spec)
    workspace = WorkspaceLayout(root)
    write_data(workspace.data / "rows", packed=packed, pairs=pairs, checks=checks, lengths=lengths)
    family = inspect_family(model, document.spec.lora)
    base_sha256 = convert(model, workspace.base, document.spec.quantization)
    record = PrepareRecord(
        fingerprint="rows",
        model_path=str(model),
        base_path=workspace.base.name,
        base_sha256=base_sha256,
        model_revision="sha256:tiny",
        data_path="data/rows",
        target_modules=family.target_modules,
        packed=packed,
        rows_apart=family.keeps_rows_apart(64),
        mixture_of_experts=family.mixture_of_experts,
        experts_in_mxfp4=family.experts_in_mxfp4,
        model_type=family.model_type,
        fixed_positions=family.fixed_positions,
        attention=None if family.attention == ATTENTION else family.attention,
        memory=MemoryStatus(estimate_bytes=1, low_bytes=1, high_bytes=1, verdict="unknown"),
        dataset=DatasetStatus(format="text", rows=len(lengths), used_rows=len(lengths)),
        base=BaseStatus(origin="volume", sha256=base_sha256),
    )
    write_completion(workspace.completion("prepare"), record)
    return context_of(root, document)


def context_of(root: Path, document: QLoRAJobDocument) -> StepContext:
    """The context of the train step in that workspace."""
    return StepContext(document, WorkspaceLayout(root), Mounts(), "cpu", POD_UID, 1, str(root))


def run(context: StepContext, *, stop: StopRequest | None = None, records: Recorded | None = None) -> TrainRecord:
    """The train step, with a fixed time and a stopwatch that ticks at every reading."""
    ticks = iter(range(10**9))
    return train(
        context,
        records or Recorded(),
        stop=stop or StopRequest(),
        now=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        monotonic=lambda: float(next(ticks)),
    )


class StopAtStep(Recorded):
    """Requests a stop at the report of `step` steps, as a signal would."""

    def __init__(self, step: int, stop: StopRequest) -> None:
        super().__init__()
        self._step, self._stop = step, stop

    def progress(self, record: Any, *, force: bool = False) -> None:
        super().progress(record, force=force)
        if record.training_step >= self._step:
            self._stop.set()


class Lost(BaseException):
    """An attempt that ends without warning, as with SIGKILL."""


class LostAtStep(Recorded):
    """Records that end the attempt without warning."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def progress(self, record: Any, *, force: bool = False) -> None:
        if record.training_step == self._step:
            raise Lost
        super().progress(record, force=force)


def failure(context: StepContext, **settings: Any) -> StepFailure:
    """How an attempt ends that must fail."""
    with pytest.raises(StepFailure) as caught:
        run(context, **settings)
    return caught.value


def interrupted_at(context: StepContext, step: int) -> None:
    """An attempt that is asked to stop as soon as `step` steps are done."""
    stop = StopRequest()
    with pytest.raises(Interrupted) as caught:
        run(context, stop=stop, records=StopAtStep(step, stop))
    assert caught.value.training_step == step


def history(context: StepContext) -> list[dict[str, float]]:
    """Return metrics.jsonl without speed and memory, which no two runs share."""
    lines = (context.workspace.report / "metrics.jsonl").read_text().splitlines()
    assert lines
    return [
        {name: value for name, value in json.loads(line).items() if name not in ("tokensPerSecond", "memoryBytes")}
        for line in lines
    ]


def with_record(context: StepContext, **changes: Any) -> StepContext:
    """The same job with another record of prepare."""
    path = context.workspace.completion("prepare")
    record = read_completion(path, PrepareRecord)
    assert record is not None
    write_completion(path, replace(record, **changes))
    return context


def adapter_bytes(context: StepContext) -> bytes:
    """The trained adapter's file."""
    return (context.workspace.trained / "adapter_model.safetensors").read_bytes()
