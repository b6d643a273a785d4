"""Decides when a run is suspect, and when it has diverged. A resumed run decides the same.

A jump of the loss alone proves nothing: a curriculum has one wherever harder rows begin, and small batches have many.
Proof is a comparison with the model before the first step, on the same rows: the base without the adapter or, where
training was initialized with an earlier one, with that. So a cheap test at every step finds
suspect steps, and when they have lasted for the job's patience, that comparison decides. It also decides after a last
step that is suspect, or that raises the loss of the step's rows, which no later step would show.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

LOSS_RISE_NATS = 2.0
"""A loss this far above its lowest is suspect: targets are 7 times less likely."""
NORM_RISE = 100.0
"""A gradient norm of this many times its own level is suspect too."""
WORSE_THAN_START_NATS = 1.0
"""A loss this far above that before the first step, on equal rows, has diverged."""
# Weight of the newest step in the levels: about the last twenty steps count.
_NEWEST = 0.1
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Stability:
    """Levels of loss and gradient norm without suspect steps, and since when suspect."""

    loss_level: float | None = None
    """Running mean of the loss, in nats per target, or None before the first step."""
    lowest_loss_level: float | None = None
    norm_level: float | None = None
    """Running geometric mean of the gradient norm before clipping."""
    suspect_since: int | None = None
    """First of the latest consecutive suspect steps, counted from 1, or None."""

    @property
    def is_suspect(self) -> bool:
        """Whether the latest step was suspect. The last good checkpoint then stays."""
        return self.suspect_since is not None

    @classmethod
    def from_levels(cls, loss: float, grad_norm: float) -> Self:
        """The state of a run that is not suspect, with these levels of loss and norm."""
        return cls(loss, loss, max(grad_norm, _SMALLEST_NORM))

    def after_step(self, step: int, loss: float, grad_norm: float) -> "Stability":
        """The state after step `step`, from 1. A suspect one moves no level."""
        if self.loss_level is None or self.lowest_loss_level is None or self.norm_level is None:
            return Stability.from_levels(loss, grad_norm)
        if loss > self.lowest_loss_level + LOSS_RISE_NATS or grad_norm > NORM_RISE * self.norm_level:
            return self if self.is_suspect else replace(self, suspect_since=step)
        level = self.loss_level + _NEWEST * (loss - self.loss_level)
        norm = self.norm_level ** (1 - _NEWEST) * max(grad_norm, _SMALLEST_NORM) ** _NEWEST
        return Stability(level, min(self.lowest_loss_level, level), norm)

    def is_end_suspect(self, loss_before: float, loss_after: float) -> bool:
        """Whether the last step was suspect, or raised the loss of its rows."""
        return self.is_suspect or has_diverged(loss_after, loss_before)

    def is_out_of_patience(self, step: int, patience: int) -> bool:
        """Whether the last `patience` steps, up to `step`, were all suspect."""
        return self.suspect_since is not None and step - self.suspect_since + 1 >= patience


def has_diverged(loss: float, loss_at_start: float) -> bool:
    """Whether training, or a step, raised the rows' loss, in nats per target."""
    return not (math.isfinite(loss_at_start) and loss <= loss_at_start + WORSE_THAN_START_NATS)
