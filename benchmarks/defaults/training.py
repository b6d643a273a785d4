"""Trains an adapter by the product's steps, and keeps the best one if rows are held out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.tuning.subjects import Subject
from benchmarks.tuning.training import measure, train
from qlora_api.spec.resolved import ResolvedTraining
from qlora_trainer.data.prepared import PreparedDataset


@dataclass(frozen=True)
class Trained:
    """The course of a run."""

    losses: tuple[float, ...]
    """Of each optimizer step."""
    kept_step: int
    """Steps that the adapter has been trained for."""


def train_and_keep(
    subject: Subject,
    data: PreparedDataset,
    training: ResolvedTraining,
    held_out: PreparedDataset | None,
    eval_every_steps: int | None,
) -> Trained:
    """Train to the last step. With held-out rows, the adapter is that of the best evaluation."""
    kept: tuple[float, int, list[Tensor]] | None = None

    def evaluate(done: int, steps: int) -> None:
        nonlocal kept
        if held_out is not None and eval_every_steps and (done % eval_every_steps == 0 or done == steps):
            found = measure(subject, held_out).loss
            if kept is None or found < kept[0]:
                kept = found, done, [parameter.detach().clone() for parameter in subject.parameters]

    losses = tuple(train(subject, data, training, evaluate))
    if kept is None:
        return Trained(losses, len(losses))
    with torch.no_grad():
        for parameter, best in zip(subject.parameters, kept[2], strict=True):
            parameter.copy_(best)
    return Trained(losses, kept[1])
