"""Jobs that are trained together, and their results."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora_api.artifact_status import InitialAdapterStatus
from qlora_trainer.core.completion import PrepareRecord, read_completion, write_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StopRequest
from qlora_trainer.core.file_names import ADAPTER_FILE
from qlora_trainer.steps.train_together import train_together
from tests.support.manifests import merged
from tests.support.models.tiny import Recorded
from tests.support.training import ROW_LENGTHS, prepared, run

# The jobs differ in data, length, adapter, its layers and beginning, rate, evaluations, what is kept, and the end.
OTHER_DATA = {"source": "pvc://data/other.jsonl"}
PLAIN: dict[str, Any] = {"lora": {"dropout": 0}}
OTHER_LENGTHS = (9, 31, 17, 40, 12, 25, 38)
JOBS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "wide": {
        "lora": {"dropout": 0, "rank": 8, "targetModules": ["q_proj", "up_proj"]},
        "training": {"seed": 5, "learningRate": 0.02},
        "dataset": OTHER_DATA,
    },
    "long": {
        "lora": {"dropout": 0},
        "training": {"seed": 7, "maxSteps": 9, "gradientAccumulationSteps": 3},
        "dataset": OTHER_DATA,
    },
    "best": {
        "lora": {"dropout": 0},
        "training": {"seed": 9, "keep": "best", "optimizer": "adamw", "evalEverySteps": 1},
    },
    # No evaluation improves so much: it ends after five steps, one after the stop below.
    "further": {
        "lora": {"dropout": 0, "from": {"source": "pvc://adapters/earlier"}},
        "training": {"seed": 11, "evalEverySteps": 1, "earlyStopping": {"patience": 5, "minDelta": 0.5}},
    },
}


def contexts(root: Path, model: Path, jobs: dict[str, dict[str, Any]] = JOBS) -> list[StepContext]:
    """A prepared workspace for each job."""
    made = {
        name: prepared(root / name, model, spec, lengths=OTHER_LENGTHS if "dataset" in spec else ROW_LENGTHS)
        for name, spec in jobs.items()
    }
    further = [context for context in made.values() if context.spec.lora.initial_adapter is not None]
    if further:
        earlier = prepared(root / "earlier", model, merged(PLAIN, {"training": {"maxSteps": 1, "warmupSteps": 0}}))
        sha256 = run(earlier).adapter_sha256
        for context in further:
            begins_with(context, earlier, sha256)
    return list(made.values())


def begins_with(context: StepContext, earlier: StepContext, sha256: str) -> None:
    """Note the adapter of an earlier job as what prepare has found for spec.lora.from."""
    shutil.copytree(earlier.workspace.trained, context.workspace.initial_adapter)
    path = context.workspace.completion("prepare")
    record = read_completion(path, PrepareRecord)
    assert record is not None
    status = InitialAdapterStatus(source="pvc://adapters/earlier", sha256=sha256)
    write_completion(path, record.model_copy(update={"initial_adapter": status}))


def together(
    jobs: list[StepContext],
    records: list[Recorded] | None = None,
    stop: StopRequest | None = None,
    monotonic: Callable[[], float] = lambda: 0.0,
) -> Any:
    """The results of training the jobs together."""
    records = records or [Recorded() for _ in jobs]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return train_together(jobs, records, stop=stop or StopRequest(), now=lambda: now, monotonic=monotonic)


def apart(job: StepContext, other: StepContext) -> float:
    """The distance of two adapters, relative to the norm of the second."""
    one, two = (
        torch.cat([t.flatten() for _, t in sorted(load_file(of.workspace.trained / ADAPTER_FILE).items())])
        for of in (job, other)
    )
    return float((one - two).norm() / two.norm())
