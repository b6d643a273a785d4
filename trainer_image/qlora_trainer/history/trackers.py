"""Writes a run's metrics for the tools that teams compare runs with: TensorBoard, MLflow, Weights & Biases.

Training has no network: each tool writes files below `report/` of the workspace, and its own server or command reads or
uploads them later. Outside a pod the tool's environment variables (MLFLOW_TRACKING_URI, WANDB_MODE) may name a server.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.file_names import HISTORY_FILE

_MODULES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
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


class Tracker(Protocol):
    """One tool's record of one run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record what was measured after optimizer step `step`."""

    def close(self, *, finished: bool) -> None:
        """Nothing more follows in this process; unless the run is finished, a later process may resume it."""


def require_installed(names: Sequence[str]) -> None:
    """Raise StepFailure (BAD_CONFIGURATION) for a tool of spec.training.reportTo that is not installed."""
    for name in names:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise bad_configuration(
                f"spec.training.reportTo names {name}, which is not installed here: leave it out, or install "
                "qlora-operator[trackers] beside the trainer"
            )


def open_trackers(
    names: Sequence[str], folder: Path, *, run_name: str, run_id: str, settings: Mapping[str, Any], from_step: int
) -> list[Tracker]:
    """The tools' records of a run; those that an earlier process has started are resumed after `from_step`.

    `run_id` is the same for each attempt of a run; `settings` are the run's hyperparameters. Raises StepFailure
    (BAD_CONFIGURATION) for a tool that is not installed. Nothing else that a tool raises, now or later, reaches the
    caller: it is logged, and the tool gets no more metrics from this process.
    """
    # No telemetry, and no look at the git repository around the working directory.
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", WANDB_ERROR_REPORTING="false", WANDB_DISABLE_GIT="true")
    makers: dict[str, Callable[..., Tracker]] = {
        "tensorboard": _TensorBoard,
        "mlflow": _MLflow,
        "wandb": _WeightsAndBiases,
    }
    require_installed(names)
    return [
        _SideOutput(name, partial(makers[name], folder / name, run_name, run_id, settings, from_step)) for name in names
    ]


def grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics by the names under which such tools group them."""
    return {_GROUPS.get(name, name): value for name, value in metrics.items() if name != "step"}


class _SideOutput:
    """A tool that the run does not depend on: after its first failure it gets no more metrics."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._failed = False
        self._attempt("could not be opened", lambda: self._open(open_tracker))

    def _open(self, open_tracker: Callable[[], Tracker]) -> None:
        self._tracker = open_tracker()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if (tracker := self._tracker) is not None and not self._failed:
            self._attempt(f"failed at step {step}", lambda: tracker.log(step, metrics))

    def close(self, *, finished: bool) -> None:
        if (tracker := self._tracker) is not None:
            # Also one that has failed: what it has buffered may get through now, and its run is not shown as running.
            self._attempt("could not be closed", lambda: tracker.close(finished=finished and not self._failed))

    def _attempt(self, failed: str, action: Callable[[], None]) -> None:
        try:
            action()
        # An unreachable server, a full disk, a dead service: MLflow has its own exception for that, Weights
        # & Biases has several, TensorBoard lets the operating system's through. They have no narrower type in common.
        except Exception:
            level, self._failed = (logging.INFO if self._failed else logging.WARNING), True
            logger.log(
                level,
                "%s %s and gets no more metrics from this process; %s has them all",
                self._name,
                failed,
                HISTORY_FILE,
                exc_info=True,
            )


class _TensorBoard:
    def __init__(self, folder: Path, _run_name: str, _run_id: str, settings: Mapping[str, Any], from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps that a lost attempt took after its checkpoint are repeated; without one, so is the evaluation of step 0.
        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else 0)
        if not from_step:
            self._writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in grouped(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, folder: Path, run_name: str, run_id: str, settings: Mapping[str, Any], from_step: int) -> None:
        import mlflow
        from mlflow.tracking import MlflowClient

        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        address = os.environ.get("MLFLOW_TRACKING_URI", folder.absolute().as_uri())
        self._client = MlflowClient(tracking_uri=address)
        self._entities = mlflow.entities
        experiment = self._client.get_experiment_by_name("qlora")
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment("qlora")
        self._logged: dict[str, set[int]] = {}
        same = self._client.search_runs([experiment_id], f"tags.`qlora.run` = '{run_id}'")
        if same:
            self._run_id = same[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            for name in same[0].data.metrics:
                points = self._client.get_metric_history(self._run_id, name)
                self._logged[name] = {point.step for point in points if point.step >= from_step}
            return
        run = self._client.create_run(experiment_id, run_name=run_name, tags={"qlora.run": run_id})
        self._run_id = run.info.run_id
        for key, value in settings.items():
            self._client.log_param(self._run_id, key, value)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in grouped(metrics).items():
            # Steps that a lost attempt logged after its checkpoint are repeated; MLflow would show both points.
            if step not in self._logged.get(name, ()):
                self._client.log_metric(self._run_id, name, value, step=step)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")


class _WeightsAndBiases:
    def __init__(self, folder: Path, run_name: str, run_id: str, settings: Mapping[str, Any], from_step: int) -> None:
        import wandb

        os.environ.setdefault("WANDB_MODE", "offline")
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="qlora",
            name=run_name,
            id=run_id,
            resume="allow",
            config=dict(settings),
            dir=str(folder),
            # By default a second run of a process is the first one again: jobs may be trained together.
            reinit="create_new",
            settings=wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(grouped(metrics), step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
