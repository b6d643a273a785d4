"""Saves checkpoints and finds the newest, also in a child process."""

import os
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.training.checkpoints.checkpoint import newest_checkpoint, save_checkpoint
from qlora_trainer.training.progress.run_state import RunState

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def state_of(step: int) -> dict[str, Any]:
    """Common content of a run's checkpoints; its loss is the step."""
    return {
        "fingerprint": {"seed": 0},
        "threads": 1,
        "processor": "a kind",
        "historyBytes": 0,
        "savedAt": "2026-01-02T03:04:05Z",
        "run": asdict(RunState(step=step, loss=float(step))),
    }


def tensors_of(step: int, size: int = 100) -> dict[str, dict[str, Tensor]]:
    """The content of a checkpoint of this step."""
    return {"adapter": {"a": torch.full((size,), float(step))}, "optimizer": {"m": torch.arange(size)}}


def save(folder: Path, *steps: int, size: int = 100) -> None:
    for step in steps:
        save_checkpoint(folder, step, tensors_of(step, size), state_of(step))


def save_for_ever(folder: Path, saved: Connection) -> None:
    """Continue from the newest checkpoint, save each next step, and send its number."""
    step = newest_step(folder) or 0
    while True:
        step += 1
        save(folder, step, size=1000)
        saved.send(step)


def newest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint that verifies; its content must be that step's."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        return None
    assert checkpoint.state.run.loss == checkpoint.step
    assert checkpoint.tensors("adapter")["a"].eq(checkpoint.step).all()
    assert torch.equal(checkpoint.tensors("optimizer")["m"], torch.arange(len(checkpoint.tensors("optimizer")["m"])))
    return checkpoint.step


def in_child(action: Callable[[], None]) -> int:
    """Return `action`'s wait status in a fork, where PyTorch computes nothing large."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:  # noqa: BLE001 - the child must not go on as a second pytest
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]
