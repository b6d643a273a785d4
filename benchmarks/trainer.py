"""Runs this trainer as its pods do: the prepare step in a separate process, then the train step's function here."""

import io
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_api.contract import WorkspaceLayout
from qlora_trainer.core.context import Device, Mounts, StepContext, load_document
from qlora_trainer.core.failures import StopRequest
from qlora_trainer.core.process import set_environment
from qlora_trainer.core.records import RecordWriter

JOB = "job.json"
WORKSPACE = "workspace"
JOB_UID = "7d0c2f5e-0000-4000-8000-000000000003"


def prepare_command(folder: Path, model: Path, training: dict[str, Any], lora: dict[str, Any]) -> list[str]:
    """Return the command that prepares `folder`/train.jsonl with default settings."""
    (folder / JOB).write_text(
        json.dumps(
            {
                "apiVersion": "qlora.dev/v1beta1",
                "kind": "QLoRAJob",
                "metadata": {"name": "benchmark", "uid": JOB_UID},
                "spec": {
                    "model": {"source": "pvc://model"},
                    # No evaluation is part of a measured step.
                    "dataset": {"source": "pvc://data/train.jsonl", "eval": {"fraction": 0}},
                    "lora": lora,
                    "training": training,
                },
            }
        )
    )
    paths = [f"--job={folder / JOB}", f"--workspace={folder / WORKSPACE}"]
    volumes = [f"--volume=model={model}", f"--volume=data={folder}"]
    return [sys.executable, "-m", "qlora_trainer", "prepare", *paths, *volumes]


def prepared_context(
    folder: Path, model: Path, training: dict[str, Any], lora: dict[str, Any], device: Device = "cpu"
) -> StepContext:
    """Run prepare, and return the context of train.

    Raises CalledProcessError if it fails; see its record.
    """
    command = prepare_command(folder, model, training, lora)
    subprocess.run(command, check=True, env={**os.environ, "QLORA_DEVICE": device}, stdout=sys.stderr)
    return context_of(folder, model, device)


def context_of(folder: Path, model: Path, device: Device = "cpu") -> StepContext:
    """Return train's context in a prepared folder. PyTorch must not be loaded yet."""
    workspace = WorkspaceLayout(folder / WORKSPACE)
    set_environment("train", workspace.root, device=device)
    mounts = Mounts(claims={"model": model, "data": folder})
    return StepContext(load_document(folder / JOB), workspace, mounts, device, "local", 1, str(workspace.root))


def train_here(context: StepContext) -> None:
    """The train step, in this process."""
    from qlora_trainer.steps.train import train

    train(
        context,
        RecordWriter(io.StringIO(), time.monotonic),
        stop=StopRequest(),
        now=lambda: datetime.now(UTC),
        monotonic=time.monotonic,
    )
