"""Trains a subject on prepared data: the steps of the product's loop, without checkpoints and reports."""

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.arms import Subject
from qlora_api.spec.resolved import ResolvedTraining
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.losses.batch import Batch, read_batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
from qlora_trainer.training.distributed.device import seed_step
from qlora_trainer.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from qlora_trainer.training.schedule import Schedule

CPU = torch.device("cpu")


def train(subject: Subject, data: PreparedDataset, training: ResolvedTraining) -> list[float]:
    """Train to the last step; returns the loss of each step in nats per target."""
    schedule = Schedule.from_training(len(data), training)
    optimizer = make_optimizer(subject.parameters, training)
    losses = []
    for step in range(schedule.total_steps):
        seed_step(schedule.seed, step, 0)
        batches = [read_batch(data, indices, CPU) for indices in schedule.micro_batches(step)]
        targets = max(1, sum(batch.target_count for batch in batches))
        summed = 0.0
        for batch in batches:
            loss = _loss(subject.network, batch) / targets
            loss.backward()
            summed += float(loss.detach())
        losses.append(summed)
        subject.collect_gradients()
        nn.utils.clip_grad_norm_(subject.parameters, training.max_grad_norm)
        set_learning_rate(optimizer, learning_rate(step, schedule.total_steps, training))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        subject.apply_update()
    return losses


@torch.no_grad()
def mean_loss(subject: Subject, data: PreparedDataset) -> float:
    """Mean loss of all targets, nats."""
    subject.model.eval()
    batches = [read_batch(data, (index,), CPU) for index in range(len(data))]
    summed = sum(float(_loss(subject.network, batch)) for batch in batches)
    return summed / max(1, sum(batch.target_count for batch in batches))


def _loss(network: Any, batch: Batch) -> Tensor:
    """Summed loss of a batch, as the product's loop computes it."""
    with torch.autocast("cpu", dtype=BASE_DTYPE, cache_enabled=False):
        return batch_loss(network, batch)
