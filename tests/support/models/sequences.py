"""Random sequences, as micro batches of the trainer."""

import torch
from torch import Tensor

from qlora_trainer.data.prepared import IGNORED_LABEL, PackedSequence

CPU = torch.device("cpu")


def random_sequence(lengths: tuple[int, ...], seed: int) -> PackedSequence:
    """Rows of random tokens; about half are targets, but never the first of a row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 512, (sum(lengths),), generator=generator)
    labels = tokens.masked_fill(torch.rand(len(tokens), generator=generator) < 0.5, IGNORED_LABEL)
    starts = torch.tensor((0, *lengths[:-1])).cumsum(0)
    labels[starts] = IGNORED_LABEL
    return PackedSequence(tokens, labels, lengths)


def rows_of(sequence: PackedSequence) -> list[tuple[Tensor, Tensor]]:
    """The token ids and labels of each row by itself."""
    sizes = list(sequence.row_lengths)
    return list(zip(sequence.input_ids.split(sizes), sequence.labels.split(sizes), strict=True))
