"""The loss that plain transformers computes on prepared rows."""

from typing import Any

import torch

from qlora_trainer.data.prepared import IGNORED_LABEL, PreparedDataset


def mean_loss(model: Any, data: PreparedDataset) -> float:
    """Of the held-out rows' targets, one row at a time."""
    total, targets = 0.0, 0
    for index in range(len(data)):
        sequence = data[index]
        lengths = list(sequence.row_lengths)
        for tokens, labels in zip(sequence.input_ids.split(lengths), sequence.labels.split(lengths), strict=True):
            count = int((labels[1:] != IGNORED_LABEL).sum())
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=tokens[None], labels=labels[None]).loss
            total, targets = total + float(loss) * count, targets + count
    return total / targets
