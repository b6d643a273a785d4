"""Settings of all systems: the hyperparameters, the data and the measurement's length."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SystemName = Literal["ours", "trl", "trl-packing", "original"]
SYSTEMS: tuple[SystemName, ...] = ("ours", "trl", "trl-packing", "original")

SEED = 20260301
LEARNING_RATE = 5e-4
MAX_GRAD_NORM = 0.3
RANK = 64
ALPHA = 16
MAX_LENGTH = 1024
ROWS_PER_STEP = 16
"""Rows of an optimizer step. Where rows are packed: about, in `SEQUENCES_PER_STEP` sequences."""
SEQUENCES_PER_STEP = 3
TRAIN_ROWS = 800
HELD_OUT_ROWS = 16
TARGET_LOSS = 2.45
"""Evaluation loss whose time is measured, in natural logarithms."""


@dataclass(frozen=True)
class Inputs:
    """The files of one comparison, below one folder, and what else its runs share."""

    folder: Path
    model: Path
    recomputes: bool = True
    """Whether activations are recomputed in the backward pass, or kept."""

    @property
    def train(self) -> Path:
        """Rows to train on."""
        return self.folder / "train.jsonl"

    @property
    def held_out(self) -> Path:
        """Rows to evaluate on; no system sees them."""
        return self.folder / "held-out.jsonl"


def describe_settings() -> dict[str, Any]:
    """The settings as they go into the result."""
    return {
        "seed": SEED,
        "learningRate": LEARNING_RATE,
        "maxGradNorm": MAX_GRAD_NORM,
        "rank": RANK,
        "alpha": ALPHA,
        "maxLength": MAX_LENGTH,
        "rowsPerStep": ROWS_PER_STEP,
        "sequencesPerStep": SEQUENCES_PER_STEP,
        "trainRows": TRAIN_ROWS,
        "heldOutRows": HELD_OUT_ROWS,
        "targetLoss": TARGET_LOSS,
    }
