"""A run of the training loop: its fixed parts, its progress, and its record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import torch
from torch import Tensor, nn

from qlora_api.contract import MIN_SECONDS_BETWEEN_PROGRESS, nine_digits
from qlora_api.memory.training_shape import Recomputation
from qlora_api.spec.resolved import ResolvedTraining
from qlora_trainer.core.cpu import ComputeType
from qlora_trainer.core.failures import StopRequest
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.history.metrics_log import MetricsLog
from qlora_trainer.model.adapter.attach import activate_adapter
from qlora_trainer.model.base.load import Storage
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.nf4.computation import computing
from qlora_trainer.model.protocols import AdaptedModel
from qlora_trainer.training.base_check import BaseCheck
from qlora_trainer.training.checkpoints.attempts import Attempt, show_life
from qlora_trainer.training.checkpoints.checkpoint import StoredFile
from qlora_trainer.training.checkpoints.saver import CheckpointSaver
from qlora_trainer.training.checkpoints.time_spent import Pace, goodput, spent_seconds
from qlora_trainer.training.distributed.ranks import Ranks
from qlora_trainer.training.objective import BatchSums, Objective
from qlora_trainer.training.prepared_job import PreparedJob
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.schedule import Schedule


@dataclass(frozen=True)
class Runtime:
    """The records, the stop request and the clocks of the process that runs the step."""

    records: RecordWriter
    stop: StopRequest
    now: Callable[[], datetime]
    """The time for records, with a time zone."""
    monotonic: Callable[[], float]
    """Seconds, for speeds."""


@dataclass
class RunProgress:
    """What changes in a run, besides the state that a checkpoint saves."""

    schedule: Schedule
    """Its micro batches become smaller if the GPU runs out of memory."""
    recomputation: Recomputation
    """That of prepare, until the GPU runs out of memory: then all blocks are recomputed."""
    checkpoint_step: int | None = None
    """Step of the newest checkpoint that has been read back."""
    checkpoint_time: str | None = None
    save_step: int | None = None
    """Step of the newest save that has begun."""
    training_since: str | None = None
    """When this process had loaded all and began to train."""
    best: StoredFile | None = None
    """The adapter of the best evaluation so far, in the process that writes; None if the job keeps the last."""
    pace: Pace = field(default_factory=Pace)
    reported: RunState = field(default_factory=RunState)
    """The state of the latest report, written or not."""
    next_sign_of_life: float = float("-inf")


@dataclass(frozen=True)
class Run:
    """What the loop works with. Only `progress` changes."""

    job: PreparedJob
    runtime: Runtime
    ranks: Ranks
    device: torch.device
    data: PreparedDataset
    eval_data: PreparedDataset | None
    adapted_base: AdaptedModel
    """May have the adapters of other runs too."""
    adapter: str
    """The name of the run's adapter in it."""
    parameters: Mapping[str, nn.Parameter]
    """The adapter's parameters by name."""
    optimizer: torch.optim.Optimizer
    objective: Objective
    history: MetricsLog | None
    """None in the ranks that do not write."""
    threads: int
    """CPU threads of this rank; a resumed run uses as many, so that it adds in the same order."""
    compute_type: ComputeType
    """The type of matmuls; a resumed run computes in the same on every processor."""
    storage: Storage
    base_check: BaseCheck | None
    """Reads the base's files again, in one process of each node."""
    saver: CheckpointSaver
    """Must be entered: leaving it waits for its thread."""
    attempts: Sequence[Attempt]
    """All so far, the running one included."""
    progress: RunProgress

    @property
    def model(self) -> AdaptedModel:
        """The PEFT model with the run's adapter active, slow to change to another."""
        if self.adapted_base.active_adapter != self.adapter:
            activate_adapter(self.adapted_base, self.adapter)
        return self.adapted_base

    @property
    def training(self) -> ResolvedTraining:
        """The job's settings of the loop."""
        return self.job.spec.training

    def is_stopping(self) -> bool:
        """Whether a stop has been requested in any rank; all ranks must ask together."""
        return self.ranks.any(self.runtime.stop.is_requested)

    def has_stopped_early(self, state: RunState) -> bool:
        """Whether the run ends at this state, before its last step."""
        early_stopping, total = self.training.early_stopping, self.progress.schedule.total_steps
        return state.step < total and state.evaluations.is_exhausted(early_stopping)

    def has_ended(self, state: RunState) -> bool:
        """Whether no optimizer step follows."""
        return state.step == self.progress.schedule.total_steps or self.has_stopped_early(state)

    def goodput(self, state: RunState) -> float | None:
        """The share of the attempts' time that is in this state."""
        return goodput(state.kept_seconds, spent_seconds(self.attempts, self.runtime.now()))

    def sums(self, batch: Batch) -> BatchSums:
        """The objective's sums of a batch."""
        with computing(self.model, self.device.type):
            return self.objective.sums(self.model, batch)

    def show_life(self) -> None:
        """Leave a sign of life, unless the last one is younger than five seconds."""
        now = self.runtime.monotonic()
        if now >= self.progress.next_sign_of_life:
            show_life(self.job.workspace.records)
            self.progress.next_sign_of_life = now + MIN_SECONDS_BETWEEN_PROGRESS

    def note(self, entry: Mapping[str, float]) -> None:
        """Add a line to the metrics."""
        if self.history is not None:
            self.history.append(entry)


