"""Schedules which sequences each optimizer step trains on, drawn from the seed."""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

import numpy
from numpy.typing import NDArray

from qlora_api.training import TrainingSpec
from qlora_trainer.model.batch import MicroBatch


@dataclass(frozen=True)
class Schedule:
    """The run's data as a function of the step: no state, so a resumed run sees the same data as an undisturbed one."""

    sequences: int
    micro_batch_size: int
    sequences_per_step: int
    """Sequences in every step but an epoch's last."""
    total_steps: int
    seed: int

    @classmethod
    def of(cls, sequences: int, training: TrainingSpec) -> "Schedule":
        """The schedule for `sequences` sequences. An epoch ends with a smaller step if they do not divide."""
        sequences_per_step = training.micro_batch_size * training.gradient_accumulation_steps
        steps_per_epoch = ceil(sequences / sequences_per_step)
        total = training.max_steps or (training.epochs or 1) * steps_per_epoch
        return cls(sequences, training.micro_batch_size, sequences_per_step, total, training.seed)

    def with_micro_batch_size(self, size: int) -> "Schedule":
        """The same sequences in the same steps and order, in other micro batches."""
        return replace(self, micro_batch_size=size)

    @property
    def accumulation(self) -> int:
        """Micro batches in every step but an epoch's last."""
        return ceil(self.sequences_per_step / self.micro_batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return ceil(self.sequences / self.sequences_per_step)

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + min(rest * self.sequences_per_step, self.sequences) / self.sequences

    def position(self, step: int) -> tuple[int, int]:
        """Epoch, and sequences of it already trained on, before the step that is number `step`, counted from 0."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, in_epoch * self.sequences_per_step

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro batches of the step that is number `step`, counted from 0."""
        epoch, start = self.position(step)
        chosen = _order(self.sequences, self.seed, epoch)[start : start + self.sequences_per_step].tolist()
        size = self.micro_batch_size
        return [tuple(chosen[first : first + size]) for first in range(0, len(chosen), size)]


@lru_cache(maxsize=2)
def _order(sequences: int, seed: int, epoch: int) -> NDArray[numpy.int64]:
    """The epoch's order: a permutation drawn from seed and epoch (Philox, Salmon et al. 2011), different in each."""
    generator = numpy.random.Generator(numpy.random.Philox(key=(seed, epoch)))
    return generator.permutation(sequences)
