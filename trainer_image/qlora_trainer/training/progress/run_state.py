"""What a run has reached besides its tensors, and what every checkpoint states of it, as it is read back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from qlora_api.schema import ObservedModel
from qlora_api.status import Bytes, Count, Timestamp
from qlora_trainer.training.progress.divergence import Stability
from qlora_trainer.training.progress.evaluations import Evaluations

_MOST_THREADS = 4096
"""More CPU cores than a pod has."""


@dataclass(frozen=True)
class RunState:
    """What the run has reached, besides the tensors of model and optimizer. Every checkpoint holds it."""

    step: Count = 0
    """Optimizer steps done."""
    loss: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    """What the objective measured with the loss of the latest step."""
    grad_norm: float | None = None
    learning_rate: float | None = None
    evaluated_step: Count | None = None
    eval_loss: float | None = None
    initial_eval_loss: float | None = None
    eval_measured: Mapping[str, float] = field(default_factory=dict)
    """What it measured in the latest evaluation."""
    best_measured: Mapping[str, float] = field(default_factory=dict)
    """And in the best one so far."""
    peak_memory_bytes: Bytes = 0
    """The largest of all attempts."""
    micro_batch_size: PositiveInt | None = None
    """What the loop lowered it to when the GPU ran out of memory; None while it is the job's own."""
    kept_seconds: float = 0.0
    """Time of the optimizer steps and evaluations that led to this state; what an interruption undid is not in it."""
    stability: Stability = field(default_factory=Stability)
    evaluations: Evaluations = field(default_factory=Evaluations)
    at_rungs: tuple[tuple[int, float], ...] = ()
    """Step and held-out loss of the evaluations at the rungs of the job's sweep."""


class SavedState(ObservedModel):
    """What a run needs of a checkpoint's `state.json`, each value as the run that saved it may have had it.

    What another version states besides is not read, at any depth: its fingerprint says that the run is another one.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    format_version: int
    step: Count
    fingerprint: dict[str, Any] = Field(description="What decides the run's adapter.")
    threads: Annotated[int, Field(ge=1, le=_MOST_THREADS, description="CPU threads of each process.")]
    processor: str = Field(description="The kind of processor that computed it.")
    history_bytes: Bytes = Field(description="Length of the metrics up to it.")
    saved_at: Timestamp
    run: RunState

    @model_validator(mode="after")
    def _of_one_step(self) -> Self:
        run, best = self.run, self.run.evaluations.best_step
        if run.step != self.step or (best is not None and not 0 < best <= run.step):
            raise ValueError(f"its steps contradict each other: {self.step}, of the run {run.step}, of its best {best}")
        if run.step and run.loss is None:
            raise ValueError(f"it has no loss after {run.step} steps")
        return self
