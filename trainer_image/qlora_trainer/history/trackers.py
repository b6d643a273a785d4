"""A run's metrics for trackers: their names there, and the event files of TensorBoard.

Training has no network: TensorBoard reads files below `report/` of the workspace, and publish uploads a run to MLflow
and Weights & Biases.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.file_names import HISTORY_FILE

_GROUPS = {
    "loss": "train/loss",
    "gradNorm": "train/grad_norm",
    "learningRate": "train/learning_rate",
    "tokensPerSecond": "train/tokens_per_second",
    "memoryBytes": "train/memory_bytes",
    "chosenReward": "train/chosen_reward",
    "rejectedReward": "train/rejected_reward",
    "rewardMargin": "train/reward_margin",
    "accuracy": "train/accuracy",
    "evalLoss": "eval/loss",
    "evalChosenReward": "eval/chosen_reward",
    "evalRejectedReward": "eval/rejected_reward",
    "evalRewardMargin": "eval/reward_margin",
    "evalAccuracy": "eval/accuracy",
}
logger = logging.getLogger(__name__)


def require_installed(names: Sequence[str]) -> None:
    """Raise StepFailure (BAD_CONFIGURATION) if a tool is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise bad_configuration(
                f"spec.training.reportTo names {name}, which is not installed here: leave it out, or install "
                "qlora-operator[trackers] beside the trainer"
            )


def grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics by the names that such tools group them by."""
    return {_GROUPS.get(name, name): value for name, value in metrics.items() if name != "step"}


class EventFiles:
    """TensorBoard's files of one run, without more metrics after an OSError."""

    def __init__(self, folder: Path, settings: Mapping[str, object], from_step: int) -> None:
        """Continue an earlier process's files. `settings`: the hyperparameters."""
        self._writer: Any = None
        self._failed = False
        self._attempt("could not be opened", lambda: self._open(folder, settings, from_step))

    def _open(self, folder: Path, settings: Mapping[str, object], from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a lost attempt took after its checkpoint are repeated; without one, so is the evaluation of step 0.
        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else 0)
        if not from_step:
            self._writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record what was measured after optimizer step `step`."""
        if not self._failed:
            self._attempt(f"failed at step {step}", lambda: self._add(step, metrics))

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in grouped(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._attempt("could not be closed", self._writer.close)

    def _attempt(self, failed: str, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError:
            level, self._failed = (logging.INFO if self._failed else logging.WARNING), True
            logger.log(
                level,
                "tensorboard %s and gets no more metrics from this process; %s has them all",
                failed,
                HISTORY_FILE,
                exc_info=True,
            )
