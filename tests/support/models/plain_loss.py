"""The loss that plain transformers computes on prepared rows."""

import torch
from torch import nn

from qlora_trainer.data.prepared import IGNORED_LABEL, PreparedDataset
from tests.support.models.sequences import rows_of


def mean_loss(model: nn.Module, data: PreparedDataset) -> float:
    """Of the held-out rows' targets, one row at a time."""
    total, targets = 0.0, 0
    for index in range(len(data)):
        for tokens, labels in rows_of(data[index]):
            count = int((labels[1:] != IGNORED_LABEL).sum())
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=tokens[None], labels=labels[None]).loss
            total, targets = total + float(loss) * count, targets + count
    return total / targets
