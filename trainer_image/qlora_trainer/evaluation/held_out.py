"""Compares a merged model with its adapter by the loss on some held-out rows."""

from collections.abc import Iterable

import torch

from qlora_trainer.core.completion import Comparison
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.losses.batch import Batch, read_batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.model.nf4.computation import computing
from qlora_trainer.model.protocols import AdaptedModel, Decoder

MAX_TOKENS = 4096
# Multiplications and additions that a pod without a GPU computes in some minutes.
_OPERATIONS = 4e13


def compare(model: AdaptedModel, data: PreparedDataset, parameters: int, device: torch.device) -> Comparison:
    """The adapter's loss on the first held-out sequences. Leaves it in eval mode."""
    base = model.eval().get_base_model()
    sequences = compared_sequences(data, parameters)
    batches = read_compared(data, sequences, device, together=False)
    targets = sum(batch.target_count for batch in batches)
    return Comparison(sequences=sequences, targets=targets, loss=mean_loss(base, batches))


def compared_sequences(data: PreparedDataset, parameters: int) -> int:
    """The number of sequences to compare: 4096 tokens, or fewer for a large model."""
    allowed = min(MAX_TOKENS, _OPERATIONS / (2 * parameters))
    tokens = 0
    for count in range(len(data)):
        tokens += len(data[count].input_ids)
        if tokens > allowed:
            return max(1, count)
    return len(data)


def read_compared(data: PreparedDataset, sequences: int, device: torch.device, *, together: bool) -> list[Batch]:
    """The first sequences. `together`: in one batch, for models that keep rows apart."""
    batches = [tuple(range(sequences))] if together else [(index,) for index in range(sequences)]
    return [read_batch(data, indices, device) for indices in batches]


@torch.no_grad()
def mean_loss(model: Decoder, batches: Iterable[Batch], dtype: torch.dtype | None = None) -> float:
    """Mean target loss of all batches, in the type that the model computes in, or in `dtype`."""
    summed, targets = 0.0, 0
    for batch in batches:
        with computing(model, batch.input_ids.device.type, cache=True, dtype=dtype):
            summed += float(batch_loss(model, batch))
        targets += batch.target_count
    return summed / max(1, targets)
