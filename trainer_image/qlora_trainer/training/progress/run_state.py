"""The state of a run besides its tensors, as checkpoints save and restore it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from qlora_api.schema import ObservedModel
from qlora_api.status import Bytes, Count, Timestamp
from qlora_trainer.core.cpu import ComputeType
from qlora_trainer.training.progress.divergence import Stability
from qlora_trainer.training.progress.evaluations import Evaluations

_MOST_THREADS = 4096
"""More CPU cores than a pod has."""


@dataclass(frozen=True)
class RunState:
    """The run's progress, besides tensors. Every checkpoint holds it."""

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
    """The micro batch, lowered when the GPU ran out of memory, or None."""
    recomputes: bool = False
    """Whether all activations are recomputed because the GPU ran out of memory."""
    kept_seconds: float = 0.0
    """Seconds of the steps and evaluations that led here, without undone ones."""
    stability: Stability = field(default_factory=Stability)
    evaluations: Evaluations = field(default_factory=Evaluations)
    at_rungs: tuple[tuple[int, float], ...] = ()
    """Step and held-out loss of the evaluations at the rungs of the job's sweep."""


class SavedState(ObservedModel):
    """The parts of a checkpoint's `state.json` that a run needs, each value as the run that saved it may have had it.

    Other values of another version are not read, at any depth: its fingerprint shows that the run is another one.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    format_version: int
    step: Count
    fingerprint: dict[str, Any] = Field(description="Everything that decides the run's adapter.")
    threads: Annotated[int, Field(ge=1, le=_MOST_THREADS, description="CPU threads of each process.")]
    compute_type: ComputeType = Field("bfloat16", description="The type of its matmuls.")
    processor: str = Field(description="The kind of processor that computed it.")
    history_bytes: Bytes = Field(description="Length of the metrics up to it.")
    saved_at: Timestamp
    run: RunState

    @model_validator(mode="after")
    def _validate_steps(self) -> Self:
        run, best = self.run, self.run.evaluations.best_step
        if run.step != self.step or (best is not None and not 0 < best <= run.step):
            raise ValueError(f"its steps contradict each other: {self.step}, of the run {run.step}, of its best {best}")
        if run.step and run.loss is None:
            raise ValueError(f"it has no loss after {run.step} steps")
        return self
