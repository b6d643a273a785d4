"""Trains a subject by the steps of the product's loop, without checkpoints and reports, and scores it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.tuning.subjects import Subject
from qlora_api.spec.resolved import ResolvedTraining
from qlora_api.spec.training import PreferenceSpec
from qlora_trainer.data.prepared import PackedSequence, PreparedDataset
from qlora_trainer.model.architecture.decoder import decoder_states
from qlora_trainer.model.losses.batch import Batch, read_batch
from qlora_trainer.model.losses.loss import row_losses
from qlora_trainer.model.losses.preference import dpo
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
from qlora_trainer.training.distributed.device import seed_step
from qlora_trainer.training.distributed.ranks import Ranks
from qlora_trainer.training.optimizer import learning_rate, set_learning_rate
from qlora_trainer.training.preference import make_objective
from qlora_trainer.training.schedule import Schedule

CPU = torch.device("cpu")
_EVALUATED_TOKENS = 512
"""Of one forward pass of an evaluation, about."""


@dataclass(frozen=True)
class Measured:
    """The loss and the right rows of a set."""

    loss: float
    """Nats per target, or per pair."""
    right: str
    """For each row 1 or 0: whether all targets are the likeliest tokens, or the chosen answer is preferred."""

    @property
    def score(self) -> float:
        """The share of right rows."""
        return self.right.count("1") / len(self.right)


def train(
    subject: Subject,
    data: PreparedDataset,
    training: ResolvedTraining,
    after_step: Callable[[int, int], None] = lambda _done, _steps: None,
) -> list[float]:
    """Train to the last step, and call `after_step` with the steps done and all; returns the loss of each step."""
    schedule, objective = Schedule.from_training(len(data), training), make_objective(training, data, None, CPU)
    optimizer = subject.optimizer(training)
    losses: list[float] = []
    for step in range(schedule.total_steps):
        seed_step(schedule.seed, step, 0)
        micro_batches = schedule.micro_batches(step)
        objective.before("train", micro_batches)
        batches = [read_batch(data, indices, CPU) for indices in micro_batches]
        weight, summed = max(1, sum(map(objective.weight, batches))), 0.0
        for batch in batches:
            with torch.autocast("cpu", dtype=BASE_DTYPE, cache_enabled=False):
                loss = objective.sums(subject.model, batch).loss / weight
            loss.backward()
            summed += float(loss.detach())
        objective.after(Ranks())
        losses.append(summed)
        subject.collect_gradients()
        nn.utils.clip_grad_norm_(subject.parameters, training.max_grad_norm)
        set_learning_rate(optimizer, learning_rate(step, schedule.total_steps, training))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        subject.apply_update()
        after_step(step + 1, schedule.total_steps)
    return losses


@torch.no_grad()
def measure(subject: Subject, data: PreparedDataset) -> Measured:
    """Measure a set whose sequences have one row each."""
    subject.model.eval()
    total, weight, right = 0.0, 0, ""
    for sequences in _parts(data):
        batch = Batch.from_sequences(sequences, CPU)
        with torch.autocast("cpu", dtype=BASE_DTYPE, cache_enabled=False):
            losses, found = _of_pairs(subject, batch) if data.pairs else _of_rows(subject, batch, sequences)
        total, weight = total + float(losses.sum()), weight + len(losses)
        right += "".join("1" if one else "0" for one in found.tolist())
    subject.model.train()
    return Measured(total / weight, right)


def _parts(data: PreparedDataset) -> Iterator[list[PackedSequence]]:
    part: list[PackedSequence] = []
    for index in range(len(data)):
        part.append(data[index])
        if sum(len(sequence.input_ids) for sequence in part) >= _EVALUATED_TOKENS:
            yield part
            part = []
    if part:
        yield part


def _of_rows(subject: Subject, batch: Batch, sequences: list[PackedSequence]) -> tuple[Tensor, Tensor]:
    """Return the loss of each target, and whether each row is right."""
    network = subject.network
    states = decoder_states(network, batch.input_ids, batch.position_ids, batch.rows)[0]
    logits = network.get_output_embeddings()(states[batch.predicting]).float()
    ends = torch.tensor([len(sequence.input_ids) for sequence in sequences]).cumsum(0)
    wrong = torch.bucketize(batch.predicting[logits.argmax(-1) != batch.targets], ends, right=True)
    right = torch.ones(len(sequences), dtype=torch.bool)
    right[wrong] = False
    return cross_entropy(logits, batch.targets, reduction="none"), right


def _of_pairs(subject: Subject, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of each pair, and whether the chosen answer is preferred."""
    with subject.model.disable_adapter():
        reference = row_losses(subject.network, batch)
    found = dpo(row_losses(subject.network, batch), reference, PreferenceSpec())
    return found.loss, found.chosen_reward > found.rejected_reward
