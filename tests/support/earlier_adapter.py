"""Jobs that begin with the adapter of an earlier job, and that job."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_api.contract import WorkspaceLayout
from qlora_api.spec.job import QLoRAJobDocument
from qlora_trainer.core.completion import PublishRecord, TrainRecord
from qlora_trainer.core.context import Mounts, StepContext
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from tests.support.manifests import merged
from tests.support.models.tiny import JOB_UID, POD_UID, Recorded, chat_row, write_rows
from tests.support.resolved import TRAINING
from tests.support.training import run

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FROM = {"source": "pvc://adapters/first"}


@dataclass(frozen=True)
class Place:
    """Where a test's jobs have their claims and workspaces."""

    root: Path
    models: Path

    @property
    def adapter(self) -> Path:
        """Published files of the first job."""
        return self.root / "adapters" / "first"

    def context(self, name: str, spec: dict[str, Any] | None = None) -> StepContext:
        """A job with a workspace of this name."""
        default = {
            "model": {"source": "pvc://models/model"},
            "dataset": {"source": "pvc://data/train.jsonl", "eval": {"fraction": 0.2}},
            "lora": {"rank": 4, "alpha": 8},
            "training": TRAINING
            | {
                "maxSteps": 4,
                "gradientAccumulationSteps": 2,
                "maxSequenceLength": 64,
                "learningRate": 0.01,
                "evalEverySteps": 2,
                "saveEverySteps": 2,
                "samples": 0,
            },
            "output": {"destination": f"pvc://adapters/{name}"},
        }
        document = {
            "apiVersion": "qlora.dev/v1beta1",
            "kind": "QLoRAJob",
            "metadata": {"name": name, "uid": JOB_UID},
            "spec": merged(default, spec or {}),
        }
        return StepContext(
            document=QLoRAJobDocument.model_validate(document),
            workspace=WorkspaceLayout(self.root / name),
            mounts=Mounts(claims={"models": self.models, **{n: self.root / n for n in ("data", "adapters")}}),
            device="cpu",
            pod_uid=POD_UID,
            attempt=1,
            workspace_uri=f"pvc://work/{name}",
        )


def published(context: StepContext) -> PublishRecord:
    """Publish the job."""
    return publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))


def run_earlier(root: Path, models: Path) -> tuple[Place, TrainRecord]:
    """Run and publish the first job. Returns the record of its training."""
    place = Place(root, models)
    rows = [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(20)]
    write_rows(root / "data" / "train.jsonl", rows)
    (root / "adapters").mkdir()
    context = place.context("first")
    prepare(context, Recorded())
    record = run(context)
    published(context)
    return place, record
