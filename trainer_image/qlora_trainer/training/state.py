"""A run of the training loop: what it works with, where it stands, and what it reports of that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn

from qlora_api.contract import ProgressRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StopRequest
from qlora_trainer.core.records import RecordWriter, timestamp
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter import adapter_parameters
from qlora_trainer.model.quantized import Storage
from qlora_trainer.report.metrics_log import MetricsLog
from qlora_trainer.training.divergence import Stability
from qlora_trainer.training.fingerprint import Fingerprint
from qlora_trainer.training.ranks import Ranks
from qlora_trainer.training.schedule import Schedule

# Weight of the newest step in the running mean: about the last ten steps count.
_NEWEST = 0.2


@dataclass(frozen=True)
class Pace:
    """How fast the run goes, without start-up, evaluations and saving."""

    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    seconds_per_evaluation: float = 0.0

    def after_step(self, seconds: float, tokens: int) -> "Pace":
        """The pace after another step of `tokens` useful tokens (there is no padding)."""
        return Pace(
            _running_mean(self.seconds_per_step, seconds),
            _running_mean(self.tokens_per_second, tokens / seconds if seconds > 0 else 0.0),
            self.seconds_per_evaluation,
        )

    def after_evaluation(self, seconds: float) -> "Pace":
        """The pace after an evaluation."""
        return Pace(self.seconds_per_step, self.tokens_per_second, seconds)

    def remaining_seconds(self, steps: int, evaluations: int) -> float | None:
        """Seconds for so many more steps and evaluations; None before the first step is done."""
        if self.seconds_per_step is None:
            return None
        return steps * self.seconds_per_step + evaluations * self.seconds_per_evaluation


def _running_mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _NEWEST * (value - mean)


@dataclass(frozen=True)
class RunState:
    """Where the run stands, besides what lies in the model and the optimizer. Every checkpoint holds it."""

    step: int = 0
    """Optimizer steps done."""
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    evaluated_step: int | None = None
    eval_loss: float | None = None
    initial_eval_loss: float | None = None
    peak_memory_bytes: int = 0
    """Of all attempts."""
    micro_batch_size: int | None = None
    """What it was halved to when the GPU ran out of memory; None for the job's own."""
    stability: Stability = field(default_factory=Stability)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Self:
        """What `asdict` made of a state."""
        return cls(**{**saved, "stability": Stability(**saved["stability"])})


@dataclass
class Run:
    """What the loop works with. Only the last fields change, from `plan` on."""

    context: StepContext
    records: RecordWriter
    stop: StopRequest
    now: Callable[[], datetime]
    monotonic: Callable[[], float]
    device: torch.device
    data: PreparedDataset
    eval_data: PreparedDataset | None
    model: Any
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    history: MetricsLog | None
    """None in the processes that do not write."""
    fingerprint: Fingerprint
    threads: int
    storage: Storage
    quantized_sha256: str
    plan: Schedule
    """Its micro batches may become smaller."""
    checkpoint_step: int | None = None
    checkpoint_time: str | None = None
    pace: Pace = field(default_factory=Pace)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name."""
        return adapter_parameters(self.model)

    def stopping(self) -> bool:
        """Whether a stop has been requested in any process; all must ask together."""
        return self.ranks.any(self.stop.requested)

    def note(self, entry: Mapping[str, float]) -> None:
        """Add a line to the history."""
        if self.history is not None:
            self.history.append(entry)


def report(run: Run, state: RunState, activity: str, *, force: bool = False) -> None:
    """Say how far the run is; the writer drops what comes too fast."""
    pace, total = run.pace, run.plan.total_steps
    remaining = pace.remaining_seconds(total - state.step, _evaluations_left(run, state))
    run.records.progress(
        ProgressRecord(
            job_uid=run.context.job_uid,
            pod_uid=run.context.pod_uid,
            step="train",
            time=timestamp(run.now()),
            activity=_with_smaller_micro_batches(state) if activity == "training" else activity,
            training_step=state.step,
            total_steps=total,
            epoch=round(run.plan.epoch(state.step), 4),
            loss=state.loss,
            eval_loss=state.eval_loss,
            learning_rate=state.learning_rate,
            grad_norm=state.grad_norm,
            tokens_per_second=None if pace.tokens_per_second is None else round(pace.tokens_per_second, 1),
            remaining_seconds=None if remaining is None else round(remaining, 1),
            peak_memory_bytes=state.peak_memory_bytes or None,
            micro_batch_size=state.micro_batch_size,
            checkpoint_step=run.checkpoint_step,
            checkpoint_time=run.checkpoint_time,
        ),
        force=force,
    )


def _with_smaller_micro_batches(state: RunState) -> str:
    if state.micro_batch_size is None:
        return "training"
    return f"training with microBatchSize {state.micro_batch_size}, lowered because the GPU ran out of memory"


def _evaluations_left(run: Run, state: RunState) -> int:
    total, every = run.plan.total_steps, run.context.spec.training.eval_every_steps
    if run.eval_data is None or state.step == total:
        return 0
    return 1 if every is None else total // every - state.step // every + (total % every != 0)
