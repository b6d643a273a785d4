"""The objective of a run: the loss of a batch, its divisor, and other measures.

Every objective is a sum over a batch, divided by a count that is known before its forward pass, so that micro batches,
ranks and packing change the result of a step by rounding only.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.data.prepared import Split
from qlora_trainer.model.losses.batch import Batch, MicroBatch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.model.protocols import AdaptedModel
from qlora_trainer.training.distributed.ranks import Ranks


@dataclass(frozen=True)
class BatchSums:
    """One batch's part of the loss and of the measures."""

    loss: Tensor
    """float32 scalar, with its graph."""
    measured: tuple[Tensor, ...] = ()
    """float32 scalars without a graph, in the order of the objective's `measures`."""

    def values(self) -> Tensor:
        """float32 [1 + measures], without a graph: the loss, then what is measured."""
        return torch.stack((self.loss.detach(), *self.measured))


def evaluation_measure(measure: str) -> str:
    """The name of a measure's mean over the held-out rows."""
    return f"eval{measure[0].upper()}{measure[1:]}"


class Objective(ABC):
    """The loop's interface to an objective.

    Every rank calls `before` and `after`, in the same order. One that keeps nothing of a batch leaves them out.
    """

    measures: tuple[str, ...] = ()
    """Names, in the run's metrics, of the means that are measured besides the loss."""

    @abstractmethod
    def weight(self, batch: Batch) -> int:
        """The batch's weight in the means of an optimizer step, or of an evaluation."""

    @abstractmethod
    def sums(self, model: AdaptedModel, batch: Batch) -> BatchSums:
        """The batch's sums, under autocast."""

    def before(self, split: Split, micro_batches: Sequence[MicroBatch]) -> None:  # noqa: B027 - most need nothing
        """Prepare for the forward passes of these micro batches, of all ranks together."""

    def after(self, ranks: Ranks) -> None:  # noqa: B027 - most need nothing
        """The micro batches of `before` are done, in all ranks. Not called if given up."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that a resumed run needs, or none."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 - most need nothing
        """Take over what `state` has returned."""


class Supervised(Objective):
    """Mean cross-entropy of the targets of an optimizer step, in any rows."""

    def weight(self, batch: Batch) -> int:
        """Its targets."""
        return batch.target_count

    def sums(self, model: AdaptedModel, batch: Batch) -> BatchSums:
        """The summed loss of its targets."""
        return BatchSums(batch_loss(model.get_base_model(), batch))
