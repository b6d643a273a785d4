"""Decides when a run is suspected of divergence, and when it has diverged; pure, so that a resumed run judges alike.

A jump of the loss alone proves nothing: a curriculum has one wherever harder rows begin, and small batches have many.
What is certain is the comparison that an adapter allows: the base model without it, on the same rows. So a cheap test
at every step raises the suspicion, and when it has lasted for the job's patience, that comparison decides; and so it
does after a last step that is suspect, or raises the loss of its own rows, which no later step would show.
"""

import math
from dataclasses import dataclass, replace

LOSS_RISE_NATS = 2.0
"""A loss so far above its lowest level is suspect: each target has become seven times less likely."""
NORM_RISE = 100.0
"""So is a gradient norm that is so many times its own level."""
WORSE_THAN_BASE_NATS = 1.0
"""A run whose loss is so far above that of the base model alone, on the same rows, has diverged."""
# Weight of the newest step in the levels: about the last twenty steps count.
_NEWEST = 0.1
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Stability:
    """The levels of loss and gradient norm over the unsuspected steps so far, and since when a run is suspect."""

    loss_level: float | None = None
    """Running mean of the loss, in nats per target; None before the first step."""
    lowest_loss_level: float | None = None
    norm_level: float | None = None
    """Running geometric mean of the gradient norm before clipping."""
    suspect_since: int | None = None
    """First of the suspect steps in a row, counted from 1."""

    @property
    def suspect(self) -> bool:
        """Whether the latest step was suspect: then nothing may replace the last good checkpoint."""
        return self.suspect_since is not None

    def after_step(self, step: int, loss: float, grad_norm: float) -> "Stability":
        """The state after the step that is number `step`, counted from 1. A suspect step does not move the levels."""
        if self.loss_level is None or self.lowest_loss_level is None or self.norm_level is None:
            return cleared(loss, grad_norm)
        if loss > self.lowest_loss_level + LOSS_RISE_NATS or grad_norm > NORM_RISE * self.norm_level:
            return self if self.suspect else replace(self, suspect_since=step)
        level = self.loss_level + _NEWEST * (loss - self.loss_level)
        norm = self.norm_level ** (1 - _NEWEST) * max(grad_norm, _SMALLEST_NORM) ** _NEWEST
        return Stability(level, min(self.lowest_loss_level, level), norm)

    def end_to_be_judged(self, loss_before: float, loss_after: float) -> bool:
        """Whether the last step was suspect, or did harm: the losses are those of its own rows, before and after it."""
        return self.suspect or has_diverged(loss_after, loss_before)

    def to_be_judged(self, step: int, patience: int) -> bool:
        """Whether the last `patience` steps, up to `step`, were all suspect."""
        return self.suspect_since is not None and step - self.suspect_since + 1 >= patience


def cleared(loss: float, grad_norm: float) -> Stability:
    """The state of a run that is not suspect, or no longer, with its levels where it stands now."""
    return Stability(loss, loss, max(grad_norm, _SMALLEST_NORM))


def has_diverged(loss: float, base_loss: float) -> bool:
    """Whether the adapter does harm: `loss` is with it, `base_loss` without, in nats per target of the same rows.

    The same margin tells whether a step does: `base_loss` is then that before it.
    """
    return not (math.isfinite(base_loss) and loss <= base_loss + WORSE_THAN_BASE_NATS)
