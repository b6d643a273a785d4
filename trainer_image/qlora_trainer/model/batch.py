"""One micro batch of packed sequences as tensors on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qlora_trainer.data.prepared import IGNORED_LABEL, PackedSequence, PreparedDataset
from qlora_trainer.model.attention import RowBoundaries

# On a CPU each number of tokens costs: a tenth of a second and more until oneDNN has code for its products, and memory
# between blocks that are all of other sizes. Long batches are filled up, by 3 % on average, so that there are few.
_FILLED_FROM_TOKENS = 512
_TOKENS_MULTIPLE = 64

MicroBatch = tuple[int, ...]
"""Indices of the sequences in one forward pass."""


@dataclass(frozen=True)
class Batch:
    """One or more sequences as a single row of tokens. Their rows cannot see each other, so none is padded.

    On a CPU a row of filling may follow, without targets.
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
    """Without filling."""

    @classmethod
    def of(cls, sequences: Sequence[PackedSequence], device: torch.device) -> "Batch":
        """The batch of `sequences`; everything is computed in main memory, so that a GPU is not waited for."""
        lengths = tuple(length for sequence in sequences for length in sequence.row_lengths)
        next_tokens = next_token_targets(torch.cat([sequence.labels for sequence in sequences]), lengths)
        predicting = (next_tokens != IGNORED_LABEL).nonzero().squeeze(1)
        filling = _filling(sum(lengths), device)
        rows = RowBoundaries.of((*lengths, filling) if filling else lengths, device)
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
