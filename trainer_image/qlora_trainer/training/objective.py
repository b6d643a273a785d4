"""What a run minimizes: the loss of a batch, what it is divided by, and what else is measured with it.

Every objective is a sum over a batch, divided by a count that is known before its forward pass, so that micro batches,
ranks and packing change the result of a step by rounding only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_trainer.data.prepared import Split
from qlora_trainer.model.losses.batch import Batch, MicroBatch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.training.distributed.ranks import Ranks


@dataclass(frozen=True)
class BatchSums:
    """What one batch adds to the loss and to what is measured with it."""

    loss: Tensor
    """float32 scalar, with its graph."""
    measured: tuple[Tensor, ...] = ()
    """float32 scalars without a graph, in the order of the objective's `measures`."""

    def values(self) -> Tensor:
        """float32 [1 + measures], without a graph: the loss, then what is measured."""
        return torch.stack((self.loss.detach(), *self.measured))


def of_evaluation(measure: str) -> str:
    """The name of a measure's mean over the held-out rows."""
    return f"eval{measure[0].upper()}{measure[1:]}"


class Objective(Protocol):
    """What the loop asks for each micro batch. Every rank calls `before` and `after`, in the same order."""

    @property
    def measures(self) -> tuple[str, ...]:
        """Names, in the run's metrics, of the means that are measured beside the loss."""

    def weight(self, batch: Batch) -> int:
        """How much the batch counts in the means of an optimizer step, or of an evaluation."""

    def before(self, split: Split, micro_batches: Sequence[MicroBatch]) -> None:
        """What follows are the forward passes of these micro batches, of all ranks together."""

    def sums(self, model: Any, batch: Batch) -> BatchSums:
        """The batch's sums, under autocast. `model` is the PEFT model."""

    def after(self, ranks: Ranks) -> None:
        """The micro batches of `before` are done, in all ranks. Not called if they are given up."""

    def state(self) -> dict[str, Tensor]:
        """What the objective has found out so far and a resumed run needs; empty for none."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` has returned."""


class Stateless:
    """What objectives have in common that need nothing but the batch."""

    def before(self, split: Split, micro_batches: Sequence[MicroBatch]) -> None:
        """Nothing to do."""

    def after(self, ranks: Ranks) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to do."""


class Supervised(Stateless):
    """Cross-entropy of the targets: their mean over an optimizer step, whichever rows they are in."""

    measures: tuple[str, ...] = ()

    def weight(self, batch: Batch) -> int:
        """Its targets."""
        return batch.target_count

    def sums(self, model: Any, batch: Batch) -> BatchSums:
        """The summed loss of its targets."""
        return BatchSums(batch_loss(model.get_base_model(), batch))
