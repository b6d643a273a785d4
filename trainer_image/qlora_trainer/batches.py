"""Which sequences an optimizer step sees, and how they become one batch on the device."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from qlora_api.training import TrainingSpec
from qlora_trainer.attention import Rows
from qlora_trainer.data.prepared import IGNORED_LABEL, PreparedDataset, Sequence

# On a CPU each number of tokens costs: a tenth of a second and more until oneDNN has code for its products, and memory
# between blocks that are all of other sizes. Long batches are filled up, by 3 % on average, so that there are few.
_FILLED_FROM_TOKENS = 512
_TOKENS_MULTIPLE = 64

MicroBatch = tuple[int, ...]
"""Indices of the sequences in one forward pass."""


@dataclass(frozen=True)
class Plan:
    """The run as a function of the step: no state, so a resumed run sees what an undisturbed one would have seen."""

    sequences: int
    micro_batch_size: int
    sequences_per_step: int
    """Of every step but an epoch's last."""
    total_steps: int
    seed: int

    @classmethod
    def of(cls, sequences: int, training: TrainingSpec) -> "Plan":
        """The plan for `sequences` sequences. An epoch ends with a smaller step if they do not divide."""
        sequences_per_step = training.micro_batch_size * training.gradient_accumulation_steps
        steps_per_epoch = ceil(sequences / sequences_per_step)
        total = training.max_steps or (training.epochs or 1) * steps_per_epoch
        return cls(sequences, training.micro_batch_size, sequences_per_step, total, training.seed)

    def with_micro_batch_size(self, size: int) -> "Plan":
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
        """Epoch, and sequences of it already seen, before the step that is number `step`, counted from 0."""
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
    """The epoch's order: a permutation drawn from seed and epoch (Philox, Salmon et al. 2011), another one in each."""
    generator = numpy.random.Generator(numpy.random.Philox(key=(seed, epoch)))
    return generator.permutation(sequences)


@dataclass(frozen=True)
class Batch:
    """One or more sequences as a single row of tokens. Their rows cannot see each other, so none is padded.

    On a CPU a row of filling may follow, without targets.
    """

    input_ids: Tensor
    """int64 [1, tokens]"""
    position_ids: Tensor
    """int64 [1, tokens]"""
    rows: Rows
    predicting: Tensor
    """int64 [targets]: positions whose next token is a target."""
    targets: Tensor
    """int64 [targets]: those tokens."""
    tokens: int
    """Without filling."""

    @classmethod
    def of(cls, sequences: Items[Sequence], device: torch.device) -> "Batch":
        """The batch of `sequences`; everything is computed in main memory, so that a GPU is not waited for."""
        lengths = tuple(length for sequence in sequences for length in sequence.segment_lengths)
        next_tokens = next_token_targets(torch.cat([sequence.labels for sequence in sequences]), lengths)
        predicting = (next_tokens != IGNORED_LABEL).nonzero().squeeze(1)
        filling = _filling(sum(lengths), device)
        rows = Rows.of((*lengths, filling) if filling else lengths, device)
        input_ids = torch.cat([sequence.input_ids for sequence in sequences])

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return cls(
            there(pad(input_ids, (0, filling)).unsqueeze(0)),
            there(rows.position_ids()),
            rows,
            there(predicting),
            there(next_tokens[predicting]),
            sum(lengths),
        )

    @property
    def target_count(self) -> int:
        """Tokens that count in the loss."""
        return len(self.targets)


def _filling(tokens: int, device: torch.device) -> int:
    return -tokens % _TOKENS_MULTIPLE if device.type == "cpu" and tokens >= _FILLED_FROM_TOKENS else 0


def next_token_targets(labels: Tensor, row_lengths: tuple[int, ...]) -> Tensor:
    """int64 [tokens]: the label of the token that follows in the same row, -100 where there is none."""
    targets = torch.full_like(labels, IGNORED_LABEL)
    targets[:-1] = labels[1:]
    targets[torch.tensor(row_lengths).cumsum(0) - 1] = IGNORED_LABEL
    return targets


def read_batch(dataset: PreparedDataset, indices: MicroBatch, device: torch.device) -> Batch:
    """The batch of the sequences at `indices`."""
    return Batch.of([dataset[index] for index in indices], device)
