"""The objectives that compare two answers: DPO and ORPO."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_api.spec.training import PreferenceSpec, TrainingSpec
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.data.prepared import PreparedDataset, Split
from qlora_trainer.model.losses.batch import Batch, MicroBatch, PairedRows
from qlora_trainer.model.losses.loss import row_losses
from qlora_trainer.model.losses.preference import PairLosses, dpo, orpo
from qlora_trainer.training.distributed.ranks import Ranks
from qlora_trainer.training.objective import BatchSums, Objective, Stateless, Supervised
from qlora_trainer.training.reference import ReferenceLosses

MEASURES = ("chosenReward", "rejectedReward", "rewardMargin", "accuracy")
"""Names of the means over pairs: rewards in nats, and accuracy.

Accuracy is the share of pairs whose chosen answer has the higher implicit reward.
"""


def make_objective(
    training: TrainingSpec, data: PreparedDataset, eval_data: PreparedDataset | None, device: torch.device
) -> Objective:
    """The job's objective. Raises StepFailure (BAD_CONFIGURATION) for unusable data."""
    if training.compares_answers != data.pairs:
        found = "pairs of answers" if data.pairs else "rows with one answer"
        raise bad_configuration(
            f"spec.training.objective is {training.objective or 'supervised'}, and the prepared data are {found}: "
            "prepare them again"
        )
    settings = training.preference or PreferenceSpec()
    if training.objective == "orpo":
        return OddsRatio(settings)
    if training.objective == "dpo":
        splits: dict[Split, PreparedDataset] = {"train": data}
        if eval_data is not None:
            splits["eval"] = eval_data
        return DirectPreference(settings, ReferenceLosses(splits, device))
    return Supervised()


class _OfPairs:
    """The common part: the mean over pairs, in any micro batch or rank."""

    measures: tuple[str, ...] = MEASURES

    def weight(self, batch: Batch) -> int:
        """Its pairs."""
        return len(_pairs(batch))

    def _summed(self, losses: PairLosses) -> BatchSums:
        return BatchSums(losses.loss.sum(), losses.sums())


class DirectPreference(_OfPairs):
    """DPO against the base with the adapter off."""

    def __init__(self, settings: PreferenceSpec, reference: ReferenceLosses) -> None:
        self._settings, self._reference = settings, reference

    def before(self, split: Split, micro_batches: Sequence[MicroBatch]) -> None:
        """Look for rows whose reference is unknown."""
        self._reference.before(split, micro_batches)

    def sums(self, model: Any, batch: Batch) -> BatchSums:
        """The sums of its pairs.

        Runs the model a second time, without the adapter, for rows that were never seen.
        """
        reference = self._reference.of(model, batch, _pairs(batch))
        return self._summed(dpo(row_losses(model.get_base_model(), batch), reference, self._settings))

    def after(self, ranks: Ranks) -> None:
        """Keep the reference of the rows."""
        self._reference.after(ranks)

    def state(self) -> dict[str, Tensor]:
        """The reference of all rows seen so far."""
        return self._reference.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` has returned."""
        self._reference.restore(state)


class OddsRatio(_OfPairs, Stateless):
    """ORPO, which needs no reference."""

    def __init__(self, settings: PreferenceSpec) -> None:
        self._settings = settings

    def sums(self, model: Any, batch: Batch) -> BatchSums:
        """Those of its pairs."""
        losses = row_losses(model.get_base_model(), batch)
        targets = torch.tensor(_pairs(batch).target_counts).to(losses.device, non_blocking=True)
        return self._summed(orpo(losses, targets, self._settings))


def _pairs(batch: Batch) -> PairedRows:
    if batch.pairs is None:
        raise AssertionError("data that are no pairs were rejected when the objective was made")
    return batch.pairs
