"""The losses of rows without the adapter, which preferences are measured against."""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from qlora_trainer.data.prepared import PreparedDataset, Split
from qlora_trainer.model.kernels.norms import normalizing
from qlora_trainer.model.losses.batch import Batch, MicroBatch, PairedRows
from qlora_trainer.model.losses.loss import row_losses
from qlora_trainer.model.protocols import AdaptedModel
from qlora_trainer.training.distributed.ranks import Ranks
from qlora_trainer.training.objective import Objective


class ReferenceLosses(Objective):
    """Losses of rows under the base alone, each computed when first seen."""

    def __init__(self, data: Mapping[Split, PreparedDataset], device: torch.device) -> None:
        self._data, self._device = data, device
        self._known = {split: torch.full((rows.rows,), torch.nan) for split, rows in data.items()}
        """float32 [rows] in main memory, NaN where a row has not been seen."""
        self._split: Split = "train"
        self._micro_batches: Sequence[MicroBatch] = ()
        self._missing = False
        self._found: dict[tuple[int, ...], Tensor] = {}

    def before(self, split: Split, micro_batches: Sequence[MicroBatch]) -> None:
        """Prepare for passes over these micro batches, all of them if any row is unknown."""
        # Ranks that share one base must run the same passes, so that this is the same decision in each.
        self._split, self._micro_batches, self._found = split, micro_batches, {}
        rows = list(chain.from_iterable(map(self._rows, micro_batches)))
        self._missing = bool(self._known[split][rows].isnan().any())

    def reference(self, model: AdaptedModel, batch: Batch, pairs: PairedRows) -> Tensor:
        """float32 [rows]: those of a micro batch, on the device. Computes missing ones."""
        known = self._known[self._split][list(pairs.numbers)].to(self._device, non_blocking=True)
        if not self._missing:
            return known
        computed = self._found[pairs.numbers] = _without_adapter(model, batch, as_in_training=self._split == "train")
        return torch.where(known.isnan(), computed, known)

    def after(self, ranks: Ranks) -> None:
        """Keep the results of the passes over the micro batches, in every rank."""
        if not self._missing:
            return
        own = {index for index, counts in ranks.rounds(range(len(self._micro_batches))) if counts}
        numbers = [tuple(self._rows(item)) for item in self._micro_batches]
        parts = [
            self._found[rows] if index in own else torch.zeros(len(rows), device=self._device)
            for index, rows in enumerate(numbers)
        ]
        computed, known = ranks.sum(torch.cat(parts)).cpu(), self._known[self._split]
        rows = torch.tensor(list(chain.from_iterable(numbers)))
        known[rows] = torch.where(known[rows].isnan(), computed, known[rows])
        self._missing, self._found = False, {}

    def state(self) -> dict[str, Tensor]:
        """The known losses, for the checkpoint."""
        return {split: known.clone() for split, known in self._known.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` has returned."""
        for split, known in self._known.items():
            known.copy_(state[split])

    def _rows(self, micro_batch: MicroBatch) -> Sequence[int]:
        data = self._data[self._split]
        return list(chain.from_iterable(data.row_numbers(index) for index in micro_batch))


def _without_adapter(model: AdaptedModel, batch: Batch, *, as_in_training: bool) -> Tensor:
    # With a new adapter of plain LoRA, with B 0, the policy's losses are the same bits on a CPU. On a GPU, where LoRA
    # layers take other kernels, they may differ in rounding.
    with torch.no_grad(), normalizing(as_in_training=as_in_training), model.disable_adapter():
        return row_losses(model.get_base_model(), batch)
