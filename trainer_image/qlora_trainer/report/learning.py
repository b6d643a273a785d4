"""States whether a run has lowered its loss by little."""

from statistics import fmean

from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.history.metrics_log import MetricsHistory

_LEAST_FALL = 0.1
"""Of the loss, as a share of that before training."""


def learned_little(trained: TrainRecord, history: MetricsHistory) -> str | None:
    """Return a remark on a loss that fell by less than a tenth, or None; also without any loss.

    Without held-out rows, the first tenth of the training steps is compared with the last.
    """
    kind, before, after = "", trained.initial_eval_loss, trained.eval_loss
    if before is None or after is None:
        losses = history.loss.values
        if not losses:
            return None
        tenth = max(1, len(losses) // 10)
        kind, before, after = "training ", fmean(losses[:tenth]), fmean(losses[-tenth:])
    if after <= (1 - _LEAST_FALL) * before:
        return None
    return f"learned {'nothing' if after > before else 'little'}: {kind}loss {before:.3g} to {after:.3g}"
