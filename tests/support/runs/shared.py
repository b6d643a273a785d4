"""Runs that many tests read, each in a folder that `kept` keeps."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.support.commands.command import ROWS, Files
from tests.support.manifests import merged
from tests.support.models.tiny import chat_row, write_rows
from tests.support.ranks import EXACT, TWO, succeeded, workspace

TOGETHER = merged(EXACT, TWO)


def make_fluent(folder: Path, model: Path) -> None:
    """Train a copy of the model on the tests' rows."""
    shutil.copytree(model, folder)
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    rows = torch.tensor([[3 + (number * 17 + position * 5) % 50 for position in range(30)] for number in range(16)])
    for _ in range(60):
        trained(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.to(torch.bfloat16).save_pretrained(folder)


def finished_files(folder: Path, model: Path) -> Files:
    """The job that `finish` runs."""
    return Files(folder, model.parent).with_spec({"training": {"samples": 1}})


def finish(folder: Path, model: Path) -> None:
    """Run all steps by the command line. One row is longer than a sequence may be."""
    files = finished_files(folder, model)
    write_rows(files.data / "train.jsonl", [*ROWS, chat_row("List all pods.", "kubectl get pods; " * 40)])
    for step in ("prepare", "train", "publish"):
        # Each step's log lists what it imports.
        done = files.run(step, PYTHONPROFILEIMPORTTIME="1")
        succeeded(done)
        (files.root / f"{step}.stdout").write_text(done.stdout)


def train_together(folder: Path, model: Path) -> None:
    """Train in two processes, each with the whole base."""
    files, _ = workspace(folder, model, TOGETHER, packed=False)
    # A true start of both.
    succeeded(files.run("train", ("env",)))
