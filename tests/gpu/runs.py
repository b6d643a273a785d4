"""Jobs that the trainer's command line runs on a GPU, and their workspaces."""

import json
from pathlib import Path
from typing import Any

from tests.support.commands.command import Files, new_files
from tests.support.models.tiny import chat_row, write_rows


def on_gpu(files: Files, *steps: str) -> Files:
    """The same files after these steps; each must succeed."""
    for step in steps:
        done = files.run(step, QLORA_DEVICE="cuda")
        assert done.exit_code == 0, done.stdout + done.stderr
    return files


def on_cpu(files: Files, root: Path) -> Files:
    """A copy of prepared files, trained on the CPU."""
    there = files.copied(root)
    done = there.run("train", QLORA_DEVICE="cpu")
    assert done.exit_code == 0, done.stdout + done.stderr
    return there


def record(files: Files, step: str) -> dict[str, Any]:
    """The completion record of a step."""
    found: dict[str, Any] = json.loads((files.workspace / "records" / f"{step}.json").read_text())
    return found


def metrics(files: Files) -> list[dict[str, Any]]:
    """The lines of the history."""
    return [json.loads(line) for line in (files.workspace / "report" / "metrics.jsonl").read_text().splitlines()]


def losses(files: Files) -> list[float]:
    """The training loss of each step."""
    return [entry["loss"] for entry in metrics(files) if "loss" in entry]


def new_billion(root: Path, models: Path) -> Files:
    """Return an unprepared job with full sequences on a model of 1 billion parameters."""
    spec = {
        "lora": {"rank": 16, "alpha": 16},
        "training": {
            "maxSteps": 4,
            "maxSequenceLength": 2048,
            "evalEverySteps": 1000,
            "samples": 0,
            "microBatchSize": 2,
            "gradientAccumulationSteps": 2,
        },
    }
    files = new_files(root, models, spec)
    write_rows(
        files.data / "train.jsonl", [chat_row("Say it again. " * 20, "the same words " * 220) for _ in range(64)]
    )
    return files
