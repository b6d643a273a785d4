"""Runs this trainer as its pods do: the prepare step in a process of its own, then the train step's function here."""

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
from qlora_trainer.failures import StopRequest
from qlora_trainer.process import set_environment
from qlora_trainer.records import RecordWriter
from qlora_trainer.step import Mounts, StepContext, load_document

JOB_UID = "7d0c2f5e-0000-4000-8000-000000000003"


def prepared_context(folder: Path, model: Path, training: dict[str, Any], lora: dict[str, Any]) -> StepContext:
    """The train step's context after prepare has laid `folder`/train.jsonl out; what is not set has its default.

    Raises CalledProcessError if prepare fails; its record says why.
    """
    document = folder / "job.json"
    document.write_text(
        json.dumps(
            {
                "apiVersion": "qlora.dev/v1alpha1",
                "kind": "QLoRAJob",
                "metadata": {"name": "benchmark", "uid": JOB_UID},
                "spec": {
                    "model": {"source": "pvc://model"},
                    "dataset": {"source": "pvc://data/train.jsonl"},
                    "lora": lora,
                    "training": training,
                },
            }
        )
    )
    workspace = WorkspaceLayout(folder / "workspace")
    command = [sys.executable, "-m", "qlora_trainer", "prepare", "--job", document, "--workspace", workspace.root]
    volumes = ["--volume", f"model={model}", "--volume", f"data={folder}"]
    subprocess.run([*command, *volumes], check=True, env={**os.environ, "QLORA_DEVICE": "cpu"}, stdout=sys.stderr)
    set_environment("train", workspace.root)
    mounts = Mounts(claims={"model": model, "data": folder})
    return StepContext(load_document(document), workspace, mounts, "cpu", "local", 1, str(workspace.root))


def train_here(context: StepContext) -> None:
    """The train step, in this process."""
    from qlora_trainer.train import train

    train(
        context,
        RecordWriter(io.StringIO(), time.monotonic),
        stop=StopRequest(),
        now=lambda: datetime.now(UTC),
        monotonic=time.monotonic,
    )
