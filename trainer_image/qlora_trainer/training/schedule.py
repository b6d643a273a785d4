"""Schedules which sequences each optimizer step trains on, drawn from the seed."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import ceil

import numpy
from numpy.typing import NDArray

from qlora_api.spec.resolved import ResolvedTraining
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.model.losses.batch import MicroBatch


@dataclass(frozen=True)
class Schedule:
    """The run's data as a function of the step, without state, to resume equally."""

    sequences: int
    """Of the data: each epoch has all of them, unless each epoch has its own."""
    micro_batch_size: int
    sequences_per_step: int
    """Sequences in every step but an epoch's last."""
    total_steps: int
    seed: int
    epoch_offsets: tuple[int, ...] = ()
    """The first sequence of each epoch, and the end, where a mix makes them differ."""

    @classmethod
    def from_training(
        cls, sequences: int, training: ResolvedTraining, epoch_offsets: tuple[int, ...] = ()
    ) -> "Schedule":
        """The schedule for `sequences` sequences. An epoch ends with a smaller step if they do not divide.

        Raises StepFailure (BAD_CONFIGURATION) if too few epochs are prepared.
        """
        sequences_per_step = training.micro_batch_size * training.gradient_accumulation_steps
        schedule = cls(sequences, training.micro_batch_size, sequences_per_step, 0, training.seed, epoch_offsets)
        epochs, drawn = training.epochs or 1, len(epoch_offsets) - 1
        is_short = schedule.first_step(drawn) < training.max_steps if training.max_steps else drawn < epochs
        if epoch_offsets and is_short:
            raise bad_configuration(
                f"the rows of {drawn} epochs are drawn, but the job trains on more: run the prepare step again"
            )
        return replace(schedule, total_steps=training.max_steps or schedule.first_step(epochs))

    def with_micro_batch_size(self, size: int) -> "Schedule":
        """The same sequences in the same steps and order, in other micro batches."""
        return replace(self, micro_batch_size=size)

    def first_step(self, epoch: int) -> int:
        """Optimizer steps in the epochs before this one, counted from 0."""
        if self.epoch_offsets:
            return int(self._first_steps[epoch])
        return epoch * ceil(self.sequences / self.sequences_per_step)

    def epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        whole, done = self.position(step)
        if not done:
            return float(whole)
        _, sequences = self._of_epoch(whole)
        return whole + min(done, sequences) / sequences

    def position(self, step: int) -> tuple[int, int]:
        """Epoch, and its sequences before step number `step`, counted from 0."""
        if self.epoch_offsets:
            epoch = int(numpy.searchsorted(self._first_steps, step, side="right")) - 1
        else:
            epoch = step // self.first_step(1)
        return epoch, (step - self.first_step(epoch)) * self.sequences_per_step

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro batches of the step that is number `step`, counted from 0."""
        epoch, start = self.position(step)
        begin, sequences = self._of_epoch(epoch)
        order = _order(sequences, self.seed, epoch)[start : start + self.sequences_per_step]
        chosen, size = (begin + order).tolist(), self.micro_batch_size
        return [tuple(chosen[first : first + size]) for first in range(0, len(chosen), size)]

    def _of_epoch(self, epoch: int) -> tuple[int, int]:
        """The first sequence of an epoch, and how many it has."""
        if not self.epoch_offsets:
            return 0, self.sequences
        first, end = self.epoch_offsets[epoch : epoch + 2]
        return first, end - first

    @cached_property
    def _first_steps(self) -> NDArray[numpy.int64]:
        """int64 [epochs + 1]: first steps of epochs with different sequences, and the end."""
        steps = -(-numpy.diff(self.epoch_offsets) // self.sequences_per_step)
        return numpy.concatenate(([0], numpy.cumsum(steps, dtype=numpy.int64)))


@lru_cache(maxsize=2)
def _order(sequences: int, seed: int, epoch: int) -> NDArray[numpy.int64]:
    """A permutation for each seed and epoch, by Philox (Salmon et al. 2011)."""
    generator = numpy.random.Generator(numpy.random.Philox(key=(seed, epoch)))
    return generator.permutation(sequences)
