"""The objectives that compare two answers: DPO and ORPO."""

from collections.abc import Mapping

import torch

from qlora_api.spec.resolved import ResolvedTraining
from qlora_api.spec.training import PreferenceSpec
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.data.prepared import PreparedDataset, Split
from qlora_trainer.model.losses.batch import Batch, PairedRows
from qlora_trainer.model.losses.loss import row_losses
from qlora_trainer.model.losses.preference import PairLosses, dpo, orpo
from qlora_trainer.model.protocols import AdaptedModel
from qlora_trainer.training.objective import BatchSums, Objective, Supervised
from qlora_trainer.training.reference import ReferenceLosses

MEASURES = ("chosenReward", "rejectedReward", "rewardMargin", "accuracy")
"""Names of the means over pairs: rewards in nats, and accuracy.

Accuracy is the share of pairs whose chosen answer has the higher implicit reward.
"""


def make_objective(
    training: ResolvedTraining, data: PreparedDataset, eval_data: PreparedDataset | None, device: torch.device
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
        return DirectPreference(settings, splits, device)
    return Supervised()


class _PairObjective(Objective):
    """The mean over pairs, in any micro batch or rank."""

    measures = MEASURES

    def weight(self, batch: Batch) -> int:
        """Its pairs."""
        return len(_pairs(batch))

    def _sum_pairs(self, losses: PairLosses) -> BatchSums:
        return BatchSums(losses.loss.sum(), losses.sums())


class DirectPreference(_PairObjective, ReferenceLosses):
    """DPO against the base with the adapter off."""

    def __init__(self, settings: PreferenceSpec, data: Mapping[Split, PreparedDataset], device: torch.device) -> None:
        super().__init__(data, device)
        self._settings = settings

    def sums(self, model: AdaptedModel, batch: Batch) -> BatchSums:
        """The sums of its pairs. Rows that were never seen pass the model twice."""
        reference = self.reference(model, batch, _pairs(batch))
        return self._sum_pairs(dpo(row_losses(model.get_base_model(), batch), reference, self._settings))


class OddsRatio(_PairObjective):
    """ORPO, which needs no reference."""

    def __init__(self, settings: PreferenceSpec) -> None:
        self._settings = settings

    def sums(self, model: AdaptedModel, batch: Batch) -> BatchSums:
        """The sums of its pairs."""
        losses = row_losses(model.get_base_model(), batch)
        targets = torch.tensor(_pairs(batch).target_counts).to(losses.device, non_blocking=True)
        return self._sum_pairs(orpo(losses, targets, self._settings))


def _pairs(batch: Batch) -> PairedRows:
    if batch.pairs is None:
        raise AssertionError("data that are no pairs were rejected when the objective was made")
    return batch.pairs
