"""One micro batch of packed sequences as tensors on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qlora_trainer.core import cpu
from qlora_trainer.data.prepared import IGNORED_LABEL, PackedSequence, PreparedDataset
from qlora_trainer.model.kernels.attention import RowBoundaries

MicroBatch = tuple[int, ...]
"""Indices of the sequences in one forward pass."""


@dataclass(frozen=True)
class PairedRows:
    """The rows of alternating chosen and rejected answers, without padding rows."""

    numbers: tuple[int, ...]
    """Of each row, in its split."""
    target_counts: tuple[int, ...]
    """Targets of each row, at least one."""

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.numbers) // 2

    @classmethod
    def from_sequences(cls, sequences: Sequence[PackedSequence], next_tokens: Tensor) -> "PairedRows | None":
        """The rows of `sequences`, with their targets, or None if they are no pairs."""
        numbers: list[int] = []
        for sequence in sequences:
            if sequence.row_numbers is None:
                return None
            numbers += sequence.row_numbers
        lengths = [length for sequence in sequences for length in sequence.row_lengths]
        is_target = next_tokens != IGNORED_LABEL
        return cls(tuple(numbers), tuple(int(row.sum()) for row in is_target.split(lengths)))


@dataclass(frozen=True)
class Batch:
    """One or more sequences as a single row of tokens. Their rows cannot see each other, so none is padded.

    A row of padding may follow, without targets: see `core.cpu.padding`.
    """

    input_ids: Tensor
    """int64 [1, tokens]"""
    position_ids: Tensor
    """int64 [1, tokens]"""
    rows: RowBoundaries
    predicting: Tensor
    """int64 [targets]: positions whose next token is a target."""
    targets: Tensor
    """int64 [targets]: those tokens."""
    tokens: int
    """Without padding."""
    pairs: PairedRows | None = None
    """What its rows are, if they are chosen and rejected in turn."""

    @classmethod
    def from_sequences(cls, sequences: Sequence[PackedSequence], device: torch.device) -> "Batch":
        """The batch of `sequences`, computed in main memory to not wait for a GPU."""
        lengths = tuple(length for sequence in sequences for length in sequence.row_lengths)
        next_tokens = next_token_targets(torch.cat([sequence.labels for sequence in sequences]), lengths)
        predicting = (next_tokens != IGNORED_LABEL).nonzero().squeeze(1)
        padding = cpu.padding(sum(lengths), device.type)
        rows = RowBoundaries.from_lengths((*lengths, padding) if padding else lengths, device)
        input_ids = torch.cat([sequence.input_ids for sequence in sequences])

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return cls(
            on_device(pad(input_ids, (0, padding)).unsqueeze(0)),
            on_device(rows.position_ids()),
            rows,
            on_device(predicting),
            on_device(next_tokens[predicting]),
            sum(lengths),
            PairedRows.from_sequences(sequences, next_tokens),
        )

    @property
    def target_count(self) -> int:
        """Tokens that count in the loss."""
        return len(self.targets)


def next_token_targets(labels: Tensor, row_lengths: tuple[int, ...]) -> Tensor:
    """int64 [tokens]: the next token's label in the same row, -100 without one."""
    targets = torch.full_like(labels, IGNORED_LABEL)
    targets[:-1] = labels[1:]
    targets[torch.tensor(row_lengths).cumsum(0) - 1] = IGNORED_LABEL
    return targets


def read_batch(dataset: PreparedDataset, indices: MicroBatch, device: torch.device) -> Batch:
    """The batch of the sequences at `indices`."""
    return Batch.from_sequences([dataset[index] for index in indices], device)