@dataclass(frozen=True)
class Gradient:
    """Results of a step's backward passes, besides the parameters' gradients."""

    means: Tensor
    """float32 [1 + measures] on the device: the loss, and what the objective measures with it."""
    weight: int
    """Of the whole step: what the sums of the objective were divided by."""
    tokens: int
    """Without padding, of all ranks."""
    batches: Sequence[tuple[Batch, bool]]
    """This rank's share, each with whether it counts."""


def report(run: Run, state: RunState, activity: str, *, force: bool = False) -> None:
    """Write a progress record, unless too soon after another without `force`."""
    progress = run.progress
    progress.reported = state
    pace, total = progress.pace, progress.schedule.total_steps
    steps_left = 0 if run.has_ended(state) else total - state.step
    remaining = pace.remaining_seconds(steps_left, _evaluations_left(run, state))
    if run.ranks.is_main:
        run.show_life()
    run.runtime.records.progress(
        run.job.identity.progress(
            "train",
            run.runtime.now(),
            _training(run, state) if activity == "training" else activity,
            training_step=state.step,
            total_steps=total,
            epoch=round(progress.schedule.epoch(state.step), 4),
            loss=_short(state.loss),
            eval_loss=_short(state.eval_loss),
            learning_rate=_short(state.learning_rate),
            grad_norm=_short(state.grad_norm),
            tokens_per_second=None if pace.tokens_per_second is None else round(pace.tokens_per_second, 1),
            remaining_seconds=None if remaining is None else round(remaining, 1),
            peak_memory_bytes=state.peak_memory_bytes or None,
            micro_batch_size=state.micro_batch_size,
            goodput=run.goodput(state),
            reward_margin=_short(state.measured.get("rewardMargin")),
            accuracy=_short(state.measured.get("accuracy")),
            eval_accuracy=_short(state.eval_measured.get("evalAccuracy")),
            evaluations=tuple((step, nine_digits(loss)) for step, loss in state.at_rungs) or None,
            checkpoint_step=progress.checkpoint_step,
            checkpoint_time=progress.checkpoint_time,
            training_since=progress.training_since,
        ),
        force=force,
    )


def _short(figure: float | None) -> float | None:
    return None if figure is None else nine_digits(figure)


def _training(run: Run, state: RunState) -> str:
    if run.has_stopped_early(state):
        return f"stopped early: {state.evaluations.without_improvement} evaluations without improvement"
    if run.compute_type != "bfloat16":
        return f"training in {run.compute_type}"
    if state.micro_batch_size is None:
        return "training"
    return f"training with microBatchSize {state.micro_batch_size}, lowered because the GPU ran out of memory"


def _evaluations_left(run: Run, state: RunState) -> int:
    total, every = run.progress.schedule.total_steps, run.training.eval_every_steps
    if run.eval_data is None or run.has_ended(state):
        return 0
    return 1 if every is None else total // every - state.step // every + (total % every != 0)
