"""Compares a merged model with its adapter by the loss on some held-out rows."""

from collections.abc import Iterable

import torch

from qlora_trainer.core.completion import Comparison
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.losses.batch import Batch, read_batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.model.protocols import AdaptedModel, Decoder

MAX_TOKENS = 4096
# Multiplications and additions that a pod without a GPU computes in some minutes.
_OPERATIONS = 4e13


def compare(model: AdaptedModel, data: PreparedDataset, parameters: int, device: torch.device) -> Comparison:
    """The loss of a PEFT model on the first held-out sequences, each in a separate batch. Leaves it in eval mode.

    `parameters` are the quantized ones of its base, which decide how many sequences are compared.
    """
    base = model.eval().get_base_model()
    sequences = compared_sequences(data, parameters)
    batches = read_compared(data, sequences, device, together=False)
    targets = sum(batch.target_count for batch in batches)
    return Comparison(sequences=sequences, targets=targets, loss=mean_loss(base, batches))


def compared_sequences(data: PreparedDataset, parameters: int) -> int:
    """The number of held-out sequences for a model of so many parameters, which may be on a CPU.

    As many as have 4096 tokens, or fewer for a large model: a token costs two operations per parameter. At least one.
    """
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
def mean_loss(model: Decoder, batches: Iterable[Batch]) -> float:
    """Mean target loss of all batches, in 16 bit as in training, in eval mode."""
    summed, targets = 0.0, 0
    for batch in batches:
        with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16):
            summed += float(batch_loss(model, batch))
        targets += batch.target_count
    return summed / max(1, targets)
