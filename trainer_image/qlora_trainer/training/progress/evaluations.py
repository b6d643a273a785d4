"""Decides from the evaluations of a run which adapter is the best, and whether to stop early.

The loss before training counts for early stopping and never as the best: no job needs an untrained adapter. A run that
stops early keeps its planned length for the learning rate, so its steps are those of a run without early stopping.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from qlora_api.spec.resolved import ResolvedTraining
from qlora_api.spec.training import EarlyStoppingSpec


@dataclass(frozen=True)
class Evaluations:
    """The results of evaluations so far, in nats per target of the held-out rows."""

    lowest_loss: float | None = None
    """Of all evaluations, that before training included, or None before the first."""
    best_step: int | None = None
    """First optimizer step with the lowest loss of a trained adapter, or None."""
    best_loss: float | None = None
    without_improvement: int = 0
    """The latest evaluations in a row without an improvement by minDelta."""

    def after(self, step: int, loss: float, early_stopping: EarlyStoppingSpec | None = None) -> "Evaluations":
        """Add the evaluation after `step` optimizer steps. Step 0 is never the best."""
        min_delta = 0.0 if early_stopping is None else early_stopping.min_delta
        improved = self.lowest_loss is None or self.lowest_loss - loss > min_delta
        best = step > 0 and (self.best_loss is None or loss < self.best_loss)
        return Evaluations(
            lowest_loss=loss if self.lowest_loss is None else min(self.lowest_loss, loss),
            best_step=step if best else self.best_step,
            best_loss=loss if best else self.best_loss,
            without_improvement=0 if improved else self.without_improvement + 1,
        )

    def is_exhausted(self, early_stopping: EarlyStoppingSpec | None) -> bool:
        """Whether the run has no patience left."""
        return early_stopping is not None and self.without_improvement >= early_stopping.patience


@dataclass(frozen=True)
class Kept:
    """Which adapter of a run is kept."""

    step: int
    """Optimizer steps after which it was so."""
    eval_loss: float | None
    """Its held-out loss, or None without held-out rows."""


def adapter_to_keep(training: ResolvedTraining, evaluations: Evaluations, step: int, eval_loss: float | None) -> Kept:
    """The adapter to keep of a run that ends after `step` steps, with `eval_loss`."""
    if training.keep == "best" and evaluations.best_step is not None:
        return Kept(evaluations.best_step, evaluations.best_loss)
    return Kept(step, eval_loss)


def expected_end(training: ResolvedTraining, planned_steps: int, curve: Iterable[tuple[int, float]]) -> tuple[int, int]:
    """After how many optimizer steps a run ends, and the step of the adapter that it keeps.

    `curve` has the step and the loss of each evaluation. Of a run that has not ended, the end is where it is planned.
    """
    evaluations, end = Evaluations(), planned_steps
    for step, loss in curve:
        evaluations = evaluations.after(step, loss, training.early_stopping)
        if evaluations.is_exhausted(training.early_stopping):
            end = step
            break
    return end, adapter_to_keep(training, evaluations, end, None).step
